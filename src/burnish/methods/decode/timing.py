"""How long a decode takes: synchronised, warmed up, in milliseconds of the clock."""

import statistics
import time
from typing import Any

import torch

from burnish.policies.rows import Decode, PromptRows, RowModel


def time_decoder(
    decode: Decode, prompt: PromptRows, model: RowModel, repeats: int = 5, warmup: int = 1
) -> dict[str, Any]:
    """Median time of a chunk and to its first control step, which a decoder may send on before the rest is there.

    Returns:
        ms, p95, first_step_ms, passes, rows, host_syncs and the ids [L] of the first sample.
    """
    for _ in range(warmup):
        decode(prompt)
    times, firsts = [], []
    for _ in range(repeats):
        times.append(run_once(decode, prompt))
        if model.time_ordered:
            firsts.append(first_step(decode, prompt))
    decoded = decode(prompt)
    return {
        "ms": statistics.median(times), "p95": sorted(times)[int(0.95 * (len(times) - 1) + 0.5)],
        "first_step_ms": statistics.median(firsts or times), "passes": decoded.passes, "rows": decoded.rows,
        "host_syncs": decoded.host_syncs, "ids": decoded.ids[0].tolist(),
    }  # fmt: skip


def run_once(decode: Decode, prompt: PromptRows) -> float:
    """Milliseconds of one decode."""
    _wait(prompt.states.device)
    begin = time.perf_counter()
    decode(prompt)
    _wait(prompt.states.device)
    return 1000 * (time.perf_counter() - begin)


def first_step(decode: Decode, prompt: PromptRows) -> float:
    """Milliseconds until the first control step is final, while the whole chunk is being decoded."""
    told: list[float] = []
    _wait(prompt.states.device)
    begin = time.perf_counter()
    decode(prompt, stream=lambda steps, ids: told.append(time.perf_counter()))
    return 1000 * (told[0] - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
