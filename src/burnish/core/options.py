"""Options: dataclasses whose fields say default, meaning and range in one place.

    @dataclass
    class Options:
        weight: float = option(0.1, "weight of the penalty", least=0)
        mode: str = option("auto", "how parents are compared", choices=("auto", "strict"))

    options = read_options(Options, {"weight": 0.2}, "l2sp")

A recipe, a command line and Python all go through `check`, so that none of them takes what another refuses.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from burnish.core.errors import BurnishError


def option(
    default: Any, help: str = "", *, least: float | None = None, most: float | None = None, above: float | None = None,
    below: float | None = None, choices: Sequence[Any] = (), path: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field with its meaning and what it may hold.

    Args:
        default: a list or dict is copied for every instance.
        help: one sentence for `--help` and error messages.
        least, most: bounds that are allowed themselves.
        above, below: bounds that are not.
        choices: all allowed values, where they are few.
        path: the value is a path: `~` at its start means the home folder.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below}
    metadata = {"help": help, "choices": tuple(choices), "path": path}
    metadata |= {key: bound for key, bound in bounds.items() if bound is not None}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def read_options[T](kind: type[T], given: Mapping[str, Any], where: str) -> T:
    """`kind(**given)`, checked; `where` begins every message.

    Raises:
        BurnishError: an unknown name, a wrong type, a value out of range.
    """
    if not isinstance(given, Mapping):
        raise BurnishError(f"{where}: {_short(given)} in place of options", "names and their values")
    refuse_unknown(kind, given, where)
    options = kind(**given)
    check(options, where)
    return options


def refuse_unknown(kind: type, given: Mapping[str, Any] | Sequence[str], where: str, what: str = "option") -> None:
    """Raise BurnishError for a name in `given` that is no field of the dataclass `kind`; `where` begins the message."""
    known = [f.name for f in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise BurnishError(f"{where}: unknown {what} '{unknown[0]}'", f"one of {', '.join(known)}")


def check(options: Any, where: str, prefix: str = "") -> None:
    """Raise BurnishError for a field of another type than declared, outside its range, or none of its choices.

    Fields that are dataclasses themselves are checked too, as "section.field". Paths that start with `~` are expanded
    in place.
    """
    hints = get_type_hints(type(options))
    for one in fields(options):
        name, value = prefix + one.name, getattr(options, one.name)
        if is_dataclass(value):
            check(value, where, f"{name}.")
            continue
        if not _fits(hints[one.name], value):
            raise BurnishError(f"{where}: {name} is {_short(value)}", f"a {_words(hints[one.name])}")
        if one.metadata.get("path") and isinstance(value, str) and value.startswith("~"):
            object.__setattr__(options, one.name, home(value, f"{where}: {name}"))  # frozen or not
        check_value(value, one.metadata, f"{where}: {name}")


def check_value(value: Any, metadata: Mapping[str, Any], what: str) -> None:
    """Raise BurnishError where `value` is none of the choices or breaks a bound of `metadata` (see `option`)."""
    choices = metadata.get("choices")
    if isinstance(value, float) and not math.isfinite(value):
        raise BurnishError(f"{what} is {value!r}", "a finite number")
    if choices and not any(type(value) is type(choice) and value == choice for choice in choices):
        raise BurnishError(f"{what} is {_short(value)}", f"one of {', '.join(str(one) or "''" for one in choices)}")
    if type(value) is int and abs(value) >= 2**63:
        raise BurnishError(f"{what} is {_short(value)}", "a number of at most 18 digits")
    if not number(value):
        return
    least, most, above, below = (metadata.get(key) for key in ("least", "most", "above", "below"))
    too_small = least is not None and value < least or above is not None and value <= above
    if too_small or most is not None and value > most or below is not None and value >= below:
        raise BurnishError(f"{what} is {value!r}", _range(metadata))


def home(path: str, what: str = "the path") -> str:
    """`path` with `~` at its start, which a shell does not expand after an equals sign, as the home folder."""
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise BurnishError(f"{what} is {path!r}", "~/... or the name of a user of this machine after ~")
    return found


def number(value: Any) -> bool:
    """Whether a value, from YAML for instance, is a finite number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _range(metadata: Mapping[str, Any]) -> str:
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    return " and ".join(f"{word} {metadata[key]:g}" for key, word in words.items() if key in metadata)


def _fits(hint: Any, value: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    kind = origin or hint
    tests = {
        int: type(value) is int, float: number(value), bool: type(value) is bool, str: type(value) is str,
        list: isinstance(value, list | tuple), tuple: isinstance(value, list | tuple), dict: isinstance(value, dict),
        type(None): value is None,
    }  # fmt: skip
    return tests.get(kind, True)


def _words(hint: Any) -> str:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return " or ".join(
        " or ".join(map(repr, get_args(part))) if get_origin(part) is Literal
        else "nothing" if part is type(None) else getattr(get_origin(part) or part, "__name__", str(part))
        for part in parts
    )  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
