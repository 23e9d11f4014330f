"""SIGKILL at random instants loses no finished episode, leaves no process, and changes no outcome."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import evaluation_fakes as fakes

from burnish.core.outputs import MARK
from burnish.evaluate.records import EPISODES, SUMMARY
from burnish.evaluate.results import read_results
from burnish.evaluate.rollout import evaluate

SCRIPT = Path(__file__).with_name("killed_evaluation.py")
KILLS = int(os.environ.get("BURNISH_KILLS", "1"))
"""BURNISH_KILLS=20 runs the long version; the default keeps the suite short."""
KILLS_OF_A_RUN = 5


def lines(folder: Path) -> int:
    file = folder / EPISODES
    return file.read_bytes().count(b"\n") if file.exists() else 0


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, SCRIPT, folder], start_new_session=True)


def kill_after(process: subprocess.Popen, folder: Path, more: int, extra: float) -> None:
    """SIGKILL the evaluation itself (not its simulators) `extra` seconds after `more` further episodes."""
    goal, deadline = lines(folder) + more, time.monotonic() + 300
    while lines(folder) < goal and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(extra)
    process.send_signal(signal.SIGKILL)
    process.wait()


def group_is_empty(group: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_killed_evaluation_equals_the_uninterrupted_one(tmp_path):
    fakes.register()
    whole = evaluate(
        fakes.make_policy(), "line", episodes=20, output=tmp_path / "whole", workers=2, batch_size=4, progress=False,
        video=False, make=fakes.make_env,
    )  # fmt: skip
    chance = random.Random(0)
    for first in range(0, KILLS, KILLS_OF_A_RUN):
        check_killed(tmp_path / f"killed{first}", min(KILLS_OF_A_RUN, KILLS - first), chance, whole)


def check_killed(folder, kills, chance, whole):
    seen = 0
    for kill in range(kills):
        process = start(folder)
        kill_after(process, folder, more=kill, extra=chance.uniform(0, 0.15))
        assert process.returncode == -signal.SIGKILL
        assert group_is_empty(process.pid)
        assert lines(folder) >= seen
        seen = lines(folder)
    assert not (folder / SUMMARY).exists()
    assert start(folder).wait(600) == 0
    order = {r.key: i for i, r in enumerate(whole.records)}
    found = sorted(read_results(folder), key=lambda r: order[r.key])
    assert _outcomes(found) == _outcomes(whole.records)
    summary = json.loads((folder / SUMMARY).read_text())
    assert summary["overall"]["n"] == 40 and len(summary["videos"]) == 4
    assert [p.name for p in folder.rglob(".*")] == [MARK], "no partial file is left"


def _outcomes(records):
    """What must be equal: neither the clock nor a commit made in between belongs to it."""
    return [replace(r, latency_ms=(), commit="") for r in records]
