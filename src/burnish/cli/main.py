"""The `burnish` command: finds what is called, calls it, and says mistakes in one line."""

import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from burnish import __version__
from burnish.cli import compare, completion, data, eval, method, policy, report, run, start, weights
from burnish.cli.parser import Command, CommandParser, Group, group_parser
from burnish.core.errors import BurnishError, one_line, out_of_memory, plain
from burnish.core.files import disk_errors

COMMANDS = Group("Post-training for vision-language-action policies.", {
    "start": start.start, "doctor": start.doctor, "trial": compare.trial,
    "data": data.COMMANDS, "train": run.train, "eval": eval.evaluate,
    "compare": compare.compare, "run": run.run,
    "weights": weights.COMMANDS, "policy": policy.COMMANDS, "method": method.COMMANDS, "report": report.COMMANDS,
    "completion": completion.completion,
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
    """Entry point; returns the exit status.

    2 after a mistake of the user's, 3 after a fault of ours (`--debug` adds its traceback), 130 after an interruption,
    141 when the reader of the output went away.
    """
    if completion.ASKED in os.environ:
        completion.complete(COMMANDS)
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    shown = [" ".join(["burnish", *words[:1]])]
    try:
        status = _call(words, shown)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # else Python complains once more when it flushes at its end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{shown[0]}: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - the last net: nobody should have to read a traceback
        said, status = _mistake(error), 2
        if said is None:
            said, status = f"internal error in {_step(error)}: {type(error).__name__}: {one_line(error)}", 3
            said += "; please report it" + ("" if debug else ", with what --debug prints")
        if debug:
            traceback.print_exception(error)
        print(plain(f"{shown[0]}: {said}"), file=sys.stderr)
        return status


def _call(words: list[str], shown: list[str]) -> int:
    """Find the command and call it; `shown[0]` becomes its full name."""
    with messages(shown[0]):
        words, outside = present_names(words)
    if outside:
        return run_outside(words)
    shown[0], command, words = find(words)
    with messages(shown[0]):
        return CommandParser(shown[0], command, words).call(words)


def _mistake(error: Exception) -> str | None:
    """What to say of an error that is the user's or the machine's; None for one of ours."""
    try:
        with disk_errors(Path(getattr(error, "filename", None) or "the output")):
            raise error
    except BurnishError as known:
        return str(known)
    except Exception:  # noqa: BLE001 - the same error again
        more = "not enough memory; expected a machine with more; try: a smaller batch, or fewer workers"
        return more if out_of_memory(error) else None


def _step(error: Exception) -> str:
    """The innermost function of burnish that an error went through."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in frames]
    ours = [f"{module}.{name}" for module, name in names if module.startswith("burnish.")]
    return ours[-1].removeprefix("burnish.") if ours else "burnish"


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
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # else each start complains of the torchao that we ask for
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
        print(plain(f"{self.command}: {record.getMessage()}"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
