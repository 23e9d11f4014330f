"""Output folders: each carries our marker, and one process at a time writes into it.

A folder that holds files but no marker of the expected kind is somebody's work: nothing in it is touched. The marker is
also what a writer locks; the system releases the lock when its holder ends, however that happens.
"""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from burnish.core.errors import BurnishError
from burnish.core.files import disk_errors, make_folder
from burnish.core.reading import read_object

MARK = ".burnish.json"
log = logging.getLogger("burnish")
_held: dict[str, int] = {}


@contextmanager
def claim(folder: Path, kind: str, old: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Make `folder` where it is missing, mark it as ours, and keep other processes out until the block ends.

    A block inside another one of the same folder and process only passes through.

    Args:
        folder: the output folder.
        kind: what it holds, e.g. "training run".
        old: tells a folder of an earlier version, which had no marker, by its files.

    Raises:
        BurnishError: the folder is a file, lies below one or may not be written; it holds something else than `kind`;
            another process is writing it.
    """
    folder = Path(folder)
    key = os.path.realpath(folder)
    if key in _held:
        _held[key] += 1
        try:
            yield folder
        finally:
            _held[key] -= 1
        return
    require_own(folder, kind, old)
    make_folder(folder)
    with disk_errors(folder):
        handle = os.open(folder / MARK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(handle, folder)
        _write_mark(handle, folder, kind)
        _held[key] = 1
        yield folder
    finally:
        _held.pop(key, None)
        os.close(handle)


def require_own(folder: Path, kind: str, old: Callable[[Path], bool] | None = None) -> None:
    """Raise BurnishError unless `folder` is absent, empty, or marked as `kind`; see `claim`."""
    above = next((one for one in (folder, *folder.absolute().parents) if one.exists()), folder)
    if above.exists() and not above.is_dir():
        raise BurnishError(f"{above} is a file", f"a folder for the {kind}", "another output")
    if not folder.is_dir():
        return
    with disk_errors(folder):
        names = sorted(os.listdir(folder))
    if not set(names) - {MARK} or kind_of(folder) == kind or (MARK not in names and old is not None and old(folder)):
        return
    found = kind_of(folder)
    shown = f'what burnish made as "{found}"' if found else ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    article = "an" if kind[0] in "aeiou" else "a"
    raise BurnishError(f"{folder} holds {shown}, which this would overwrite",
                       f"a new or empty folder, or {article} {kind}", "another output")  # fmt: skip


def kind_of(folder: Path) -> str:
    """What the marker of `folder` says that it holds; "" without one."""
    path = Path(folder) / MARK
    if not path.is_file() or path.stat().st_size == 0:
        return ""
    return str(read_object(path).get("kind", ""))


def mark(folder: Path, kind: str) -> None:
    """Put our marker into a folder that is being made (and will be renamed into its place)."""
    (folder / MARK).write_text(json.dumps({"kind": kind}) + "\n", encoding="utf-8")


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
            os.ftruncate(handle, 0)
            os.pwrite(handle, (json.dumps({"kind": kind}) + "\n").encode(), 0)
            os.fsync(handle)
