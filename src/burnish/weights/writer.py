"""Writes folders of safetensors: whole or absent, with checksums, in threads and flat memory.

A plan says which tensors lie in which file; `compute(name, start, stop)` gives their bits block by block. Everything
lands in a hidden folder beside the target, which is renamed at the end. An error removes it, and what a killed writer
left is removed by the next one: nothing half-written is ever seen under the target's name.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from burnish.core.errors import BurnishError
from burnish.core.files import disk_errors, put_folder, remove_folder, require_space, write_json
from burnish.core.outputs import MARK, claim, kind_of, require_own
from burnish.core.progress import progress_bar
from burnish.core.reading import read_object, regular_file
from burnish.weights.tensorfile import BLOCK, Digests, TensorInfo, blocks, make_header, pieces

Compute = Callable[[str, int, int], np.ndarray]
"""compute(name, start, stop) -> stored bits of elements start:stop of the flattened tensor; called from any thread,
which is done with them before it calls again."""
MOST_THREADS = 256
PART = "unfinished task vector or merge"
"""What the marker of a hidden folder says while it is filled."""
_FLUSH = 1 << 27
"""Bytes after which what is written is sent on to the disk, while the next ones are computed: otherwise most of it
would wait in memory for the end, and the disk be idle until then."""


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    Args:
        target: the folder that appears at the end.
        files: file name to (tensors in their order, metadata).
        identity: anything JSON-able that fixes the result.
        summary: name of the JSON file that tells what the folder holds, see `write_summary`.
        kind: what the folder's marker says that it holds.
        copies: further files, target name to source, copied as they are.
        inputs: what is read; the target may not be one of them, nor hold one.
    """

    target: Path
    files: Mapping[str, tuple[Mapping[str, TensorInfo], dict[str, str]]]
    identity: Any
    summary: str
    kind: str
    copies: Mapping[str, Path] = field(default_factory=dict)
    inputs: Sequence[Path] = ()

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: info for tensors, _ in self.files.values() for name, info in tensors.items()}

    @property
    def nbytes(self) -> int:
        copied = sum(source.stat().st_size for source in self.copies.values())
        return copied + sum(info.nbytes for info in self.tensors.values())

    @property
    def seal(self) -> str:
        """Short form of `identity`, kept with the result."""
        return _seal(self.identity)

    def is_done(self) -> bool:
        """Whether the target is there, whole, and was written for this very identity."""
        if not all((self.target / name).is_file() for name in (self.summary, *self.files, *self.copies)):
            return False
        return read_summary(self.target / self.summary, "an untouched folder").get("identity") == self.seal

    def is_ours(self, folder: Path) -> bool:
        """Whether an earlier version, which set no marker, wrote `folder`: its summary is there, as it was written."""
        try:
            read_summary(folder / self.summary, "")
        except BurnishError:
            return False
        return True


@contextmanager
def output_folder(plan: Plan, force: bool = False) -> Iterator[Path]:
    """Hand out the hidden folder, empty; on leaving it becomes `plan.target` atomically, on an error it vanishes.

    Raises:
        BurnishError: the target exists (with `force`: and is none of ours), cannot be a folder, is or holds an input,
            another process is writing it, or there is too little room.
    """
    _check_target(plan, force)
    target, part = plan.target, part_folder(plan.target)
    with claim(part, PART), disk_errors(target):
        try:
            _check_target(plan, force)  # whoever held the folder before may have finished
            _empty(part)
            require_space(target.absolute().parent, plan.nbytes, f"{target}")
            yield part
            put_folder(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        write_json(target / MARK, {"kind": plan.kind})
    remove_folder(target.with_name(f".{target.name}.old"))


def part_folder(target: Path) -> Path:
    """Where a folder lies until it is whole."""
    return target.with_name(f".{target.name}.part")


def _check_target(plan: Plan, force: bool) -> None:
    target = Path(os.path.abspath(plan.target))
    if target.is_symlink() or (target.exists() and not force):
        raise BurnishError(f"{plan.target} exists", "a new folder", "another -o, or --force to replace one that "
                           "burnish wrote")  # fmt: skip
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir() or (target.exists() and not target.is_dir()):
        raise BurnishError(f"-o {plan.target}: {target if target.exists() else above} is a file", "a new folder")
    for path in (*plan.inputs, Path.cwd()):
        if target.resolve() in (path.resolve(), *path.resolve().parents):
            raise BurnishError(f"-o {plan.target} would replace {path}", "a folder that holds no input", "another -o")
    kind = PART if kind_of(target) == PART else plan.kind  # a writer killed just after it renamed
    require_own(target, kind, plan.is_ours)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == MARK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_tensors(
    plan: Plan, folder: Path, compute: Compute, threads: int, label: str, step: int = BLOCK
) -> dict[str, str]:
    """Write every file of `plan` into `folder`; returns the digest of each tensor.

    Args:
        compute: gives the bits of one block. Blocks of one piece come in order from one thread, pieces in any order.
        threads: how many pieces at the same time.
        step: elements of a block.
    """
    for name, source in plan.copies.items():
        regular_file(source)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    digests, tensors = Digests(), plan.tensors
    with ExitStack() as stack:
        placed = _open_files(plan, folder, stack)

        def write_piece(name: str, start: int, stop: int) -> tuple[int, int]:
            handle, first = placed[name]
            for at, end in blocks(start, stop, step):
                bits = compute(name, at, end)
                digests.add(name, at, bits)
                _write(handle, bits, first + at * bits.itemsize)
            return handle, (stop - start) * tensors[name].stored.itemsize

        total, unflushed = sum(info.nbytes for info in tensors.values()), dict.fromkeys(dict(placed.values()), 0)
        bar = stack.enter_context(progress_bar(total=total, desc=label, unit="B", unit_scale=True))
        pool = ThreadPoolExecutor(threads)
        stack.callback(pool.shutdown, cancel_futures=True)  # the first error stops the rest
        jobs = [pool.submit(write_piece, name, *piece) for name, info in tensors.items() for piece in pieces(info.size)]
        for job in as_completed(jobs):
            handle, nbytes = job.result()
            bar.update(nbytes)
            unflushed[handle] += nbytes
            if unflushed[handle] >= _FLUSH:
                unflushed[handle] = 0
                os.fsync(handle)
    return {name: digests.of(name, info) for name, info in tensors.items()}


def _open_files(plan: Plan, folder: Path, stack: ExitStack) -> dict[str, tuple[int, int]]:
    """Make every file with its header and its full length; tensor name to (open file, place of its first byte)."""
    placed: dict[str, tuple[int, int]] = {}
    for file, (tensors, metadata) in plan.files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)  # an index may name shards in folders of their own
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        stack.callback(os.close, handle)
        header, offsets = make_header(tensors, metadata)
        os.ftruncate(handle, len(header) + sum(info.nbytes for info in tensors.values()))
        _write(handle, np.frombuffer(header, np.uint8), 0)
        placed |= {name: (handle, offset) for name, offset in offsets.items()}
    return placed


def _write(handle: int, bits: np.ndarray, offset: int) -> None:
    view = memoryview(bits).cast("B") if bits.size else memoryview(b"")
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def cores(threads: int) -> int:
    """`threads`, or as many as there are cores this process may use (at most 8) for 0."""
    if not 0 <= threads <= MOST_THREADS:
        raise BurnishError(f"--threads {threads}", f"0 (one for each core) to {MOST_THREADS}")
    return threads or min(8, len(os.sched_getaffinity(0)))


def write_summary(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    """A JSON file of the folder, with a digest over its own content in `sealed`."""
    write_json(folder / name, {**value, "sealed": _seal(value)})


def read_summary(path: Path, what: str) -> dict[str, Any]:
    """Inverse of `write_summary`; refuses a file that is missing, unreadable or edited."""
    value = read_object(path, path.parent)
    if "sealed" not in value:
        raise BurnishError(f"{path} carries no seal", what)
    if value.pop("sealed") != _seal(value):
        raise BurnishError(f"{path} was changed after it was written", "an untouched file", "make it again")
    return value


def _seal(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()
