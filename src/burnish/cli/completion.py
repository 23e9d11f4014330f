"""`burnish completion`: the lines that a shell needs, and what the command answers when TAB is pressed."""

import argparse
import os
from collections.abc import Sequence
from typing import Any, Literal

from burnish.cli.parser import Command, CommandParser, Group, field_lines, group_parser
from burnish.core.errors import BurnishError

ASKED = "_ARGCOMPLETE"
"""Set in the environment by the shell when it asks."""


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print what makes a shell complete commands, options, recipes and their fields.

    Shells read it from a file of their own: ~/.local/share/bash-completion/completions/burnish,
    ~/.config/fish/completions/burnish.fish, or _burnish in a folder of zsh's fpath.

    Args:
        shell: the shell that is to read it

    Example:
        burnish completion bash > ~/.local/share/bash-completion/completions/burnish
    """
    try:
        from argcomplete import shellcode
    except ImportError:
        raise BurnishError("completion without argcomplete", "the package", "pip install argcomplete") from None

    print(shellcode(["burnish"], shell=shell))


def complete(commands: Group) -> None:
    """Answer the shell's question, which stands in the environment, and end the process."""
    from argcomplete import autocomplete

    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", 0))]
    autocomplete(tree("burnish", commands, line.split()[1:]), always_complete_options="long")


def tree(name: str, found: Command | Group, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a line that begins with `words`: of all commands the names, of the one that is meant all."""
    if isinstance(found, Group):
        parser = group_parser(name, found)
        meant = found.commands.get(words[0]) if words else None
        if meant is not None:
            (choice,) = (action for action in parser._actions if action.choices)
            choice.choices[words[0]] = tree(f"{name} {words[0]}", meant, words[1:])
        return parser
    made = CommandParser(name, found, words)
    for action in made.parser._actions:
        if action.dest in ("recipe", "config"):
            action.completer = recipes
    fields = made.rest.arg.fields if made.rest else None
    for line in field_lines(fields) if fields else ():
        made.parser.add_argument(line.split()[0])
    return made.parser


def recipes(prefix: str, **_: Any) -> list[str]:
    """Names of shipped recipes, and files."""
    from argcomplete.completers import FilesCompleter

    from burnish.core.recipe import SHIPPED

    names = (str(file.relative_to(SHIPPED).with_suffix("")) for file in SHIPPED.rglob("*.yaml"))
    return [*(name for name in sorted(names) if name.startswith(prefix)), *FilesCompleter()(prefix)]
