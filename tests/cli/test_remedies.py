"""What a message tells the user to do can be done: every command in it exists, with the flags that it is given."""

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path

from burnish.cli.main import COMMANDS
from burnish.cli.parser import CommandParser, Group
from burnish.core.config import RecipeConfig

SOURCE = Path(__file__).parents[2] / "src" / "burnish"
FILLED = "X"
"""Stands for what a message fills in."""


def words_of(node: ast.expr) -> Iterator[str]:
    """Texts that an expression can be; a value that is filled in is X."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else FILLED for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from [*words_of(node.body), *words_of(node.orelse)]
    elif isinstance(node, ast.BinOp):
        yield "".join(next(words_of(side), FILLED) for side in (node.left, node.right))
    elif isinstance(node, ast.Dict):
        yield from (text for value in node.values for text in words_of(value))


def messages() -> Iterator[tuple[str, str, bool]]:
    """(place, text, whether it is a remedy) of every message of a BurnishError, a log line, and what a local name in
    one stands for.
    """
    for path in sorted(SOURCE.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {target.id: node.value for node in nodes if isinstance(node, ast.Assign)
                 for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip
        for node in nodes:
            if isinstance(node, ast.Call) and _called(node.func) in ("BurnishError", "warning", "info"):
                given = [*node.args, *(word.value for word in node.keywords)]
                fixes = [*node.args[2:3], *(word.value for word in node.keywords if word.arg == "fix")]
                meant = [named.get(one.id, one) if isinstance(one, ast.Name) else one for one in given]
                where = f"{path.relative_to(SOURCE)}:{node.lineno}"
                for one, said in zip(meant, given, strict=True):
                    yield from ((where, text, said in fixes) for text in words_of(one))


def _called(function: ast.expr) -> str:
    """The last word of what is called."""
    return getattr(function, "attr", getattr(function, "id", ""))


@cache
def found() -> list[tuple[str, str, bool]]:
    return sorted(set(messages()))


@cache
def texts() -> list[tuple[str, str]]:
    return sorted({(where, text) for where, text, _ in found()})


COMMAND = re.compile(r"(?:^|[`;,] ?|\bor |&& |\bby )(burnish [a-z][^`;(),]*)")


def found_at(name: str) -> object:
    """The command or group of that name."""
    found: object = COMMANDS
    for word in name.split():
        found = found.commands[word]
    return found


def groups(group: Group = COMMANDS, name: str = "") -> Iterator[str]:
    for word, command in group.commands.items():
        full = f"{name} {word}".strip()
        yield full
        if isinstance(command, Group):
            yield from groups(command, full)


NAMES = sorted(groups(), key=len, reverse=True)


@cache
def parsers() -> dict[str, CommandParser]:
    made = ((name, found_at(name)) for name in NAMES)
    return {name: CommandParser(f"burnish {name}", found) for name, found in made if not isinstance(found, Group)}


def recipe_fields(kind: type = RecipeConfig, prefix: str = "") -> Iterator[str]:
    for one in fields(kind):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        yield f"--{prefix}{one.name}"
        if is_dataclass(default):
            yield from recipe_fields(type(default), f"{prefix}{one.name}.")


FIELDS = set(recipe_fields())
OTHERS = {"--num_processes", "--debug", "--section.field", "--local-dir", "--repo-type", "--inference.type",
          "--fsdp_version", "--use_fsdp", "--head", "--policy_type", "--pretrained_name_or_path"}  # fmt: skip
"""Of accelerate, every command, any field, hf download, LeRobot and Ray."""


def flags_of(name: str) -> set[str]:
    return {flag for action in parsers()[name].parser._actions for flag in action.option_strings}


def flags() -> set[str]:
    return set().union(*map(flags_of, parsers()))


def commands() -> Iterator[tuple[str, str]]:
    for where, text in texts():
        yield from ((where, found[1].strip().rstrip(".,")) for found in COMMAND.finditer(text))


def test_there_are_commands_to_look_at():
    assert len(list(commands())) >= 15 and len(flags()) > 60 and len(FIELDS) > 60


def test_a_command_in_a_message_exists_with_its_flags():
    assert [fault for place in sorted(set(commands())) if (fault := fault_of(*place))] == []


def fault_of(where: str, command: str) -> str:
    rest = command.removeprefix("burnish ")
    name = next((name for name in NAMES if f"{rest} ".startswith(f"{name} ")), None)
    if name is None:
        return f"{where}: there is no {command}"
    if name not in parsers():
        return ""
    known = flags_of(name) | {"--debug"} | (FIELDS if parsers()[name].rest else set())
    words = rest.removeprefix(name).replace("'", "").split()
    unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - known
    return f"{where}: {command} knows no {unknown}" if unknown else ""


def test_a_flag_in_a_message_is_one_of_some_command():
    known, named = flags() | FIELDS | OTHERS, re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")
    used = {(where, flag) for where, text in texts() for flag in named.findall(text)}
    assert len(used) > 60
    assert [one for one in sorted(used) if one[1] not in known and not one[1].startswith("--policy.overrides.")] == []


def test_a_remedy_names_a_field_of_the_recipe_as_its_flag():
    named = re.compile(r"(?<![\w./(-])[a-z]+\.[a-z_][\w.]*\w")
    fields = {(where, name) for where, text, remedy in found() if remedy and "in a recipe" not in text
              for name in named.findall(text) if f"--{name}" in FIELDS}  # fmt: skip
    assert fields == set()


def test_no_message_speaks_python_to_the_command_line():
    wrong = [
        place for place in texts() if re.search(r"\bgive \w+=|\bload_policy\(|\w+= of (your|the) data set", place[1])
    ]
    assert wrong == []
