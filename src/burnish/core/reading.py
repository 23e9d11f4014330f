"""Reading what others have written: regular files of a bounded size inside their folder, and nothing that runs.

Every JSON, JSONL and YAML file that a user, LeRobot or a download has made goes through here: a file that is none
(a pipe, a device), leaves its folder, is too large or too deep, or says a key twice ends in one BurnishError.

Regular expressions of theirs end too: (a+)+ can take longer than the universe, and `re` has no limit of time.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError

MOST_BYTES = 256 * 2**20
"""Largest file of text that is read whole."""
MOST_PARTS = 200_000
"""Lists and mappings in one file, those that YAML aliases repeat counted each time."""
MOST_YAML = 200_000
"""Characters of a YAML text, which is read at some 50,000 a second."""
DEEPEST = 64
_POINTER = b"version https://git-lfs"
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of half a character: JSON can write one, and no file can hold it."""
_OTHER_BASE = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""Numbers that YAML 1.1 reads otherwise than people write them: 010 is 8, and 10:50 is 650."""
_KINDS = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))


def inside(root: Path, name: str | Path) -> Path:
    """`root`/`name`, where that lies in `root`: no absolute path, no `..`, no link that leads out.

    Links of the Hugging Face cache, from a snapshot to the blobs beside it, are followed.
    """
    root, text = Path(root), str(name)
    if os.path.isabs(text) or ".." in Path(text).parts or "\0" in text or text.startswith("~"):
        raise BurnishError(f"the path {text!r} leads out of {root}", "a path inside the folder")
    if max(map(len, text.split("/"))) > 255 or len(text) > 2000:
        raise BurnishError(f"the path {text[:60]!r}... has {len(text)} letters", "a name that a folder can hold")
    path, real = root / text, Path(os.path.realpath(root))
    homes = [real] + ([real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [])
    found = Path(os.path.realpath(path))
    if not any(found == home or home in found.parents for home in homes):
        raise BurnishError(f"{path} is a link to {found}, outside {root}",
                           "a file in the folder itself: only the folder as a whole may be a link")  # fmt: skip
    return path


def regular_file(path: Path, root: Path | None = None, most: int | None = None) -> Path:
    """`path`, where it is a regular file that may be read.

    Args:
        root: folder that it must lie in, links followed (see `inside`); None allows any place.
        most: bytes that it may have.

    Raises:
        BurnishError: it is missing, something else than a file, unreadable, too large, outside `root`, or only the
            pointer that Git LFS leaves in place of a file.
    """
    path = Path(path)
    if root is not None:
        inside(root, path.relative_to(root) if path.is_relative_to(root) else path)
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        broken = " (a link to nothing)" if path.is_symlink() else ""
        raise BurnishError(f"no file at {path}{broken}", f"{path.name} in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise BurnishError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(found.st_mode):
        kind = next((word for test, word in _KINDS if test(found.st_mode)), "device")
        raise BurnishError(f"{path} is a {kind}", "a regular file")
    if not os.access(path, os.R_OK):
        raise BurnishError(f"{path} may not be read", "a file that you may read", f"chmod u+r '{path}'")
    if most is not None and found.st_size > most:
        raise BurnishError(f"{path} has {found.st_size / 1e6:.0f} MB", f"at most {most / 1e6:.0f} MB")
    if found.st_size < 1024:
        with open(path, "rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise BurnishError(f"{path} is a pointer of Git LFS, not the file", "the file itself",
                                   f"cd '{path.parent}' && git lfs pull")  # fmt: skip
    return path


def read_text(path: Path, root: Path | None = None, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file (a byte-order mark is dropped); see `regular_file` for `root`, `most` and errors."""
    path = regular_file(path, root, most)
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise BurnishError(f"{path} is text in UTF-16", "UTF-8",
                               f"iconv -f UTF-16 -t UTF-8 '{path}' > utf8{path.suffix}") from None  # fmt: skip
        raise BurnishError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start})", "UTF-8") from None
    except OSError as error:
        raise BurnishError(f"{path} cannot be read ({error.strerror})") from None


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; `where` names it in errors. A key may stand once in an object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise BurnishError(f"{where} says {_twice(key for key, _ in pairs)!r} twice", "each key once")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise BurnishError(f"{where} is nested too deep", f"at most {DEEPEST} levels") from None
    except ValueError as error:
        raise BurnishError(f"{where} is not JSON ({error})") from None
    bounded(value, where)
    if _HALF.search(text):
        _check_parts(value, where)
    return value


def read_json(path: Path, root: Path | None = None) -> Any:
    """The value in a JSON file, see `read_text` and `parse_json`."""
    return parse_json(read_text(path, root), str(path))


def read_object(path: Path, root: Path | None = None) -> dict[str, Any]:
    """The JSON object in a file; raises BurnishError where it holds something else."""
    content = read_json(path, root)
    if not isinstance(content, dict):
        raise BurnishError(f"{path} holds {_kind(content)}", "a JSON object")
    return content


def read_lines(path: Path, root: Path | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every filled line of a JSONL file.

    Lines end at a line feed alone: a sentence may hold other characters that Python's `splitlines` would cut at.
    """
    for number, line in enumerate(read_text(path, root).split("\n"), start=1):
        if line.strip():
            row = parse_json(line, f"{path}:{number}")
            if not isinstance(row, dict):
                raise BurnishError(f"{path}:{number} holds {_kind(row)}", "a JSON object on each line")
            yield number, row


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text of plain values; `where` names it in errors. A key may stand once in a mapping."""
    import yaml

    if len(text) > MOST_YAML:
        raise BurnishError(f"{where} has {len(text)} characters", f"at most {MOST_YAML}")

    class Loader(yaml.SafeLoader):
        merged = 0

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            twice = _twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice is not None:
                raise BurnishError(f"{where} says '{twice}' twice", "each key once")
            return super().construct_mapping(node, deep)

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            if any(key.value == "<<" and not isinstance(value, yaml.MappingNode) for key, value in node.value):
                raise BurnishError(f"{where} says '<<' of no mapping", "<<: *NAME")
            super().flatten_mapping(node)
            self.merged += len(node.value)  # each may hold what the one before held, and more
            if self.merged > MOST_PARTS:
                raise BurnishError(f"{where} repeats too much by '<<'", f"at most {MOST_PARTS} entries")

        def construct_scalar(self, node: Any) -> Any:
            if node.tag.endswith((":int", ":float")) and _OTHER_BASE.fullmatch(node.value):
                raise BurnishError(f"{where}: {node.value[:40]} is a number in base 8 or 60, as YAML reads it",
                                   "a number without leading zeros and colons, or quotes")  # fmt: skip
            return super().construct_scalar(node)

    try:
        value = yaml.load(text, Loader=Loader)  # noqa: S506 - a SafeLoader: plain values alone
    except RecursionError:
        raise BurnishError(f"{where} is nested too deep", f"at most {DEEPEST} levels") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise BurnishError(f"{where} is no readable YAML: {' '.join(str(error).split())[:300]}") from None
    bounded(value, where)
    _check_parts(value, where)
    return value


def _twice(keys: Iterable[str]) -> str | None:
    """The first key that occurs a second time."""
    return next((key for key, count in Counter(keys).items() if count > 1), None)


def _check_parts(value: Any, where: str) -> None:
    """Raise BurnishError for text that no file can hold, and for values that JSON lacks (dates, bytes, sets)."""
    todo = [value]
    while todo:
        one = todo.pop()
        todo += [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []
        if isinstance(one, str) and any("\ud800" <= letter <= "\udfff" for letter in one):
            raise BurnishError(f"{where} holds half a character ({one[:40]!a})", "text that UTF-8 can hold")
        if one is not None and not isinstance(one, bool | int | float | str | list | dict):
            raise BurnishError(f"{where} holds the {type(one).__name__} {str(one)[:40]}", "plain values", f"'{one}'")


def bounded(value: Any, where: str) -> None:
    """Raise BurnishError where nested lists and mappings hold themselves, or too much (YAML aliases repeat)."""
    todo, seen = [(value, 1)], 0
    while todo:
        one, depth = todo.pop()
        parts = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        todo += [(part, depth + 1) for part in parts if isinstance(part, dict | list)]
        seen += 1
        if depth > DEEPEST or seen + len(todo) > MOST_PARTS:
            raise BurnishError(f"{where} is nested too deep or repeats too much",
                               f"at most {DEEPEST} levels and {MOST_PARTS} lists and mappings")  # fmt: skip


def _kind(value: Any) -> str:
    return {type(None): "null", list: "a list", str: "a string", bool: "a truth value"}.get(type(value), "a number")


MOST_SECONDS = 0.1
"""Of processor time, for one name; an ordinary search takes microseconds."""
LONGEST = 1000
"""Characters in an expression."""


def search(pattern: str, name: str, what: str) -> Any:
    """The first match of `pattern` in `name`, None without one; `what` begins the errors.

    Raises:
        BurnishError: no regular expression, one that is too long, or one that takes too much time.
    """
    return _run("search", pattern, what, name)


def fullmatch(pattern: str, name: str, what: str) -> Any:
    """As `search`, of the whole `name`."""
    return _run("fullmatch", pattern, what, name)


def substitute(pattern: str, replacement: str, name: str, what: str) -> str:
    r"""`name` with every match replaced; `replacement` may have \1 and \g<name>. Errors as of `search`."""
    return _run("sub", pattern, what, replacement, name)


def _run(method: str, pattern: str, what: str, *given: str) -> Any:
    import regex  # transformers has it too

    if len(pattern) > LONGEST:
        raise BurnishError(f"{what}: a regular expression of {len(pattern)} characters", f"at most {LONGEST}")
    try:
        return getattr(regex.compile(pattern), method)(*given, timeout=MOST_SECONDS)
    except TimeoutError:
        raise BurnishError(f"{what}: '{pattern[:100]}' takes too long on '{given[-1][:60]}'",
                           "a pattern without repetitions inside repetitions, such as (a+)+") from None  # fmt: skip
    except (regex.error, IndexError, RecursionError, OverflowError) as error:
        raise BurnishError(f"{what}: '{pattern[:100]}' is no regular expression ({error})") from None
