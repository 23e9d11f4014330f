"""Keeps every slot of a simulator pool busy and the policy's batches full."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from burnish.envs.base import Observation
from burnish.evaluate.batching import BatchedPolicy, Request
from burnish.evaluate.records import Journal, Record
from burnish.evaluate.simulators import Episode, Finished, Lost, SimulatorPool, Waiting


class Scheduler[T]:
    """Runs episodes through a pool; a finished one's slot takes the next at once.

    Half of the slots may wait for the policy while the other half simulates: the policy is called when its batch is
    full, or when nobody is left to wait for. A subclass says what it keeps of an episode (T) and what comes of it.
    """

    def __init__(self, pool: SimulatorPool, policy: BatchedPolicy | None, slots: int):
        self.pool, self.policy, self.slots = pool, policy, slots
        self.running: dict[int, T] = {}
        self.waiting: deque[Waiting] = deque()

    def episode(self, run: T) -> Episode:
        """What the simulator is to do."""
        raise NotImplementedError

    def request(self, run: T, observation: Observation) -> Request:
        """What the policy is asked."""
        raise NotImplementedError

    def planned(self, run: T, chunk: np.ndarray, milliseconds: float) -> np.ndarray:
        """Notes the policy's chunk [T, A]; returns what is executed."""
        raise NotImplementedError

    def finished(self, run: T, reply: Finished, progress: Any) -> None:
        """Notes the outcome."""

    def again(self, run: T) -> T:
        """The same run before its start: its simulator process died, and the pool has a new one."""
        raise NotImplementedError

    def received(self, reply: Waiting) -> None:
        self.waiting.append(reply)

    def run(self, runs: Iterable[T], progress: Any) -> None:
        todo, free = deque(runs), deque(range(self.slots))
        while todo or self.running:
            while todo and free:
                slot, run = free.popleft(), todo.popleft()
                self.running[slot] = run
                self.pool.start(slot, self.episode(run))
            for reply in self.pool.poll():
                if isinstance(reply, Finished):
                    free.append(reply.slot)
                    self.finished(self.running.pop(reply.slot), reply, progress)
                    progress.update()
                elif isinstance(reply, Lost):
                    self._repeat(reply.slot)
                else:
                    self.received(reply)
            while self.policy and self.waiting:
                everyone_waits = len(self.waiting) == len(self.running) and not (todo and free)
                if len(self.waiting) < self.policy.width and not everyone_waits:
                    break
                self._replan(self.policy)

    def _repeat(self, slot: int) -> None:
        self.waiting = deque(one for one in self.waiting if one.slot != slot)
        run = self.running[slot] = self.again(self.running[slot])
        self.pool.start(slot, self.episode(run))

    def ask(self, asked: list[Request]) -> tuple[Sequence[Any], float]:
        """The policy's answers, and the milliseconds that they took."""
        return self.policy.act(asked)

    def _replan(self, policy: BatchedPolicy) -> None:
        waiting = [self.waiting.popleft() for _ in range(min(policy.width, len(self.waiting)))]
        runs = [self.running[one.slot] for one in waiting]
        asked = [self.request(run, one.observation) for one, run in zip(waiting, runs, strict=True)]
        actions, milliseconds = self.ask(asked)
        for one, run, chunk in zip(waiting, runs, actions, strict=True):
            self.pool.act(one.slot, self.planned(run, chunk, milliseconds))


@dataclass
class Planned:
    """An episode of an evaluation and the milliseconds of its replans so far."""

    episode: Episode
    latency_ms: list[float] = field(default_factory=list)


class Measurement(Scheduler[Planned]):
    """Writes each episode into a journal as it ends; `stamp` are the fields that all records share."""

    def __init__(self, pool: SimulatorPool, policy: BatchedPolicy | None, slots: int, journal: Journal, stamp: dict):
        super().__init__(pool, policy, slots)
        self.journal, self.stamp = journal, stamp

    def episode(self, run: Planned) -> Episode:
        return run.episode

    def request(self, run: Planned, observation: Observation) -> Request:
        return Request(observation, run.episode.task, run.episode.initial_state, len(run.latency_ms))

    def again(self, run: Planned) -> Planned:
        return Planned(run.episode)

    def planned(self, run: Planned, chunk: np.ndarray, milliseconds: float) -> np.ndarray:
        run.latency_ms.append(round(milliseconds, 3))
        return chunk

    def extras(self, run: Planned, reply: Finished) -> dict[str, Any]:
        """Further fields of its record."""
        return {}

    def distances(self, run: Planned) -> tuple[float, ...]:
        """How far from its training set the policy was, where a watchdog looked."""
        key = run.episode.task, run.episode.initial_state
        return tuple(self.policy.distances.pop(key, ())) if self.policy else ()

    def finished(self, run: Planned, reply: Finished, progress: Any) -> None:
        self.journal.append(Record(
            task=run.episode.task, initial_state=run.episode.initial_state, success=reply.success, steps=reply.steps,
            latency_ms=tuple(run.latency_ms), instruction=reply.instruction, other_success=reply.other_success,
            failure=reply.failure, distances=self.distances(run), **self.stamp, **self.extras(run, reply),
        ))  # fmt: skip
        if self.policy and self.policy.reuse:
            self.policy.reuse.forget((run.episode.task, run.episode.initial_state))
        records = self.journal.records
        progress.set_postfix_str(f"success {sum(r.success for r in records)}/{len(records)}", refresh=False)
