"""The `burnish` command: finds what is called, calls it, and says mistakes in one line."""

import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from burnish import __version__
from burnish.cli import compare, data, eval, method, policy, report, run, train, weights
from burnish.cli.parser import Command, CommandParser, Group, group_parser
from burnish.core.errors import BurnishError

COMMANDS = Group("Post-training for vision-language-action policies.", {
    "data": data.COMMANDS, "train": train.train, "eval": eval.evaluate, "compare": compare.compare, "run": run.run,
    "weights": weights.COMMANDS, "policy": policy.COMMANDS, "method": method.COMMANDS, "report": report.COMMANDS,
})  # fmt: skip

OLD = {
    "demos": "data demos", "questions": "data questions --scenes 1000", "inspect": "data inspect",
    "pairs": "data pairs", "study": "run", "align": "method align",
    "anchor build": "method isolate anchor", "anchor": "method isolate", "capability": "weights",
    "decode": "policy decode", "profile": "policy profile", "verify": "policy verify", "pareto": "report pareto",
    "results": "report results",
}  # fmt: skip
"""Earlier names, kept for one release; two words go before one."""

OUTSIDE = {
    "align picture": "workshop align-tokens", "align plot": "workshop align-gradients",
    "align teacher": "workshop teacher", "bench": "bench", "pretrain": "workshop pretrain",
    "ship": "workshop package-base", "tower": "workshop build-vlm",
}  # fmt: skip
"""Earlier names of what is no part of the package: `python -m`, in a checkout."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 2 after a mistake of the user's, 130 after an interruption."""
    words = list(sys.argv[1:] if argv is None else argv)
    shown = " ".join(["burnish", *words[:1]])
    try:
        with messages(shown):
            words, outside = present_names(words)
        if outside:
            return run_outside(words)
        shown, command, words = find(words)
        with messages(shown):
            return CommandParser(shown, command, words).call(words)
    except BurnishError as error:
        print(f"{shown}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{shown}: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def find(words: Sequence[str]) -> tuple[str, Command, list[str]]:
    """Full name of the command, the command, and what follows; exits where there is none, with help or an error."""
    name, found, rest = "burnish", COMMANDS, list(words)
    while isinstance(found, Group):
        if not rest or rest[0] not in found.commands:
            parser = group_parser(name, found)
            if found is COMMANDS:
                parser.add_argument("--version", action="version", version=__version__)
            parser.parse_args(rest)  # prints the help, or refuses the word
        name, found, rest = f"{name} {rest[0]}", found.commands[rest[0]], rest[1:]
    return name, found, rest


def present_names(words: Sequence[str]) -> tuple[list[str], bool]:
    """`words` with the present name of the command, and whether it is one outside the package; tells of an old name."""
    words = list(words)
    for length in (2, 1):
        for table in (OLD, OUTSIDE):
            old, rest = " ".join(words[:length]), words[length:]
            if len(words) >= length and old in table:
                start = "python -m" if table is OUTSIDE else "burnish"
                _tell(f"burnish {old}", f"{start} {table[old].partition(' --')[0]}")
                return [*table[old].split(), *rest], table is OUTSIDE
    pages = [*report.COMMANDS.commands, "-h", "--help"]
    if words[:1] == ["report"] and len(words) > 1 and words[1] not in pages:
        _tell("burnish report RUN_FOLDER", "burnish report page RUN_FOLDER")
        words.insert(1, "page")
    return words, False


def _tell(old: str, new: str) -> None:
    logging.getLogger("burnish").warning("%s is now called %s; the old name goes with the next release", old, new)


def run_outside(words: Sequence[str]) -> int:
    """Run `python -m WORDS` for the packages bench and workshop, which lie in a checkout."""
    if not Path(words[0], "__main__.py").is_file():
        raise BurnishError(f"{words[0]} is no part of the package", "a checkout of burnish as the present folder")
    return subprocess.run([sys.executable, "-m", *words], check=False).returncode


@contextmanager
def messages(name: str) -> Iterator[None]:
    """Show what burnish logs as lines `NAME: message` on stderr."""
    log = logging.getLogger("burnish")
    before = log.handlers, log.level, log.propagate
    log.handlers, log.propagate = [_Lines(name)], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers, log.propagate = before[0], before[2]
        log.setLevel(before[1])


class _Lines(logging.Handler):
    """Prints to the stderr of the moment, so that a progress bar or a test may have put another in its place."""

    def __init__(self, name: str):
        super().__init__()
        self.command = name

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{self.command}: {record.getMessage()}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
