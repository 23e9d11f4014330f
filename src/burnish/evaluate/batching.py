"""The policy's side of an evaluation: observations in, chunks out, one padded batch at a time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from burnish.core.errors import BurnishError
from burnish.core.seeding import generator
from burnish.core.types import Batch, Chunk, Draws
from burnish.data.watchdog import Watchdog
from burnish.envs.base import EnvSpec, Observation, Size
from burnish.policies.base import Policy
from burnish.policies.keys import RULER
from burnish.runtime.caches import Reuse
from burnish.runtime.executor import Runtime


@dataclass(frozen=True)
class Request:
    """One row of a batch: what the policy sees, and what its noise is derived from."""

    observation: Observation
    task: str
    initial_state: int
    replan: int
    rest: Any = None  # of a late policy: evaluate.delay.Plan


class BatchedPolicy:
    """Calls `policy.act` on batches of one fixed width, so that a result does not depend on who shares the batch.

    A matrix product may differ in its last bit between batch widths, and a last bit can decide an episode: rows
    that are missing are filled with copies of the last one. The same holds for the length to which texts are padded,
    where a policy pads to the longest of the batch: one more row, whose text is as long as can be, settles it.
    Noise is drawn for every row by itself.

    Args:
        policy: the policy; put into evaluation mode.
        cameras: the policy's camera name to the environment's.
        width: requests in a call; it has one more row.
        n_action_steps: how many actions of each chunk are executed.

    Attributes:
        runner: who is called, the policy itself or the executor of it.
        reuse: old pictures that it acts on; None where it always sees the present.
        watchdog: measures how far what it sees is from its training set; None means that nobody does.
        distances: by task and initial state: that of every replan so far.
    """

    def __init__(self, policy: Policy, cameras: dict[str, str], seed: int, width: int, n_action_steps: int):
        if not 1 <= n_action_steps <= policy.act_steps:
            raise BurnishError(f"{n_action_steps} action steps", f"1 to {policy.act_steps}, the policy's chunk")
        self.policy = policy.eval()
        self.runner: Policy | Runtime = policy
        self.reuse: Reuse | None = None
        self.watchdog: Watchdog | None = None
        self.distances: dict[tuple[str, int], list[float]] = {}
        self.cameras = cameras
        self.seed, self.width, self.n_action_steps = seed, width, n_action_steps
        parameter = next(policy.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self._warm = False

    def act(self, requests: Sequence[Request]) -> tuple[np.ndarray, float]:
        """Actions [n, n_action_steps, A] for n <= width requests, and the milliseconds that the call took."""
        chunk, elapsed = self.timed(requests)
        return chunk.actions[: len(requests), : self.n_action_steps].float().cpu().numpy(), elapsed

    def sample(self, rows: Sequence[Request], batch: Batch, draws: Draws) -> Chunk:
        """The policy's chunks for a whole batch of rows."""
        return self.runner.act(batch, draws)

    def timed(self, requests: Sequence[Request]) -> tuple[Chunk, float]:
        """Chunks of all rows, those of the requests first, and the milliseconds that the call took."""
        rows = [*requests, *[requests[-1]] * (self.width + 1 - len(requests))]
        batch = self._batch([row.observation for row in rows])
        batch["task"][-1] = RULER
        draws = self._draws(rows)
        there = batch
        if self.reuse is not None:
            for request in requests:
                if not request.replan:  # of an episode whose simulator died too
                    self.reuse.forget((request.task, request.initial_state))
            batch, due = self.reuse.look([(request.task, request.initial_state) for request in requests], batch)
        if not self._warm:  # the first call allocates and compiles; it would distort the latency
            self.sample(rows, batch, draws)
            self._warm = True
        self._synchronise()
        start = time.perf_counter()
        chunk = self.sample(rows, batch, draws)
        self._synchronise()
        elapsed = 1000 * (time.perf_counter() - start)
        if self.reuse is not None:  # while a robot would execute the chunk
            self.reuse.compare(due, chunk, lambda: self.sample(rows, there, draws))
        if not torch.isfinite(chunk.actions[: len(requests)]).all():
            raise BurnishError("the policy returned actions that are not finite", "numbers", "check the checkpoint")
        if self.watchdog is not None:
            self._watch(self.watchdog, requests, rows[: self.width])
        return chunk, elapsed

    def _watch(self, watchdog: Watchdog, requests: Sequence[Request], rows: Sequence[Request]) -> None:
        """`rows` are as many in every call, for the same reason as those of the policy."""
        views = {name: [r.observation.images[camera] for r in rows] for name, camera in self.cameras.items()}
        for request, far in zip(requests, watchdog(views).tolist(), strict=False):
            seen = self.distances.setdefault((request.task, request.initial_state), [])
            seen[request.replan :] = [far]  # an episode whose simulator died begins again

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _batch(self, observations: list[Observation]) -> Batch:
        def stacked(read: Callable[[Observation], np.ndarray]) -> torch.Tensor:
            rows = [[read((*o.earlier, o)[step - 1]) for step in self.policy.window.observations] for o in observations]
            array = np.array(rows)
            return torch.from_numpy(array if array.shape[1] > 1 else array[:, 0]).to(self.device)

        batch: Batch = {"observation.state": stacked(lambda o: o.state), "task": [o.instruction for o in observations]}
        for name, camera in self.cameras.items():
            images = stacked(lambda o, camera=camera: o.images[camera])
            batch[f"observation.images.{name}"] = images.movedim(-1, -3).float() / 255
        return batch

    def _draws(self, rows: list[Request]) -> Draws:
        each = [self.policy.draw(1, generator(self.seed, row.task, row.initial_state, row.replan)) for row in rows]
        draws = Draws(torch.cat([d.noise for d in each]), torch.cat([d.time for d in each]))
        return draws.to(self.device)


def match_cameras(policy: Policy, spec: EnvSpec, cameras: Sequence[str] | None) -> dict[str, str]:
    """The policy's camera names to the environment's: by order where `cameras` is given, by name otherwise."""
    chosen = tuple(cameras) if cameras else policy.cameras
    unknown = [c for c in chosen if c not in spec.cameras]
    if unknown or len(chosen) != len(policy.cameras):
        raise BurnishError(
            f"cameras {', '.join(chosen)} for a policy that sees {', '.join(policy.cameras)}",
            f"one of {', '.join(spec.cameras)} for each camera of the policy",
            "--cameras (in a recipe eval.cameras) with the environment's cameras in the policy's order",
        )
    return dict(zip(policy.cameras, chosen, strict=True))


def view_sizes(policy: Policy, cameras: Sequence[str] | None) -> Size:
    """The size of the images that the policy was trained on, for the environment's cameras (see `match_cameras`)."""
    sizes: dict[str, list[int]] = {}
    for name, camera in zip(policy.cameras, cameras or policy.cameras, strict=False):
        size = list(policy.view_sizes[name])
        if sizes.setdefault(camera, size) != size:
            raise BurnishError(f"camera {camera} for views of {sizes[camera]} and {size} pixels", "one size",
                               f"--image-size {max(size)}")  # fmt: skip
    first = next(iter(sizes.values()))
    if any(size != first for size in sizes.values()):
        return sizes
    return first[0] if first[0] == first[1] else first
