"""What a message tells the user to do can be done: every command in it exists, with the flags that it is given."""

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

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


def texts() -> Iterator[tuple[str, str]]:
    """(place, text) of every message of a BurnishError, a log line, and what a local name in one stands for."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        named = {target.id: node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)
                 for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip
        for node in ast.walk(tree):
            called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if called in ("BurnishError", "warning", "info"):
                given = [*node.args, *(word.value for word in node.keywords)]
                meant = [named.get(one.id, one) if isinstance(one, ast.Name) else one for one in given]
                where = f"{path.relative_to(SOURCE)}:{node.lineno}"
                yield from ((where, text) for one in meant for text in words_of(one))


TEXTS = sorted(set(texts()))
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
PARSERS = {
    name: CommandParser(f"burnish {name}", found_at(name)) for name in NAMES if not isinstance(found_at(name), Group)
}


def recipe_fields(kind: type = RecipeConfig, prefix: str = "") -> Iterator[str]:
    for one in fields(kind):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        yield f"--{prefix}{one.name}"
        if is_dataclass(default):
            yield from recipe_fields(type(default), f"{prefix}{one.name}.")


FIELDS = set(recipe_fields())
FLAGS_OF = {
    name: {flag for action in one.parser._actions for flag in action.option_strings} for name, one in PARSERS.items()
}
OTHERS = {"--num_processes", "--debug", "--section.field", "--local-dir", "--repo-type", "--inference.type",
          "--fsdp_version", "--use_fsdp", "--head", "--policy_type", "--pretrained_name_or_path"}  # fmt: skip
"""Of accelerate, every command, any field, hf download, LeRobot and Ray."""
FLAGS = set().union(*FLAGS_OF.values())


def commands() -> Iterator[tuple[str, str]]:
    for where, text in TEXTS:
        yield from ((where, found[1].strip().rstrip(".,")) for found in COMMAND.finditer(text))


def test_there_are_commands_to_look_at():
    assert len(list(commands())) >= 15 and len(FLAGS) > 60 and len(FIELDS) > 60


@pytest.mark.parametrize(("where", "command"), sorted(set(commands())))
def test_a_command_in_a_message_exists_with_its_flags(where, command):
    rest = command.removeprefix("burnish ")
    name = next((name for name in NAMES if f"{rest} ".startswith(f"{name} ")), None)
    assert name, f"{where}: {command}"
    if name not in PARSERS:
        return
    known = FLAGS_OF[name] | {"--debug"} | (FIELDS if PARSERS[name].rest else set())
    words = rest.removeprefix(name).replace("'", "").split()
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert set(given) <= known, f"{where}: {command} knows no {set(given) - known}"


@pytest.mark.parametrize(("where", "flag"), sorted({
    (where, flag) for where, text in TEXTS for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)
}))  # fmt: skip
def test_a_flag_in_a_message_is_one_of_some_command(where, flag):
    assert flag in FLAGS | FIELDS | OTHERS or flag.startswith("--policy.overrides."), where


def test_no_message_speaks_python_to_the_command_line():
    wrong = [
        place for place in TEXTS if re.search(r"\bgive \w+=|\bload_policy\(|\w+= of (your|the) data set", place[1])
    ]
    assert wrong == []
