"""Requests of all clients meet here: one thread owns the policy and answers as many at once as wait.

The noise of a request is drawn from its own seed, so an answer does not depend on who shares its batch; with a fixed
width not even in its last bit.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError, for_client
from burnish.core.types import Draws
from burnish.data.watchdog import Watchdog
from burnish.policies.base import Policy
from burnish.policies.keys import RULER, TASK
from burnish.policies.pretrained import foreign
from burnish.runtime.caches import Reuse
from burnish.runtime.executor import Runtime
from burnish.runtime.serve.metrics import Metrics
from burnish.runtime.serve.rows import Row, stack
from burnish.runtime.serve.wire import LATE
from burnish.sampling.steering import Steering

MOST_WAITING = 64
log = logging.getLogger("burnish")


class Busy(BurnishError):
    """Not now: no room, no time, or the server is going down."""


@dataclass(frozen=True)
class Answer:
    """What a request gets.

    Args:
        actions: float32 [T, A] in environment units.
        raw: the same in the model's own space, [T, A_model], of a policy that can go on from it.
        infer, queued: seconds that its batch took, and that it waited before.
        rows: requests in the batch.
        distance: from what the policy was trained on, where a watchdog looks.
    """

    actions: np.ndarray
    raw: Tensor | None = None
    infer: float = 0.0
    queued: float = 0.0
    rows: int = 1
    distance: float | None = None


@dataclass(frozen=True)
class Old:
    """What is left of a session's last chunk: `rest` [n, A_model], of which the first `delay` rows are committed."""

    rest: Tensor
    delay: int


@dataclass(frozen=True, eq=False, repr=False)
class _Request:
    row: Row
    seed: int
    prefix: np.ndarray | None
    old: Old | None
    key: Hashable
    deadline: float
    future: "asyncio.Future[Answer]"
    since: float = field(default_factory=time.perf_counter)

    @property
    def kind(self) -> tuple[int, bool]:
        """Requests of one kind can share a call."""
        return 0 if self.prefix is None else len(self.prefix), self.old is not None


class Batcher:
    """One policy for many clients.

    Args:
        policy: put into evaluation mode; called in `thread` alone.
        thread: an executor with one worker.
        metrics: told of every batch.
        width: requests in a call.
        wait: seconds that a request waits for one more, and only while more clients are connected than ask.
        mode: how a chunk goes on from an old one, see `Steering`.
        exact: every call has `width` rows (copies fill it) and one more, whose text is as long as can be: a matrix
            product may differ in its last bit between widths, and texts are padded to the longest.
        runner: who is called, the executor of the policy; None means the policy itself.
        reuse: lets it act on old pictures.
        watchdog: measures how far each request is from what the policy was trained on.
    """

    def __init__(self, policy: Policy, thread: Executor, metrics: Metrics, width: int = 8, wait: float = 0.003,
                 exact: bool = False, mode: Literal["guided", "inpaint", "trained"] = "guided",
                 runner: Policy | Runtime | None = None, reuse: Reuse | None = None,
                 watchdog: Watchdog | None = None):  # fmt: skip
        self.policy, self.thread, self.metrics = policy.eval(), thread, metrics
        self.width, self.wait, self.exact, self.mode = width, wait, exact, mode
        self.runner: Policy | Runtime = runner or policy
        self.reuse, self.watchdog, self.clients = reuse, watchdog, 0
        self._after: Callable[[], None] | None = None
        self._pending: deque[_Request] = deque()
        self._arrived = asyncio.Event()

    async def submit(self, row: Row, seed: int, prefix: np.ndarray | None = None, old: Old | None = None,
                     deadline: float = 600.0, key: Hashable = None) -> Answer:  # fmt: skip
        """The answer to a row whose noise `seed` seeds; when cancelled the request leaves the queue.

        Args:
            row: what is seen.
            seed: of its noise.
            prefix: [P, A] actions that are committed, which the chunk continues.
            old: the chunk that this one goes on from.
            deadline: seconds after which nobody wants an answer any more.
            key: of the session, for `reuse`.

        Raises:
            BurnishError: the policy cannot act on it; Busy: the queue is full, or the deadline has passed.
        """
        if len(self._pending) >= MOST_WAITING:
            raise Busy(f"the server is busy: {MOST_WAITING} requests wait", "fewer", "the same call later")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        request = _Request(row, seed, prefix, old, key, time.perf_counter() + deadline, future)
        self._pending.append(request)
        self._arrived.set()
        try:
            return await future
        finally:
            if request in self._pending:  # `remove` would print a request that is not there, pictures and all
                self._pending.remove(request)

    async def run(self) -> None:
        """Answer for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await self._gather()
            batch = self._take()
            if not batch:
                continue
            start = time.perf_counter()
            found = await loop.run_in_executor(self.thread, self._answers, batch)
            spent = time.perf_counter() - start
            self.metrics.batch(len(batch), spent, [start - one.since for one in batch])
            for one, answer in zip(batch, found, strict=True):
                if one.future.done():  # the client has left
                    continue
                if isinstance(answer, BurnishError):
                    one.future.set_exception(answer)
                else:
                    timed = replace(answer, infer=spent, queued=start - one.since, rows=len(batch))
                    one.future.set_result(timed)
            if self._after is not None:  # while the chunks are executed
                await asyncio.sleep(0)
                await loop.run_in_executor(self.thread, self._compare)

    def _compare(self) -> None:
        """A comparison that fails ends the use of old pictures, see `Reuse.compare`, and not the server."""
        after, self._after = self._after, None
        assert after is not None  # noqa: S101 - asked before
        try:
            with foreign("old pictures could not be compared", "a policy that acts on the present ones"):
                after()
        except Exception as error:  # noqa: BLE001 - `for_client` raises what is no lack of memory
            log.warning("%s", for_client(error, "a comparison of old pictures"))

    async def _gather(self) -> None:
        """Wait for others who may ask: as long as they keep coming, but no request longer than four times `wait`."""
        end = time.perf_counter() + 4 * self.wait
        while self._pending and len(self._pending) < min(self.width, self.clients):
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), min(self.wait, end - time.perf_counter()))
            except TimeoutError:
                break

    def _take(self) -> list[_Request]:
        """The next batch: the oldest request, and those of its kind behind it."""
        now, batch, others = time.perf_counter(), [], []
        while self._pending and len(batch) < self.width:
            one = self._pending.popleft()
            if one.future.done():
                continue
            if one.deadline < now:
                one.future.set_exception(Busy(LATE, "an answer in time", "fewer clients"))
            elif batch and one.kind != batch[0].kind:
                others.append(one)
            else:
                batch.append(one)
        self._pending.extendleft(reversed(others))
        if self._pending:
            self._arrived.set()
        else:
            self._arrived.clear()
        return batch

    def _answers(self, batch: list[_Request]) -> Sequence[Answer | BurnishError]:
        """Whatever is wrong with one row is told to its owner alone."""
        rows, seeds = [one.row for one in batch], [one.seed for one in batch]
        prefix = None if batch[0].prefix is None else np.stack([p for one in batch if (p := one.prefix) is not None])
        try:
            found = self.act(rows, seeds, prefix, [one.old for one in batch if one.old], [one.key for one in batch])
        except Exception as error:  # noqa: BLE001 - as above
            told, found = for_client(error), []
            if len(batch) == 1:
                return [told]
        if not found:  # behind `except`, where the tensors of the failed call have gone
            return [answer for one in batch for answer in self._answers([one])]
        broken = BurnishError("the policy returned actions that are not finite", "numbers", "another checkpoint")
        return [one if np.isfinite(one.actions).all() else broken for one in found]

    def act(self, rows: Sequence[Row], seeds: Sequence[int], prefix: np.ndarray | None = None,
            old: Sequence[Old] = (), keys: Sequence[Hashable] = ()) -> list[Answer]:  # fmt: skip
        """Answers to rows, none or all of which go on from an `old` chunk; in the policy's thread only."""
        policy, count = self.policy, len(rows)
        order = list(range(count)) + [count - 1] * (self.width + 1 - count if self.exact else 0)
        with foreign("the policy cannot act on this", "an observation like those it was trained on"):
            batch = stack(policy, [rows[i] for i in order])
            if self.exact:
                batch[TASK] = [*batch[TASK][:-1], RULER]  # type: ignore[list-item]
            draws = _draws(policy, [seeds[i] for i in order])
            more: dict[str, Any] = {}
            if prefix is not None:
                more["prefix"] = torch.from_numpy(prefix[order]).to(policy.device)
            if old:
                more["steering"] = self._steering([old[i] for i in order])
            there, reuse = batch, self.reuse if keys else None
            if reuse is not None:
                batch, due = reuse.look(keys, batch)
            chunk = self.runner.act(batch, draws, **more)
            if reuse is not None and due:
                self._after = lambda: reuse.compare(due, chunk, lambda: self.runner.act(there, draws, **more))
            far: list[float | None] = [None] * count
            if self.watchdog is not None:
                far = self.watchdog({c: [rows[i].images[c][-1] for i in order] for c in policy.cameras}).tolist()
            actions, raw = chunk.actions.float().cpu().numpy(), chunk.raw
            return [Answer(actions[i], None if raw is None else raw[i].cpu(), distance=far[i]) for i in range(count)]

    def _steering(self, old: Sequence[Old]) -> Steering:
        longest = max(len(one.rest) for one in old)
        rest = torch.stack([torch.nn.functional.pad(one.rest, (0, 0, 0, longest - len(one.rest))) for one in old])
        ends = torch.tensor([len(one.rest) for one in old])  # the rows beyond pull at nothing
        return Steering(rest.to(self.policy.device), torch.tensor([one.delay for one in old]), ends, mode=self.mode)


def _draws(policy: Policy, seeds: Sequence[int]) -> Draws:
    each = [policy.draw(1, torch.Generator().manual_seed(seed)) for seed in seeds]
    draws = Draws(torch.cat([d.noise for d in each]), torch.cat([d.time for d in each]))
    return draws.to(policy.device)
