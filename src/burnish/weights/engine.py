"""Writes folders of safetensors tensor by tensor: in parallel, whole or absent, resumable, with checksums.

Everything lands in a hidden folder beside the target, with a journal of finished tensors. It is renamed at the end. A
killed run leaves the hidden folder; the same command goes on from it. An error removes it.
"""

import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from burnish.core.errors import BurnishError
from burnish.core.files import disk_errors, make_folder, put_folder, remove_folder, require_space, write_json
from burnish.weights.processes import run_apart, worth_it
from burnish.weights.rounding import Narrow
from burnish.weights.tensorfile import (
    BLOCK,
    PIECE,
    Slot,
    TensorFile,
    digest_of,
    header_bytes,
    pieces,
    raw_dtype,
    tensor_digest,
)

JOURNAL = "journal.jsonl"
_PATIENCE = 30
"""Tenths of a second to wait for another writer of the same folder."""
_FLUSH = 1 << 27
"""Bytes after which what is written is sent on to the disk, while the next ones are computed: otherwise most of it
would wait in memory for the end, and the disk be idle until then."""


class Worker:
    """Buffers of one thread."""

    def __init__(self):
        self.narrow = Narrow()
        self._doubles: list[np.ndarray] = []
        self._spare = [np.empty(BLOCK * 8, np.uint8) for _ in range(2)]
        self._out = np.empty(PIECE * 8, np.uint8)  # pages that are never touched cost nothing

    def double(self, index: int, size: int) -> np.ndarray:
        """float64 scratch block number `index`."""
        while len(self._doubles) <= index:
            self._doubles.append(np.empty(BLOCK))
        return self._doubles[index][:size]

    def spare(self, index: int, dtype: str, size: int) -> np.ndarray:
        """Room for the stored bits of a block, number 0 or 1."""
        bits = raw_dtype(dtype)
        return self._spare[index][: size * bits.itemsize].view(bits)

    def out(self, dtype: str, size: int) -> np.ndarray:
        """Room for the stored bits of a piece."""
        bits = raw_dtype(dtype)
        return self._out[: size * bits.itemsize].view(bits)


class Maker(Protocol):
    """What the engine asks of a command."""

    def piece(self, worker: Worker, name: str, start: int, stop: int) -> np.ndarray:
        """Stored bits of elements start:stop of the flattened output `name`."""

    def release(self, name: str, start: int, stop: int) -> None:
        """Called when a piece is written: its inputs are not needed any more."""

    def finished(self, name: str) -> dict[str, Any]:
        """Called when all pieces of `name` are written; what it returns is kept in the journal."""

    def restore(self, name: str, facts: dict[str, Any]) -> None:
        """Called instead of `piece` for an output that an earlier, killed run has finished."""


@dataclass
class Plan:
    """What is to be written.

    Args:
        target: the folder that appears at the end.
        files: file name to (tensor name to (dtype, shape), metadata).
        identity: anything JSON-able that fixes the result; an earlier run is continued only if it is equal.
        copies: further files, target name to source, copied as they are.
        inputs: what is read; the target may not be one of them, nor hold one.
    """

    target: Path
    files: dict[str, tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]]
    identity: Any
    copies: dict[str, Path] = field(default_factory=dict)
    inputs: Sequence[Path] = ()

    def seal(self) -> str:
        """Short form of `identity`, kept with the result."""
        return _seal(self.identity)

    def is_done(self, summary: str, force: bool) -> bool:
        """Whether the target is there, whole, and was written for this very identity."""
        if force or not all((self.target / name).is_file() for name in (summary, *self.files, *self.copies)):
            return False
        return read_summary(self.target / summary, "an untouched folder").get("identity") == self.seal()

    def nbytes(self) -> int:
        tensors = sum(s.nbytes for slots, _ in self.files.values() for s in header_bytes(slots, {})[1].values())
        return tensors + sum(source.stat().st_size for source in self.copies.values())


def part_folder(target: Path) -> Path:
    """Where a folder lies until it is whole."""
    return target.with_name(f".{target.name}.part")


@contextmanager
def filling(plan: Plan, force: bool = False) -> Iterator[Path]:
    """Hand out the hidden folder; on leaving it becomes `plan.target`, on an error it vanishes, on Ctrl-C it stays.

    Raises:
        BurnishError: the target exists, cannot be a folder, is or holds an input, or another process is writing it.
    """
    _check_target(plan, force)
    target, part = plan.target, part_folder(plan.target)
    make_folder(part)
    with _only_writer(part, target):
        try:
            _check_target(plan, force)  # whoever held the folder before may have finished
            state, identity = part / "plan.json", json.dumps(plan.identity).encode()
            if not state.is_file() or state.read_bytes() != identity:
                _empty(part)
            written = sum(file.stat().st_blocks * 512 for file in part.rglob("*") if file.is_file())
            require_space(target.absolute().parent, max(0, plan.nbytes() - written), f"{target}")
            with disk_errors(target):
                state.write_bytes(identity)
                yield part
                for name in (state.name, JOURNAL):
                    (part / name).unlink(missing_ok=True)
                put_folder(part, target)
        except KeyboardInterrupt:
            raise  # what is there is kept, to go on from
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    remove_folder(target.with_name(f".{target.name}.old"))


def _check_target(plan: Plan, force: bool) -> None:
    target = Path(os.path.abspath(plan.target))
    if target.is_symlink() or (target.exists() and not force):
        raise BurnishError(f"{plan.target} exists", "a new folder", "another -o, or --force to replace a folder")
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir() or (target.exists() and not target.is_dir()):
        raise BurnishError(f"-o {plan.target}: {target if target.exists() else above} is a file", "a new folder")
    for path in (*plan.inputs, Path.cwd()):
        if target.resolve() in (path.resolve(), *path.resolve().parents):
            raise BurnishError(f"-o {plan.target} would replace {path}", "a folder that holds no input", "another -o")


@contextmanager
def _only_writer(part: Path, target: Path) -> Iterator[None]:
    """Hold a lock on the hidden folder; processes of a writer that was just killed may take a moment to let go."""
    handle = os.open(part, os.O_RDONLY)
    try:
        for _ in range(_PATIENCE):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
            if part.is_dir() and os.fstat(handle).st_ino == part.stat().st_ino:
                yield
                return
            break  # its holder has finished and moved it away
        raise BurnishError(f"another process is writing {target}", "one at a time", "wait for it, or another -o")
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_tensors(
    plan: Plan, part: Path, maker: Maker, threads: int, label: str, apart: bool = False
) -> dict[str, str]:
    """Write every file of `plan` into `part`; returns the digest of each tensor.

    Args:
        threads: how many at once.
        apart: tensors share no state in `maker`, so that processes may take the place of threads.
    """
    for name, source in plan.copies.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, part / name)
    writer = Writer(plan, part, maker)
    try:
        if apart and worth_it(writer, threads):
            run_apart(writer, threads, label)
        else:
            writer.run(threads, label)
    finally:
        writer.close()
    return writer.digests


class Writer:
    """Output files with what is still to be written to them."""

    def __init__(self, plan: Plan, part: Path, maker: Maker):
        self.maker, self.part = maker, part
        self.handles: list[int] = []
        self.where: dict[str, tuple[int, Slot]] = {}
        self.digests: dict[str, str] = {}
        self._found: dict[str, dict[int, bytes]] = {}
        self._missing: dict[str, int] = {}
        self._lock, self._local, self._stop = threading.Lock(), threading.local(), threading.Event()
        self._unflushed: dict[int, int] = {}
        self._flusher, self._flushes = ThreadPoolExecutor(1), []
        done = _journal(part)
        for file, (slots, metadata) in plan.files.items():
            self._open(part / file, slots, metadata, done)
        self._journal = open(part / JOURNAL, "a")  # noqa: SIM115  closed in close()

    def _open(self, path: Path, slots: dict, metadata: dict[str, str], done: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)  # an index may name shards in folders of their own
        header, placed = header_bytes(slots, metadata)
        end = len(header) + sum(slot.nbytes for slot in placed.values())
        whole = path.is_file() and path.stat().st_size == end
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.handles.append(handle)
        os.ftruncate(handle, end)
        os.pwrite(handle, header, 0)
        earlier = TensorFile(path) if whole and any(name in done for name in slots) else None
        for name, slot in placed.items():
            # After a power cut the journal may be ahead of the data, so the data is asked.
            if earlier is not None and name in done and tensor_digest(earlier, name) == done[name]["digest"]:
                self.digests[name] = done[name]["digest"]
                self.maker.restore(name, done[name]["facts"])
            else:
                self.where[name] = (handle, slot)
                self._found[name], self._missing[name] = {}, sum(1 for _ in pieces(slot.size))

    def run(self, threads: int, label: str) -> None:
        """All pieces through a pool of threads; the first error stops the rest."""
        from tqdm import tqdm

        jobs = [(name, start, stop) for name, (_, slot) in self.where.items() for start, stop in pieces(slot.size)]
        total = sum(slot.nbytes for _, slot in self.where.values())
        with (
            tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr, delay=2, mininterval=0.5) as bar,
            ThreadPoolExecutor(threads, initializer=self.new_worker) as pool,
        ):
            futures = [pool.submit(self.piece, bar, *job) for job in jobs]
            try:
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._cancel(futures)
                raise
            failed = next((f for f in finished if f.exception() is not None), None)
            if failed is not None:
                self._cancel(futures)
                failed.result()
        self.flushed()

    def flushed(self) -> None:
        """Wait for what was sent on to the disk. The system tells a failed write only to the first who asks."""
        for flush in self._flushes:
            flush.result()

    def new_worker(self) -> None:
        """Buffers for the calling thread."""
        self._local.worker = Worker()

    def _cancel(self, futures: list) -> None:
        self._stop.set()
        for future in futures:
            future.cancel()

    def piece(self, bar: Any, name: str, start: int, stop: int) -> None:
        """Make and write elements start:stop of `name`; with the last piece the tensor is noted."""
        if self._stop.is_set():
            return
        bits = self.maker.piece(self._local.worker, name, start, stop)
        handle, slot = self.where[name]
        _write_all(handle, bits, slot.offset + start * slot.itemsize)
        digest = xxhash.xxh3_128(bits).digest()
        self.maker.release(name, start, stop)
        with self._lock:
            self._found[name][start] = digest
            self._missing[name] -= 1
            last = not self._missing[name]
            bar.update(bits.nbytes)
            self._unflushed[handle] = self._unflushed.get(handle, 0) + bits.nbytes
            if self._unflushed[handle] >= _FLUSH:
                self._unflushed[handle] = 0
                self._flushes.append(self._flusher.submit(os.fsync, handle))
        if last:
            self._done(name, slot)

    def _done(self, name: str, slot: Slot) -> None:
        found = [digest for _, digest in sorted(self._found.pop(name).items())]
        digest = digest_of(slot.dtype, slot.shape, found)
        self.note(name, digest, self.maker.finished(name))

    def note(self, name: str, digest: str, facts: dict[str, Any]) -> None:
        """Write a finished tensor into the journal."""
        with self._lock:
            self.digests[name] = digest
            self._journal.write(json.dumps({"name": name, "digest": digest, "facts": facts}) + "\n")
            self._journal.flush()

    def close(self) -> None:
        self._flusher.shutdown(cancel_futures=True)
        self._journal.close()
        for handle in self.handles:
            os.close(handle)


def _write_all(handle: int, bits: np.ndarray, offset: int) -> None:
    view = memoryview(bits).cast("B") if bits.size else memoryview(b"")
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def _journal(part: Path) -> dict[str, Any]:
    """Finished tensors of a killed run by name; a last line that was cut off is left out."""
    found = {}
    if (part / JOURNAL).is_file():
        for line in (part / JOURNAL).read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            found[entry["name"]] = entry
    return found


class Inputs:
    """Digests of what is read, gathered piece by piece; checked against `expected` as each tensor is complete."""

    def __init__(
        self, what: str, shapes: dict[str, tuple[str, tuple[int, ...]]], expected: dict[str, str] | None,
        fix: str = "the very files that were recorded",
    ):  # fmt: skip
        self.what, self.shapes, self.expected, self.fix = what, shapes, expected, fix
        self.digests: dict[str, str] = {}
        self._found: dict[str, dict[int, bytes]] = {}

    def piece(self, name: str, start: int, raw: np.ndarray) -> None:
        self._found.setdefault(name, {})[start] = xxhash.xxh3_128(raw).digest()

    def finish(self, name: str) -> str:
        """The tensor's digest; BurnishError when it is not the expected one."""
        found = [digest for _, digest in sorted(self._found.pop(name).items())]
        self.digests[name] = digest_of(*self.shapes[name], found)
        self.check(name, self.digests[name])
        return self.digests[name]

    def check(self, name: str, digest: str) -> None:
        if self.expected is not None and name in self.expected and digest != self.expected[name]:
            raise BurnishError(f"{self.what} is not the one that was recorded: '{name}' has digest {digest}",
                               self.expected[name], self.fix)  # fmt: skip


def cores(threads: int) -> int:
    """`threads`, or as many as there are cores this process may use (at most 8) for 0."""
    if threads < 0:
        raise BurnishError(f"--threads {threads}", "0 (one for each core) or more")
    return threads or min(8, len(os.sched_getaffinity(0)))


def write_summary(part: Path, name: str, value: Any) -> None:
    """A JSON file of the folder, with a digest over its own content in `sealed`."""
    write_json(part / name, {**value, "sealed": _seal(value)})


def read_summary(path: Path, what: str) -> dict[str, Any]:
    """Inverse of `write_summary`; refuses a file that is missing, unreadable or edited."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        sealed = value.pop("sealed")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BurnishError(f"{path} cannot be read ({error})", what) from error
    if sealed != _seal(value):
        raise BurnishError(f"{path} was changed after it was written", "an untouched file", "make it again")
    return value


def _seal(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()
