"""Processes beside this one: tasks go in, results come out, whatever goes wrong arrives as one error.

A worker is a generator function. It takes its tasks as an iterable and yields one result for each; what it needs from
task to task (a simulator, an open file) are its own variables. Called with a list, it works in this process.

    def powers(tasks, exponent):
        for number in tasks:
            yield number**exponent

    with WorkerPool(powers, 3, count=2) as pool:
        cubes = {number: result for number, result in pool.run(range(10))}

Processes are spawned, because a rendering context does not survive a fork: worker, arguments, tasks and results must
be picklable, and a script that starts a pool needs the usual `if __name__ == "__main__":`. Another engine may run them
elsewhere (`burnish.core.cluster`).
"""

import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from burnish.core.errors import BurnishError

MOST_WORKERS = 1024
MOST_DEATHS = 3
"""So often a worker is replaced, where its engine can."""
GRACE = 2.0
"""Seconds in which processes may end by themselves before they are stopped."""
DONE, REFUSED, FAILED = "done", "refused", "failed"

Worker = Callable[..., Generator[Any, None, None]]
log = logging.getLogger("burnish")


class Gone(Exception):
    """A worker has ended; the text says how, `fix` what may help."""

    def __init__(self, how: str, fix: str = ""):
        super().__init__(how)
        self.fix = fix


def count_workers(wanted: int = 0) -> int:
    """`wanted`, or where it is 0 one for each core that this process may use; BurnishError below 0 or beyond sense."""
    if not 0 <= wanted <= MOST_WORKERS:
        raise BurnishError(f"{wanted} workers", f"at most {MOST_WORKERS}, or 0 for one for each core")
    return wanted or len(os.sched_getaffinity(0))


class WorkerPool(AbstractContextManager):
    """Workers that run one generator function; each works through its own tasks in the order in which they came.

    An error of a worker (a RuntimeError where it is a fault of ours, with its traceback as a note), or the death of its
    process, is raised by the next `send` or `receive`; the pool is of no use afterwards. An engine that can replaces
    a dead worker instead, see `lost`. A process ends when the pool is closed or its parent dies; Ctrl-C does not
    reach it.

    Args:
        worker: generator function, importable by name: `worker(tasks, *arguments)`.
        arguments: the rest of its arguments, equal in every process.
        name: what a worker is called in messages.
        fix: what to do where one died; added to that message.
        engine: where they run; processes of this machine by default.
    """

    def __init__(
        self, worker: Worker, *arguments: Any, count: int, name: str = "process", fix: str = "",
        engine: "Engine | None" = None,
    ):  # fmt: skip
        self.name, self.fix = name, fix
        self._sent: list[deque[tuple[Any, str]]] = [deque() for _ in range(count)]
        self._deaths = [0] * count
        self._crew = (engine or Engine()).start(worker, arguments, count)

    def __len__(self) -> int:
        return len(self._sent)

    def idle(self) -> list[int]:
        """Numbers of the workers that have answered all their tasks."""
        return [number for number, tasks in enumerate(self._sent) if not tasks]

    def send(self, number: int, task: Any, label: str = "") -> None:
        """Give worker `number` a task; `label` names the task in messages."""
        self._sent[number].append((task, label or str(task)))
        try:
            self._crew.send(number, task)
        except Gone:
            while True:  # earlier answers, then why it stopped
                self._answer(number)

    def receive(self) -> list[tuple[int, Any, Any]]:
        """Wait for at least one answer; (worker number, task, result) of each worker that has one.

        None at all where a worker was replaced meanwhile.
        """
        found = [(number, self._answer(number)) for number in self._crew.ready()]
        return [(number, *answer) for number, answer in found if answer is not None]

    def run[T](self, tasks: Iterable[T], label: Callable[[T], str] = str) -> Iterator[tuple[T, Any]]:
        """(task, result) of every task, in the order in which they end."""
        todo = iter(tasks)
        for number, task in zip(self.idle(), todo, strict=False):
            self.send(number, task, label(task))
        while len(self.idle()) < len(self):
            for number, task, result in self.receive():
                for following in islice(todo, 1):
                    self.send(number, following, label(following))
                yield task, result

    def lost(self, number: int, tasks: list[tuple[Any, str]]) -> None:
        """A new worker has taken the place of a dead one, whose unanswered tasks (and labels) it is given again."""
        for task, label in tasks:
            self.send(number, task, label)

    def _answer(self, number: int) -> tuple[Any, Any] | None:
        try:
            outcome, value = self._crew.answer(number)
        except Gone as gone:
            self._replace(number, gone)
            return None
        if outcome == REFUSED:
            raise BurnishError(value)
        if outcome == FAILED:
            said, trace = value
            tasks = "; ".join(label for _, label in self._sent[number]) or "nothing"
            error = RuntimeError(f"{self.name} {number} failed while it held {tasks}: {said}")
            error.add_note(trace)
            raise error
        return self._sent[number].popleft()[0], value

    def _replace(self, number: int, gone: Gone) -> None:
        tasks = list(self._sent[number])
        found = f"{self.name} {number} {gone} while it held {'; '.join(label for _, label in tasks) or 'nothing'}"
        self._deaths[number] += 1
        if self._deaths[number] > MOST_DEATHS or not self._crew.replace(number):
            raise BurnishError(found, fix="; ".join(filter(None, (self.fix, gone.fix)))) from None
        log.warning("%s; a new one takes its place", found)
        self._sent[number].clear()
        self.lost(number, tasks)

    def close(self) -> None:
        """End all workers; one that is busy for longer than a moment is stopped in the middle of its task."""
        self._crew.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class Engine(AbstractContextManager):
    """Where workers run: here as processes beside this one. Open it (`with`) around the pools that use it."""

    def __exit__(self, *_: object) -> None: ...

    def count(self, wanted: int = 0) -> int:
        """How many workers `wanted` means, where 0 stands for as many as there is room for; BurnishError for more."""
        return count_workers(wanted)

    def start(self, worker: Worker, arguments: tuple[Any, ...], count: int) -> "Crew":
        return Processes(worker, arguments, count)


class Crew(Protocol):
    """The workers of a pool by number; each answers its tasks in the order in which they came.

    `ready` waits for numbers that have an answer or have ended. An answer is DONE and the result, REFUSED and a line,
    FAILED and (what, traceback). `send` and `answer` may raise Gone; `replace` says whether there is a new one then.
    """

    def send(self, number: int, task: Any) -> None: ...
    def ready(self) -> list[int]: ...
    def answer(self, number: int) -> tuple[str, Any]: ...
    def replace(self, number: int) -> bool: ...
    def close(self) -> None: ...


class Processes:
    """A crew of spawned processes, each at the other end of a pipe."""

    def __init__(self, worker: Worker, arguments: tuple[Any, ...], count: int):
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self.processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, worker, arguments), daemon=True)
            process.start()
            theirs.close()  # so that a dead process shows as the end of its pipe
            self._connections.append(ours)
            self.processes.append(process)

    def send(self, number: int, task: Any) -> None:
        try:
            self._connections[number].send(task)
        except (BrokenPipeError, ConnectionResetError):
            raise Gone("has ended") from None

    def ready(self) -> list[int]:
        ready = set(wait(self._connections))
        return [number for number, connection in enumerate(self._connections) if connection in ready]

    def answer(self, number: int) -> tuple[str, Any]:
        try:
            return self._connections[number].recv()
        except (EOFError, ConnectionResetError):
            process = self.processes[number]
            process.join(5)
            memory = "fewer --workers if memory ran out" if process.exitcode == -signal.SIGKILL else ""
            raise Gone(f"ended with exit code {process.exitcode}", memory) from None

    def replace(self, number: int) -> bool:
        return False

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + GRACE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            process.terminate()
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()


def _work(connection: Connection, worker: Worker, arguments: tuple[Any, ...]) -> None:
    """Body of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    with ExitStack() as stack:
        stack.push(partial(report, partial(_answered, connection)))
        for result in stack.enter_context(closing(worker(_tasks(connection), *arguments))):
            if not _answered(connection, DONE, result):
                break


def _tasks(connection: Connection) -> Iterator[Any]:
    with suppress(EOFError, ConnectionResetError):  # the parent has closed the pool, or is gone
        while True:
            yield connection.recv()


def _answered(connection: Connection, outcome: str, value: Any) -> bool:
    """Whether there was still somebody to hear it."""
    try:
        connection.send((outcome, value))
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def report(answer: Callable[[str, Any], Any], kind: type | None, error: BaseException | None, trace: object) -> bool:
    """Hand the error that leaves a block to `answer`, and end it there."""
    if isinstance(error, BurnishError):
        answer(REFUSED, str(error))
    elif error is not None:
        said = f"{type(error).__name__}: {error}"
        answer(FAILED, (said, "".join(traceback.format_exception(error)).rstrip()))
    return True
