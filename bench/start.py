"""`python -m bench start`: how long a newcomer waits for help: wall seconds of whole processes.

Each command is started afresh, in turn with a bare `python -c pass`, which is what no command can be quicker than; a
figure is the median over rounds. Help of a command imports no PyTorch.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from burnish.cli.main import COMMANDS
from burnish.cli.parser import Group


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Figures, in seconds: `help_s` of `burnish --help`, `command_help_s` of the slowest command's, `import_s` of
    `import burnish` with the interpreter, `interpreter_s` of the interpreter alone.
    """
    from burnish.core.provenance import commit, machine

    rounds = 3 if args.quick else 9
    words = {"interpreter": ["-c", "pass"], "import": ["-c", "import burnish"], "burnish": ["--help"]}
    words |= {name: [*name.split(), "--help"] for name in leaves()}
    taken: dict[str, list[float]] = {name: [] for name in words}
    for _ in range(rounds):
        for name, given in words.items():
            taken[name].append(seconds(given if given[0] == "-c" else ["-m", "burnish.cli.main", *given]))
    found = {name: median(times) for name, times in taken.items()}
    slowest = max(leaves(), key=found.__getitem__)
    info = machine("cpu")
    return {
        "name": "start", "device": info.pop("device"), "versions": info, "n": rounds,
        "command": f"python -m bench start{' --quick' * args.quick} --json",
        "figures": {"help_s": found["burnish"], "command_help_s": found[slowest], "import_s": found["import"],
                    "interpreter_s": found["interpreter"]},
        "detail": {"commit": commit(), "slowest": slowest, "seconds": taken},
    }  # fmt: skip


def leaves(group: Group = COMMANDS, name: str = "") -> Iterator[str]:
    """The full name of every command."""
    for word, command in group.commands.items():
        full = f"{name} {word}".strip()
        yield from leaves(command, full) if isinstance(command, Group) else [full]


def seconds(words: list[str]) -> float:
    """Wall time of a Python process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin
