"""Workers for test_cluster.py, importable on the nodes of its cluster."""

import os
import signal
import time
from pathlib import Path

from burnish.core.errors import BurnishError


def powers(tasks, exponent):
    """Some tasks are faults; a path is a file that one worker may remove, and dies of it."""
    for task in tasks:
        if task == "refuse":
            raise BurnishError("no such task", "a number")
        if task == "fail":
            raise ValueError(f"cannot do {task}")
        if task == "folder":
            yield os.getcwd()
        elif isinstance(task, str):
            die_once(Path(task))
            yield f"{Path(task).name} is done"
        else:
            yield task**exponent


def dies(tasks):
    for _ in tasks:
        os.kill(os.getpid(), signal.SIGKILL)
        yield


def sleeps(tasks):
    for seconds in tasks:
        time.sleep(seconds)
        yield seconds


def finish_runs(tasks, study, base, facts, threads):
    """In place of a study's worker: the later run ends first, and the folder says what was given."""
    for seed, variant in tasks:
        time.sleep(0.3 * (variant == "plain"))
        folder = Path("runs", study["name"], f"{variant}-{seed}")
        folder.mkdir(parents=True)
        (folder / "given").write_text(f"{base['train']['steps']} {facts['name']} {threads}")
        yield (seed, variant), 1.5


def die_once(file: Path) -> None:
    """SIGKILL for whoever removes the file."""
    try:
        file.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
