"""Output folders: each carries our marker, and one process at a time writes into it.

A folder that holds files but no marker of the expected kind is somebody's work: nothing in it is touched. The marker is
also what a writer locks; the system releases the lock when its holder ends, however that happens.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from burnish.core.errors import BurnishError
from burnish.core.files import alone, disk_errors, make_folder, put_folder
from burnish.core.reading import read_object, regular_file

MARK = ".burnish.json"
DEEPEST = 8
"""Folders in each other that may hold outputs of ours before the first marker."""
Old = Callable[[Path], bool]
SIGNS = {
    "page": (b"<title>", "· burnish".encode()), "figure": (b"\x89PNG", b"Matplotlib"),
    "vector figure": (b"<svg", b"Matplotlib"),
    "anchor": (b"__metadata__", b"base_hash"), "profile": (b'"profiled_total"', b'"stages"'),
    "table of decoders": (b'"decoders"', b'"policy"'), "table of scores": (b"burnish policy verify score",),
    "choice of a sampler": (b'"sampler"', b'"observations_hash"'),
    "inspection": (b'"delta"', b'"norm"', b'"groups"'),
}  # fmt: skip
"""Kinds of single files, and what an earlier one holds near its beginning."""
WHOLE = {
    "a data set": ("meta/info.json",), "questions": ("questions.jsonl", "images.npy"), "a task vector": ("delta.json",),
    "a policy": ("config.json", "model.safetensors"), "an adapter": ("adapter_config.json",),
    "a policy in shards": ("config.json", "model.safetensors.index.json"),
}  # fmt: skip
"""Folders that are complete as they are, by files that each holds."""
_LOOK = 2**20
log = logging.getLogger("burnish")
_held: dict[str, int] = {}


@contextmanager
def claim(folder: Path, kind: str, old: Old | None = None) -> Iterator[Path]:
    """Make `folder` where it is missing, mark it as ours, and keep other processes out until the block ends.

    A block inside another one of the same folder and process only passes through. A folder that was made here and into
    which nothing was written goes again.

    Args:
        kind: what it holds, e.g. "training run".
        old: tells a folder of an earlier version, which had no marker, by its files.

    Raises:
        BurnishError: the folder is a file, lies below one or may not be written; it holds something else than `kind`;
            another process is writing it.
    """
    folder = Path(folder)
    require_own(folder, kind, old)
    key = os.path.realpath(folder)
    if key in _held:
        _held[key] += 1
        try:
            yield folder
        finally:
            _held[key] -= 1
        return
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    handle = _locked(folder)
    try:
        _write_mark(handle, folder, kind)
        _held[key] = 1
        yield folder
    finally:
        _held.pop(key, None)
        if missing:
            _remove_unused(folder, missing)
        os.close(handle)


@contextmanager
def new_output(root: Path, kind: str) -> Iterator[Path]:
    """Fill `<root>.partial`, claimed and handed out; on leaving it becomes `root` atomically, on an error it vanishes.

    Args:
        root: absent or empty.
        kind: as for `claim`, of both folders.
    """
    require_own(root, kind)
    partial = root.with_name(root.name + ".partial")
    with claim(partial, kind), disk_errors(root):
        try:
            if root.is_dir() and os.listdir(root):
                raise BurnishError(f"another process has just made {root}", fix="the same command again")
            yield partial
            if root.exists():
                root.rmdir()
            put_folder(partial, root)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def share(folder: Path, kind: str, old: Old | None = None) -> None:
    """Make `folder` where it is missing and mark it as ours; several processes may write different parts of it."""
    require_own(folder, kind, old)
    with alone(folder), disk_errors(folder):
        if kind_of(folder) != kind:
            mark(folder, kind)


def require_own(folder: Path, kind: str, old: Old | None = None) -> None:
    """Raise BurnishError unless `folder` is absent, empty, marked as `kind`, or holds nothing but folders that are.

    See `claim`.
    """
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)
    except (OSError, ValueError) as error:  # too long a name, a null byte, no way through
        reason = getattr(error, "strerror", None) or error
        raise BurnishError(f"{str(folder)[:100]!r} can be no folder ({reason})", "another output") from None
    above = next((one for one in (folder, *folder.absolute().parents) if os.path.lexists(one)), folder)
    usable = above.is_dir() or not os.path.lexists(above)
    if not usable:
        what = "a link to nothing" if above.is_symlink() and not above.exists() else "a file"
        raise BurnishError(f"{above} is {what}", f"a folder for the {kind}", "another output")
    if not folder.is_dir() or kind_of(folder) != kind:
        require_outside(folder)
    if not folder.is_dir():
        return
    with disk_errors(folder):
        names = sorted(os.listdir(folder))
    found = kind_of(folder)
    if not set(names) - {MARK} or found == kind:
        return
    if MARK not in names and (_holds_outputs_only(folder) or (old is not None and old(folder))):
        return
    shown = f'what burnish made as "{found}"' if found else ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    article = "an" if kind[0] in "aeiou" else "a"
    raise BurnishError(f"{folder} holds {shown}, which this would overwrite",
                       f"a new or empty folder, or {article} {kind}", "another output")  # fmt: skip


def require_file(path: Path, kind: str) -> None:
    """Raise BurnishError unless `path` is free for a file of ours, or holds an earlier one of its kind."""
    path = Path(path)
    try:
        missing = not os.path.lexists(path)
    except ValueError as error:  # a null byte
        raise BurnishError(f"{str(path)[:100]!r} can be no file ({error})", "another output") from None
    require_outside(path)
    if missing:
        return
    if path.is_dir():
        raise BurnishError(f"{path} is a folder", "a file", "a name in it")
    with disk_errors(path), open(regular_file(path), "rb") as file:
        begin = file.read(_LOOK)
    if begin and not all(sign in begin for sign in SIGNS[kind]):
        raise BurnishError(f"{path} holds something else, which this would overwrite",
                           f"no file, or an earlier {kind}", "another output")  # fmt: skip


def require_outside(path: Path) -> None:
    """Raise BurnishError where `path` would lie in a folder that is whole (see `WHOLE`), save in a hidden one there."""
    real = Path(os.path.realpath(path))
    for folder in real.parents:
        what = next((what for what, files in WHOLE.items() if all(os.path.isfile(folder / f) for f in files)), "")
        if what and not real.relative_to(folder).parts[0].startswith("."):
            raise BurnishError(f"{path} would lie in {what} ({folder})", "a place outside of it", "another output")


def kind_of(folder: Path) -> str:
    """What the marker of `folder` says that it holds; "" without one."""
    path = Path(folder) / MARK
    if not path.is_file() or path.stat().st_size == 0:
        return ""
    return str(read_object(path).get("kind", ""))


def mark(folder: Path, kind: str) -> None:
    """Put our marker into a folder that is being made (and will be renamed into its place)."""
    (folder / MARK).write_text(json.dumps({"kind": kind}) + "\n", encoding="utf-8")


def _holds_outputs_only(folder: Path, depth: int = 0) -> bool:
    """Whether there is no file in `folder` but in folders that carry a marker: runs/x with an evaluation in it."""
    with disk_errors(folder), os.scandir(folder) as entries:
        return depth < DEEPEST and all(
            entry.is_dir(follow_symlinks=False)
            and (os.path.isfile(os.path.join(entry.path, MARK)) or _holds_outputs_only(Path(entry.path), depth + 1))
            for entry in entries
        )


def _locked(folder: Path) -> int:
    """The marker of `folder`, open and locked."""
    path = folder / MARK
    while True:
        make_folder(folder)
        try:
            with disk_errors(folder):
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise BurnishError(f"{path} cannot be opened ({error.strerror})", "a regular file") from None
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BurnishError(f"{path} is no file", "a regular file")
            _lock(handle, folder)
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # whoever held it has just removed its folder


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BurnishError(f"another process is writing {folder}", "one at a time",
                           "wait for it, or another output") from None  # fmt: skip
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        log.warning("the file system of %s knows no locks: let no other process write there", folder)


def _write_mark(handle: int, folder: Path, kind: str) -> None:
    if kind_of(folder) != kind:
        with disk_errors(folder):
            content = (json.dumps({"kind": kind}) + "\n").encode()
            os.ftruncate(handle, 0)
            if os.pwrite(handle, content, 0) < len(content):
                os.ftruncate(handle, 0)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)


def _remove_unused(folder: Path, made: list[Path]) -> None:
    """Remove a folder that holds nothing but the marker, and those that were made above it."""
    with suppress(OSError):
        if os.listdir(folder) == [MARK]:
            os.unlink(folder / MARK)
            for one in made:
                one.rmdir()
