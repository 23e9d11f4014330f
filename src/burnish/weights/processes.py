"""Large merges in processes, each with tensors of its own: threads of one Python wait for one another too much.

A child writes into the files that its parent opened and tells it of every finished tensor, which the parent notes in
the journal as if it had finished it itself. A child ends when its parent does.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from burnish.core.errors import BurnishError
from burnish.weights.tensorfile import pieces

if TYPE_CHECKING:
    from burnish.weights.engine import Writer

SMALLEST = 1 << 28
"""Bytes below which starting processes is not worth it."""


def worth_it(writer: "Writer", count: int) -> bool:
    """Whether `count` processes may share what `writer` has to do; children are forks, which only Linux has safely."""
    return count > 1 and sys.platform == "linux" and sum(s.nbytes for _, s in writer.where.values()) >= SMALLEST


def run_apart(writer: "Writer", count: int, label: str) -> None:
    """All tensors of `writer` through `count` processes; the first error stops the rest and is raised here."""
    from tqdm import tqdm

    context = multiprocessing.get_context("fork")
    children: dict[Connection, Any] = {}
    total = sum(slot.nbytes for _, slot in writer.where.values())
    try:
        for names in shares({name: slot.nbytes for name, (_, slot) in writer.where.items()}, count):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(writer, names, theirs, os.getpid()), daemon=True)
            child.start()
            theirs.close()
            children[ours] = child
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr, delay=2, mininterval=0.5) as bar:
            while children:
                for connection in wait(list(children)):
                    _hear(writer, connection, children, bar)
    finally:
        for child in children.values():
            child.terminate()
            child.join()


def shares(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Names in `count` groups of about equal size, each in the order given, none empty."""
    groups: list[tuple[int, list[str]]] = [(0, []) for _ in range(count)]
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        least = min(range(count), key=lambda k: groups[k][0])
        groups[least] = (groups[least][0] + sizes[name], [*groups[least][1], name])
    order = {name: k for k, name in enumerate(sizes)}
    return [sorted(names, key=order.__getitem__) for _, names in groups if names]


def _hear(writer: "Writer", connection: Connection, children: dict[Connection, Any], bar: Any) -> None:
    try:
        message = connection.recv()
    except EOFError:
        child = children.pop(connection)
        connection.close()
        child.join()
        if child.exitcode:
            message, fix = f"a process of the merge died (exit {child.exitcode})", "--threads 1 takes the least memory"
            raise BurnishError(message, fix=fix) from None
        return
    if isinstance(message, BaseException):
        raise message
    if isinstance(message, int):
        bar.update(message)
        return
    name, digest, facts = message
    writer.maker.restore(name, facts)
    writer.note(name, digest, facts)


class _Told:
    """Stands where the progress bar stands in a child."""

    def __init__(self, connection: Connection):
        self.update = connection.send


def _child(writer: "Writer", names: Sequence[str], connection: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    writer.note = lambda *found: connection.send(found)
    writer.new_worker()
    try:
        for name in names:
            for start, stop in pieces(writer.where[name][1].size):
                if os.getppid() != parent:
                    os._exit(1)
                writer.piece(_Told(connection), name, start, stop)
        writer.flushed()
    except (BurnishError, OSError) as error:  # told to the parent, which raises it; anything else ends this process
        connection.send(error)
    connection.close()
