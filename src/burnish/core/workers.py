"""Processes beside this one: tasks go in, results come out, whatever goes wrong arrives as one error.

A worker is a generator function. It takes its tasks as an iterable and yields one result for each; what it needs from
task to task (a simulator, an open file) are its own variables. Called with a list, it works in this process.

    def powers(tasks, exponent):
        for number in tasks:
            yield number**exponent

    with WorkerPool(powers, 3, count=2) as pool:
        cubes = {number: result for number, result in pool.run(range(10))}

Processes are spawned, because a rendering context does not survive a fork: worker, arguments, tasks and results must
be picklable, and a script that starts a pool needs the usual `if __name__ == "__main__":`.
"""

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
from typing import Any

from burnish.core.errors import BurnishError

MOST_WORKERS = 1024
GRACE = 2.0
"""Seconds in which processes may end by themselves before they are stopped."""
_DONE, _REFUSED, _FAILED = "done", "refused", "failed"

Worker = Callable[..., Generator[Any, None, None]]


def count_workers(wanted: int = 0) -> int:
    """`wanted`, or where it is 0 one for each core that this process may use; BurnishError below 0 or beyond sense."""
    if not 0 <= wanted <= MOST_WORKERS:
        raise BurnishError(f"{wanted} workers", f"at most {MOST_WORKERS}, or 0 for one for each core")
    return wanted or len(os.sched_getaffinity(0))


class WorkerPool(AbstractContextManager):
    """Processes that run one generator function; each works through its own tasks in the order in which they came.

    An error of a worker (a RuntimeError where it is a fault of ours, with its traceback as a note), or the death of its
    process, is raised by the next `send` or `receive`; the pool is of no use afterwards. A process ends when the pool
    is closed or its parent dies; Ctrl-C does not reach it.

    Args:
        worker: generator function, importable by name: `worker(tasks, *arguments)`.
        arguments: the rest of its arguments, equal in every process.
        count: number of processes.
        name: what a process is called in messages.
        fix: what to do where one died; added to that message.
    """

    def __init__(self, worker: Worker, *arguments: Any, count: int, name: str = "process", fix: str = ""):
        context = multiprocessing.get_context("spawn")
        self.name, self.fix = name, fix
        self._connections: list[Connection] = []
        self._processes = []
        self._sent: list[deque[tuple[Any, str]]] = [deque() for _ in range(count)]
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, worker, arguments), daemon=True)
            process.start()
            theirs.close()  # so that a dead process shows as the end of its pipe
            self._connections.append(ours)
            self._processes.append(process)

    def __len__(self) -> int:
        return len(self._processes)

    def idle(self) -> list[int]:
        """Numbers of the processes that have answered all their tasks."""
        return [number for number, tasks in enumerate(self._sent) if not tasks]

    def send(self, number: int, task: Any, label: str = "") -> None:
        """Give process `number` a task; `label` names the task in messages."""
        self._sent[number].append((task, label or str(task)))
        try:
            self._connections[number].send(task)
        except (BrokenPipeError, ConnectionResetError):
            while True:  # earlier answers, then why it stopped
                self._answer(number)

    def receive(self) -> list[tuple[int, Any, Any]]:
        """Wait for at least one answer; (process number, task, result) of each process that has one."""
        ready = set(wait(self._connections))
        numbers = [number for number, connection in enumerate(self._connections) if connection in ready]
        return [(number, *self._answer(number)) for number in numbers]

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

    def _answer(self, number: int) -> tuple[Any, Any]:
        tasks = "; ".join(label for _, label in self._sent[number]) or "nothing"
        try:
            outcome, value = self._connections[number].recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[number]
            process.join(5)
            found = f"{self.name} {number} ended with exit code {process.exitcode} while it held {tasks}"
            memory = "fewer --workers if memory ran out" if process.exitcode == -signal.SIGKILL else ""
            raise BurnishError(found, fix="; ".join(filter(None, (self.fix, memory)))) from None
        if outcome == _REFUSED:
            raise BurnishError(value)
        if outcome == _FAILED:
            said, trace = value
            error = RuntimeError(f"{self.name} {number} failed while it held {tasks}: {said}")
            error.add_note(trace)
            raise error
        return self._sent[number].popleft()[0], value

    def close(self) -> None:
        """End all processes; one that is busy for longer than a moment is stopped in the middle of its task."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + GRACE
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            process.terminate()
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(connection: Connection, worker: Worker, arguments: tuple[Any, ...]) -> None:
    """Body of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    with ExitStack() as stack:
        stack.push(partial(_report, connection))
        for result in stack.enter_context(closing(worker(_tasks(connection), *arguments))):
            if not _answered(connection, _DONE, result):
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


def _report(connection: Connection, kind: type | None, error: BaseException | None, trace: object) -> bool:
    """Send the error that leaves a block to the parent, and end it there."""
    if isinstance(error, BurnishError):
        _answered(connection, _REFUSED, str(error))
    elif error is not None:
        said = f"{type(error).__name__}: {error}"
        _answered(connection, _FAILED, (said, "".join(traceback.format_exception(error)).rstrip()))
    return True
