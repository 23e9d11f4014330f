"""Files that are whole or absent: written beside their place, forced to disk, then renamed into it."""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError

log = logging.getLogger("burnish")
_BLOCK = 4096
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("no space left", "os error 28", "disk quota", "file too large", "os error 27", " requested and ")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time make something in `folder`; the others wait, and should look again afterwards."""
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that writes %s", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn "no room" and "not allowed" from any writer inside into one BurnishError that names `target`.

    safetensors and pyarrow raise their own types with the system's words in the message, hence the search for words;
    numpy says how much it "requested and" how much was written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in _FULL or any(word in str(error).lower() for word in _FULL_WORDS):
            found = f"no room left while writing {target}"
            raise BurnishError(found, "free disk space", "free some and repeat") from error
        if isinstance(error, IsADirectoryError):
            raise BurnishError(f"{target} is a folder", "a file, or nothing") from error
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise BurnishError(f"may not write {target}, or not read it", "a place that is yours") from error
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise BurnishError(f"{str(target)[:100]!r}... is too long for a path", "a file or folder") from error
        raise


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise BurnishError unless the disk of `folder` has room for `num_bytes` (plus five per cent)."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes * 1.05:
        raise BurnishError(f"{what} needs {num_bytes / 1e6:.0f} MB but {folder} has {free / 1e6:.0f} MB left",
                           "free disk space", "free some, or write elsewhere")  # fmt: skip


def sync(path: Path) -> None:
    """Force a file's content to disk, or a folder's list of names, so that a rename in it outlives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sampled_digest(path: Path, blocks: int = 64) -> str:
    """16 hex digits of a file's size and of blocks spread over it: tells another file or a cut one in milliseconds."""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        for i in range(blocks):
            file.seek(max(0, size - _BLOCK) * i // max(1, blocks - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; BurnishError where a file is in the way or the system forbids it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BurnishError(f"the folder {folder} cannot be made ({reason})", "a place you can write") from error


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Write the file that is handed out; on leaving it becomes `target` atomically, on an error it vanishes."""
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with disk_errors(target):
            temporary.unlink(missing_ok=True)  # a stranger's folder may have a link of that name
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            sync(temporary)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically; a kill leaves the old content."""
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Fill the folder that is handed out; on leaving it becomes `target` atomically, on an error it vanishes.

    An existing `target` is replaced. What a killed writer left is removed first, save the earlier folder of one that
    was killed between its two renames, which comes back.
    """
    make_folder(target.parent)
    sweep(target.parent, target.name)
    old, temporary = (target.with_name(f".{target.name}.{end}") for end in ("old", "new"))
    with disk_errors(target):
        temporary.mkdir()
    try:
        with disk_errors(target):
            yield temporary
            put_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    remove_folder(old)


def sweep(folder: Path, name: str = "") -> None:
    """Remove what killed writers left of the folder `name` in `folder`, or with "" of any folder in it.

    That is `.<name>.new` and `.<name>.gone`, and `.<name>.old`, which comes back where <name> is missing.
    """
    name = glob.escape(name) or "*"
    for old in folder.glob(f".{name}.old"):
        target = folder / old.name[1:-4]
        if old.is_dir() and not target.exists():
            os.rename(old, target)
    for end in ("old", "new", "gone"):
        for stale in folder.glob(f".{name}.{end}"):
            shutil.rmtree(stale, ignore_errors=True)


def put_folder(temporary: Path, target: Path) -> None:
    """Force a whole folder to disk and rename it to `target`; an earlier one becomes `.<name>.old`.

    A folder of that name is what a writer killed here has left; while `target` is there it is of no use.
    """
    for path in sorted(temporary.rglob("*"), reverse=True):
        sync(path)
    sync(temporary)
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(temporary, target)
    sync(target.absolute().parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill never leaves half of it under its own name."""
    if not folder.exists():
        return
    doomed = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.gone")
    if doomed != folder:
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def point_to(link: Path, name: str) -> None:
    """Let the symbolic link `link` show the sibling called `name`, atomically."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    os.symlink(name, temporary)
    os.replace(temporary, link)
    sync(link.parent)
