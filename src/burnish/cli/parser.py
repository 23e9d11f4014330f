"""A command is a function: its signature is the argument parser and its docstring the help.

    def demos(env: str, episodes: int, root: Path, *, image_size: Annotated[int, Arg(least=1)] = 96) -> None:
        '''Record expert demonstrations as a LeRobot data set.

        Args:
            env: environment id, e.g. tabletop:lift.

        Example:
            burnish data demos tabletop:lift 200 data/lift --image-size 128
        '''

A parameter without a default is a positional argument, which may also be named (`--env tabletop:lift`); a keyword-only
one is a flag; `*overrides` takes whatever else is given, such as --train.steps=500. A `list` takes one value each time
its flag is given. A command returns None, or an exit status.
"""

import argparse
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from textwrap import dedent, indent
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from burnish.core.options import check_value, home

Command = Callable[..., int | None]


@dataclass(frozen=True)
class Group:
    """Commands under a common word."""

    help: str
    commands: "Mapping[str, Command | Group]"


@dataclass(frozen=True)
class Arg:
    """What the name and the type of a parameter do not say; used as `Annotated[int, Arg(least=1)]`.

    Args:
        short: a second spelling, such as "-o".
        old: earlier spellings, which still work and are not shown.
        metavar: what the help calls a value.
        several: of a list: several values may follow one flag.
        least, most, below: bounds of a number, as in `core.options.option`.
        fields: of `*overrides`: the dataclass whose fields they may set, listed in the help.
    """

    short: str = ""
    old: tuple[str, ...] = ()
    metavar: str = ""
    several: bool = False
    least: float | None = None
    most: float | None = None
    below: float | None = None
    fields: type | None = None

    def check(self, value: Any, what: str) -> None:
        bounds = {"least": self.least, "most": self.most, "below": self.below}
        for one in value if isinstance(value, list) else [value]:
            check_value(one, {name: bound for name, bound in bounds.items() if bound is not None}, what)


@dataclass
class Help:
    """A docstring, taken apart."""

    summary: str
    details: str
    arguments: dict[str, str] = field(default_factory=dict)
    examples: str = ""


def read_help(command: Command | Group) -> Help:
    """Summary, details, arguments and examples of a docstring with the sections Args and Example."""
    if isinstance(command, Group):
        return Help(command.help, "")
    text = inspect.getdoc(command) or ""
    parts = re.split(r"^(Args|Examples?|Raises|Returns):\n", text, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    summary, _, details = parts[0].strip().partition("\n\n")
    found = Help(" ".join(summary.split()), details.strip())
    for entry in re.finditer(r"^    (\S[^:\n]*): (.*(?:\n {5,}.*)*)", sections.get("Args", ""), flags=re.M):
        meaning = " ".join(entry[2].split())
        found.arguments |= {name.strip().lstrip("*"): meaning for name in entry[1].split(",")}
    found.examples = indent(dedent(sections.get("Examples") or sections.get("Example") or "").rstrip(), "  ")
    return found


def group_parser(name: str, group: Group) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name, description=group.help)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for word, command in group.commands.items():
        commands.add_parser(word, help=read_help(command).summary.partition(". ")[0].rstrip(".").replace("%", "%%"))
    return parser


class CommandParser:
    """The parser of one command.

    Args:
        name: how the command is called, e.g. "burnish data demos".
        words: the arguments that will be read: a positional argument that they name is expected as a flag.
    """

    def __init__(self, name: str, command: Command, words: Sequence[str] = ()):
        self.command = command
        self.help = read_help(command)
        hints = get_type_hints(command, include_extras=True)
        self.parameters = {
            one.name: _Parameter(one, hints[one.name], self.help.arguments.get(one.name, ""))
            for one in inspect.signature(command).parameters.values()
        }
        self.rest = next((p for p in self.parameters.values() if p.rest), None)
        epilog = [f"examples:\n{self.help.examples}"] if self.help.examples else []
        if self.rest and self.rest.arg.fields:
            epilog.append("\n".join(["fields that can be set:", *field_lines(self.rest.arg.fields)]))
        self.parser = argparse.ArgumentParser(
            prog=name, description="\n\n".join(filter(None, [self.help.summary, self.help.details])),
            epilog="\n\n".join(epilog), formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        for parameter in self.parameters.values():
            if not parameter.rest:
                parameter.add_to(self.parser, words)

    def call(self, words: Sequence[str]) -> int:
        """Parse `words` and call the command; returns the exit status.

        Raises:
            SystemExit: wrong usage (2), or help was asked for (0).
            BurnishError: a number out of range, or whatever the command raises.
        """
        given, rest = self.parser.parse_known_args(words)
        if rest and not self.rest:
            self.parser.error(f"unknown arguments: {' '.join(rest)}")
        values = vars(given)
        for name, value in values.items():
            parameter = self.parameters[name]
            if parameter.is_list and value is None:
                values[name] = list(parameter.default or ())
            parameter.arg.check(values[name], parameter.shown)
            if isinstance(value, Path):
                values[name] = Path(home(str(value), parameter.shown))
        first = [values.pop(name) for name, parameter in self.parameters.items() if parameter.positional]
        return self.command(*first, *rest, **values) or 0


def listed(text: str) -> list[str]:
    """What a list separated by commas names; "" names nothing."""
    return [one for one in text.split(",") if one]


def field_lines(kind: type, prefix: str = "") -> list[str]:
    """A line for each field of a dataclass and of those inside it: flag, meaning, default."""
    lines = []
    for one in fields(kind):
        name = f"{prefix}{one.name}"
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if is_dataclass(default):
            lines += field_lines(type(default), f"{name}.")
            continue
        meaning = one.metadata.get("help", "")
        shown = "" if default in ("", [], {}, None) or f"{default} means" in meaning else f" (default {default})"
        lines.append(f"  --{name}  {meaning}{shown}")
    return lines


class _Parameter:
    """One parameter of a command and the argument that stands for it."""

    def __init__(self, parameter: inspect.Parameter, hint: Any, meaning: str):
        kinds = inspect.Parameter
        self.name, self.meaning = parameter.name, meaning
        self.rest = parameter.kind is kinds.VAR_POSITIONAL
        self.positional = parameter.kind is kinds.POSITIONAL_OR_KEYWORD
        self.required = parameter.default is kinds.empty
        self.default = None if self.required else parameter.default
        self.arg = Arg()
        if get_origin(hint) is Annotated:
            hint, self.arg = get_args(hint)
        if get_origin(hint) in (Union, UnionType):
            (hint,) = (part for part in get_args(hint) if part is not NoneType)
        self.is_list = get_origin(hint) is list
        self.kind = get_args(hint)[0] if self.is_list else hint
        self.flag = "--" + self.name.rstrip("_").replace("_", "-")
        self.shown = self.flag if not self.positional else self.name

    def add_to(self, parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
        named = any(word == self.flag or word.startswith(f"{self.flag}=") for word in words)
        if self.positional and not named:
            # Without its number, an argument that may be left out takes its default.
            number = ("*" if self.is_list else "?") if not self.required else "+" if self.is_list else None
            parser.add_argument(self.name, nargs=number, **self._value(), help=self._help())
        elif self.kind is bool:
            flag, action = (
                (f"--no-{self.flag[2:]}", "store_false") if self.default is True else (self.flag, "store_true")
            )
            parser.add_argument(flag, dest=self.name, action=action, help=self._help())
        else:
            more: dict[str, Any] = self._value() | {"dest": self.name, "required": self.required}
            if self.is_list:
                more |= {"nargs": "+", "action": "extend"} if self.arg.several else {"action": "append"}
            flags = [flag for flag in (self.arg.short, self.flag) if flag]
            parser.add_argument(*flags, **more, help=self._help())
            # An earlier spelling must not set the default once more.
            hidden = more | {"default": argparse.SUPPRESS, "required": False, "help": argparse.SUPPRESS}
            for old in self.arg.old:
                parser.add_argument(old, **hidden)

    def _value(self) -> dict[str, Any]:
        # A list starts empty: argparse would add what is given to the default.
        value: dict[str, Any] = {"default": None if self.is_list else self.default}
        if get_origin(self.kind) is Literal:
            choices = get_args(self.kind)
            return value | {"type": type(choices[0]), "choices": choices}
        metavar = self.arg.metavar or {int: "N", float: "X", Path: "PATH"}.get(self.kind)
        return value | {"type": self.kind} | ({"metavar": metavar} if metavar and not self.positional else {})

    def _help(self) -> str:
        default = " ".join(map(str, self.default)) if isinstance(self.default, list | tuple) else self.default
        known = self.kind is bool or default in (None, "") or f"{default} means" in self.meaning
        return (self.meaning if known else f"{self.meaning} (default {default})").replace("%", "%%")
