"""Time, memory, arithmetic and bandwidth of a call, on a GPU or, for rehearsals, on the CPU."""

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError, first_line

H100_BF16_TFLOPS = 989.0
"""Dense bf16 of H100 and H200 (SXM) by NVIDIA's data sheet."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and whether it is a rehearsal: the same code on the CPU in tiny sizes."""

    device: str
    rehearse: bool = False

    def pick(self, real: Any, rehearsed: Any) -> Any:
        return rehearsed if self.rehearse else real

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    def wait(self) -> None:
        import torch

        if self.gpu:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Give back what nobody holds any more."""
        import gc

        import torch

        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()


def timed(setting: Setting, call: Callable[[], Any], n: int, warmup: int = 3) -> dict[str, Any]:
    """Milliseconds of `n` calls back to back after `warmup` more, and the most memory they took.

    On a GPU the borders are CUDA events in the stream, so a call's time holds what the device waited for the host.

    Returns:
        ms (every call), n, warmup, median, p95, p99; on a GPU also peak_gb of these calls and held_gb before them.
    """
    import torch

    for _ in range(warmup):
        call()
    setting.wait()
    found: dict[str, Any] = {}
    if setting.gpu:
        found["held_gb"] = torch.cuda.memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        setting.wait()
        ms = [before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)]
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        ms = []
        for _ in range(n):
            begin = time.perf_counter()
            call()
            ms.append(1000 * (time.perf_counter() - begin))
    median, p95, p99 = (float(q) for q in np.quantile(ms, [0.5, 0.95, 0.99]))
    return {"n": n, "warmup": warmup, "median": median, "p95": p95, "p99": p99, **found, "ms": ms}


def attempted(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement, or why there is none: one that fails takes no other with it. Its traceback goes to stderr."""
    try:
        return call()
    except (BurnishError, RuntimeError, TypeError, ValueError) as error:  # out of memory is a RuntimeError
        traceback.print_exc()
        return {"failed": first_line(error, 300)}


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in a call, backward pass included; a product counts two."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def launches(setting: Setting, call: Callable[[], Any]) -> int:
    """Kernels that a call launches one by one; 0 on the CPU."""
    import torch

    if not setting.gpu:
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:  # with the CPU's: seconds
        call()
        setting.wait()
    return sum(event.count for event in found.key_averages() if event.key.startswith(("cudaLaunch", "cuLaunch")))


def roofline(setting: Setting) -> dict[str, float]:
    """What this device does at best: TFLOP/s of a square bf16 product, and GB/s read and written by a copy."""
    import torch

    edge, size = setting.pick((8192, 2**30), (128, 2**20))
    kind = setting.pick(torch.bfloat16, torch.float32)
    one, two = (torch.randn(edge, edge, device=setting.device, dtype=kind) for _ in range(2))
    product = timed(setting, lambda: torch.matmul(one, two), 10)["median"]
    source = torch.empty(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    copy = timed(setting, lambda: target.copy_(source), 10)["median"]
    return {"product_tflops": 2 * edge**3 / product / 1e9, "copy_gb_s": 2 * size / copy / 1e6}


def relative(found: Any, truth: Any) -> float:
    """Norm of the difference over the norm of `truth`, in float64 on the CPU."""
    a, b = (x.detach().double().cpu() for x in (found, truth))
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def median_of(found: dict[str, Any], name: str) -> float | None:
    """The median of a measurement, None where it was skipped or not reached."""
    return found.get(name, {}).get("median")


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def kept(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures that were measured."""
    return {name: value for name, value in figures.items() if value is not None}


def mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
