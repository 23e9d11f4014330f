"""Where the time of one `act` goes, stage by stage, for every adapted policy.

Every stage is charged with its own time, without that of stages inside it; what belongs to none is "host" (Python,
the rule that unmasks, copies). So stages add up to the whole call. On a GPU every border between stages waits for the
device, and CUDA graphs are not used, which makes the sum larger than a call without profiling: both are reported. A
third reading there takes the times at the same borders without waiting, as some papers do: it books what the device
still works on to whatever the host launches next, and stands there for comparison only.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.progress import progress_bar
from burnish.core.provenance import machine
from burnish.core.types import Batch
from burnish.data.dataset import open_dataset
from burnish.policies import load_policy
from burnish.policies.base import Policy
from burnish.policies.keys import TASK
from burnish.runtime.executor import Runtime
from burnish.runtime.observations import observations
from burnish.sampling.passes import without_graphs

STAGES = ("preprocess", "vision", "prompt", "passes", "head", "postprocess", "host")


@dataclass
class Anatomy:
    """One profiled call.

    Args:
        total: milliseconds from call to return.
        stages: milliseconds by stage, "passes" all of them together.
        passes: milliseconds of every forward pass after the prompt's.
        positions: token positions fed to the model for each sample, those of the prompt included.
    """

    total: float
    stages: dict[str, float]
    passes: list[float]
    positions: int


class Clock:
    """Charges time to the innermost open stage; with `wait` False what the host took to launch it."""

    def __init__(self, device: torch.device, wait: bool = True):
        self.device, self.wait = device, wait
        self.spent: dict[str, float] = {}
        self.open: list[str] = []
        self.passes = 0
        self._since = 0.0

    def now(self) -> float:
        """Milliseconds, when the device is idle."""
        if self.device.type == "cuda" and self.wait:
            torch.cuda.synchronize(self.device)
        return 1000 * time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        name = self._resolve(name)
        self._charge()
        self.open.append(name)
        try:
            yield
        finally:
            self._charge()
            self.open.pop()

    def _resolve(self, name: str) -> str:
        inside_pass = next((stage for stage in self.open if stage.startswith("pass ")), None)
        if name == "prompt":
            if inside_pass is not None:
                return inside_pass
            if "prompt" not in self.spent and "prompt" not in self.open:
                return name
            name = "pass"
        if name == "pass":
            self.passes += 1
            return f"pass {self.passes}"
        return name

    def _charge(self) -> None:
        now = self.now()
        if self.open:
            self.spent[self.open[-1]] = self.spent.get(self.open[-1], 0.0) + now - self._since
        self._since = now


@contextmanager
def instrumented(policy: Policy | Runtime, clock: Clock, positions: list[int]) -> Iterator[None]:
    """Inside, the policy's stages report to `clock`; the positions of every pass, all rows, go to `positions`."""
    with ExitStack() as stack:
        for stage in policy.stages():
            timed = _timed(clock, stage.name, getattr(stage.owner, stage.call))
            stack.enter_context(patch.object(stage.owner, stage.call, timed))
        for module in policy.token_counters():
            handle = module.register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[:-1].numel()))
            stack.callback(handle.remove)
        yield


def _timed(clock: Clock, name: str, function: Callable) -> Callable:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.stage(name):
            return function(*args, **kwargs)

    return timed


def dissect(policy: Policy | Runtime, batch: Batch, wait: bool = True) -> Anatomy:
    """One call of `act`, stage by stage; see Clock for `wait`."""
    clock, positions = Clock(policy.device, wait), []
    with without_graphs(), instrumented(policy, clock, positions):
        begin = clock.now()
        with clock.stage("host"):
            policy.act(batch)
        total = clock.now() - begin
    passes = [clock.spent[f"pass {i + 1}"] for i in range(clock.passes)]
    stages = {name: clock.spent.get(name, 0.0) for name in STAGES}
    return Anatomy(total, {**stages, "passes": sum(passes)}, passes, sum(positions) // len(batch[TASK]))


@dataclass
class Profile:
    """Figures of many calls; see `figures`."""

    calls: list[Anatomy] = field(default_factory=list)
    launched: list[Anatomy] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    chunk_size: int = 0
    n_action_steps: int = 0

    def figures(self) -> dict[str, Any]:
        """What was measured, in milliseconds unless the name says otherwise.

        "total" is of undisturbed calls, "profiled_total" of dissected ones, whose stages are given; the first action
        is there with the whole chunk unless the policy's decoder sends finished control steps on. "launched" is of a
        GPU: shares of the stages where no border waits for the device, beside "shares", where each does.
        """
        longest = max(len(call.passes) for call in self.calls)
        total = quantiles(self.plain)
        unsynchronised = {"launched": shares(self.launched), "shares": shares(self.calls)} if self.launched else {}
        return {
            **unsynchronised,
            "calls": len(self.calls),
            "total": total,
            "first_action": quantiles(self.first or self.plain),
            "actions_per_second": 1000 * self.n_action_steps / total["median"],
            "replans_per_second": 1000 / total["median"],
            "actions_executed_of_a_chunk": self.n_action_steps,
            "chunk_size": self.chunk_size,
            "passes": 1 + float(np.median([len(call.passes) for call in self.calls])),
            "rows": float(np.median([call.positions for call in self.calls])),
            "profiled_total": quantiles([call.total for call in self.calls]),
            "stages": {name: quantiles([call.stages[name] for call in self.calls]) for name in STAGES},
            "each_pass": [quantiles([call.passes[i] for call in self.calls if i < len(call.passes)])
                          for i in range(longest)],
            "stages_over_total": float(np.mean([sum(call.stages.values()) for call in self.calls])
                                       / np.mean([call.total for call in self.calls])),
        }  # fmt: skip


def shares(calls: list[Anatomy]) -> dict[str, float]:
    """Each stage's part of all calls together."""
    whole = sum(call.total for call in calls)
    return {name: sum(call.stages[name] for call in calls) / whole for name in STAGES}


def quantiles(values: list[float]) -> dict[str, float]:
    median, p95, p99 = np.quantile(values, [0.5, 0.95, 0.99])
    return {"median": float(median), "p95": float(p95), "p99": float(p99)}


def profile_policy(path: Path | str, *, overrides: dict[str, Any] | None = None, data: Path | str = "",
                   batch_size: int = 1, repeats: int = 30, warmup: int = 3, device: str = "", threads: int = 0,
                   tier: str = "", fps: float = 0.0, progress: bool = True) -> dict[str, Any]:  # fmt: skip
    """Figures of a policy's latency, with all that they depend on, as JSON holds them; see `Profile.figures`.

    Args:
        data: LeRobot data set whose observations are used; "" takes random images.
        batch_size: observations in a call.
        repeats, warmup: see `profile`.
        device: torch device; "" means a GPU where there is one.
        threads: CPU threads, from here on in this process; 0 leaves torch's own number.
        tier: run it through the executor, see `executor.TIERS`; "" as it is.
        fps: control steps a second, for "control_steps", what p95 of a call comes to; 0 means those of `data`.

    Raises:
        BurnishError: a number out of range, or a policy that cannot be loaded.
    """
    numbers = {"batch_size": (batch_size, 1), "repeats": (repeats, 1), "warmup": (warmup, 0), "threads": (threads, 0)}
    for name, (value, least) in numbers.items():
        if value < least:
            raise BurnishError(f"{name} {value}", f"at least {least}")
    if threads:
        torch.set_num_threads(threads)
    policy = load_policy(path, overrides=overrides, device=device)
    place = str(policy.device)
    batches = [observations(policy, batch_size, data, seed) for seed in range(8)]
    run = Runtime(policy, tier=tier) if tier else policy
    measured = profile(run, batches, repeats=repeats, warmup=warmup, progress=progress)
    decoder = policy.decoder[0] if policy.supports("tokens") else None
    figures = measured.figures()
    fps = fps or (open_dataset(data).fps if data else 0.0)
    return {
        "policy": str(path), "type": policy.name, "batch_size": batch_size, "decoder": decoder, "tier": tier,
        "threads": torch.get_num_threads(), "device": place, "machine": machine(place), **figures,
        **launches(run, batches[0]), "fps": fps, "control_steps": math.ceil(figures["total"]["p95"] * fps / 1000),
    }  # fmt: skip


@torch.no_grad()
def launches(policy: Policy | Runtime, batch: Batch) -> dict[str, Any]:
    """ "launches": kernels that a call launches on a GPU, one by one, and "device_ms", how long they run: a call that
    takes much longer waits for its launches. On a CPU operators, nested ones too.
    """
    kinds, on_gpu = torch.profiler.ProfilerActivity, policy.device.type == "cuda"
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])], acc_events=True) as found:
        policy.act(batch)
        if on_gpu:
            torch.cuda.synchronize(policy.device)
    events = found.key_averages()
    names = ("cudaLaunch", "cuLaunch") if on_gpu else ("aten::",)
    device = {"device_ms": sum(event.self_device_time_total for event in events) / 1000} if on_gpu else {}
    return {"launches": sum(event.count for event in events if event.key.startswith(names)), **device}


def profile(
    policy: Policy | Runtime, batches: list[Batch], *, repeats: int = 30, warmup: int = 3, progress: bool = True
) -> Profile:
    """Time `repeats` undisturbed calls of `act`, each followed by a dissected one on the same batch.

    Args:
        policy: in evaluation mode afterwards.
        batches: used in turn.
        repeats: calls of either kind.
        warmup: calls before them that do not count (allocation, compilation).
    """
    policy.eval()
    clock = Clock(policy.device)
    streams = policy.supports("tokens") and policy.token_model().time_ordered  # before the chunk is whole
    for i in range(warmup):
        policy.act(batches[i % len(batches)])  # first: `auto` is to choose its plan as it will run
        dissect(policy, batches[i % len(batches)])
    result = Profile(chunk_size=policy.chunk_size, n_action_steps=policy.n_action_steps)
    for i in progress_bar(range(repeats), desc="profiling", unit="call", shown=progress):
        batch = batches[i % len(batches)]
        begin = clock.now()
        policy.act(batch)
        result.plain.append(clock.now() - begin)
        result.calls.append(dissect(policy, batch))
        if clock.device.type == "cuda":
            result.launched.append(dissect(policy, batch, wait=False))
        if streams:
            result.first.append(_first_action(policy, batch, clock))
    return result


def _first_action(policy: Policy, batch: Batch, clock: Clock) -> float:
    heard: list[float] = []

    def note(_steps: int, _actions: Tensor) -> None:
        if not heard:
            heard.append(clock.now())

    begin = clock.now()
    policy.act(batch, stream=note)
    return (heard[0] if heard else clock.now()) - begin
