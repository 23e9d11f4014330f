"""What every malformed input must end in: one line and exit 2, within ten seconds, nothing run and nothing lost."""

import hashlib
import importlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.cli.main import main

MOST_SECONDS = 10


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    """What commands import on their first call in a process is not their time: any test may be the first one."""
    for name in ("train.loop", "policies.load", "evaluate.rollout", "experiments.pipeline", "report.page"):
        importlib.import_module(f"burnish.{name}")
    for name in ("lerobot.policies.factory", "transformers", "lerobot.datasets", "peft", "accelerate"):
        importlib.import_module(name)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`refused(words, *needles)`: the command ends with exit 2 and one line that holds every needle; returns the line.

    Warnings may stand before it. Standard input answers "y" to whatever asks.
    """
    import io

    def run(words: list[str], *needles: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
        capfd.readouterr()
        status = alarmed(lambda: main([str(word) for word in words]))
        err = capfd.readouterr().err
        assert status == 2, f"exit {status} of {words}: {err}"
        assert "Traceback" not in err and "internal error" not in err, err
        line = err.strip().split("\n")[-1]
        assert line.startswith("burnish"), err
        missing = [needle for needle in needles if needle not in line]
        assert not missing, f"{line!r} does not say {missing}"
        return line

    return run


@pytest.fixture
def accepted(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`accepted(words, *needles)`: the command ends with exit 0 and says every needle; returns all that it printed."""

    def run(words: list[str], *needles: str) -> str:
        capfd.readouterr()
        status = alarmed(lambda: main([str(word) for word in words]))
        both = "".join(capfd.readouterr())
        assert status == 0, f"exit {status} of {words}: {both}"
        missing = [needle for needle in needles if needle not in both]
        assert not missing, f"{both!r} does not say {missing}"
        return both

    return run


def alarmed(call: Callable[[], int]) -> int:
    """The exit status of `call`; fails where it takes longer than ten seconds."""

    def late(*_: object) -> None:
        pytest.fail(f"still running after {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(MOST_SECONDS)
    try:
        return call()
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder by its relative path, to hold a folder against itself later."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


@pytest.fixture
def untouched() -> Callable[[Path], Callable[[], None]]:
    """`check = untouched(folder)` ... `check()`: the folder's files are what they were."""

    def remember(folder: Path) -> Callable[[], None]:
        before = contents(folder)

        def check() -> None:
            assert contents(folder) == before

        return check

    return remember
