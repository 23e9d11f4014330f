"""Keeps every slot of a simulator pool busy and the policy's batches full."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from burnish.evaluate.batching import BatchedPolicy, Request
from burnish.evaluate.records import Journal, Record
from burnish.evaluate.simulators import Episode, Finished, SimulatorPool, Waiting


@dataclass
class _InFlight:
    episode: Episode
    latency_ms: list[float] = field(default_factory=list)


class Scheduler:
    """Runs planned episodes through a pool; a finished episode's slot takes the next one at once.

    Half of the slots may wait for the policy while the other half simulates: the policy is called when its
    batch is full, or when nobody is left to wait for.
    """

    def __init__(self, pool: SimulatorPool, todo: list[Episode], slots: int, journal: Journal, stamp: dict):
        self.pool, self.journal, self.stamp = pool, journal, stamp
        self.todo = deque(todo)
        self.free = deque(range(slots))
        self.in_flight: dict[int, _InFlight] = {}
        self.waiting: deque[Waiting] = deque()

    def run(self, policy: BatchedPolicy | None, progress: Any) -> None:
        while self.todo or self.in_flight:
            while self.todo and self.free:
                slot, episode = self.free.popleft(), self.todo.popleft()
                self.in_flight[slot] = _InFlight(episode)
                self.pool.start(slot, episode)
            for reply in self.pool.poll():
                if isinstance(reply, Finished):
                    self.finish(reply, progress)
                else:
                    self.waiting.append(reply)
            while policy and self.waiting and self.batch_is_due(policy.width):
                self.replan(policy)

    def batch_is_due(self, width: int) -> bool:
        everyone_waits = len(self.waiting) == len(self.in_flight) and not (self.todo and self.free)
        return len(self.waiting) >= width or everyone_waits

    def replan(self, policy: BatchedPolicy) -> None:
        waiting = [self.waiting.popleft() for _ in range(min(policy.width, len(self.waiting)))]
        runs = [self.in_flight[one.slot] for one in waiting]
        actions, elapsed = policy.act(
            [
                Request(one.observation, run.episode.task, run.episode.initial_state, len(run.latency_ms))
                for one, run in zip(waiting, runs, strict=True)
            ]
        )
        for one, run, chunk in zip(waiting, runs, actions, strict=True):
            run.latency_ms.append(round(elapsed, 3))
            self.pool.act(one.slot, chunk)

    def finish(self, reply: Finished, progress: Any) -> None:
        run = self.in_flight.pop(reply.slot)
        self.free.append(reply.slot)
        self.journal.append(
            Record(
                task=run.episode.task,
                initial_state=run.episode.initial_state,
                success=reply.success,
                steps=reply.steps,
                latency_ms=tuple(run.latency_ms),
                instruction=reply.instruction,
                other_success=reply.other_success,
                **self.stamp,
            )
        )
        records = self.journal.records
        progress.set_postfix_str(f"success {sum(r.success for r in records)}/{len(records)}", refresh=False)
        progress.update()
