"""Large merges run in processes: the same bytes, the same refusals, and no process outlives its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest
from capability_files import weights
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.weights import processes as apart
from burnish.weights.engine import part_folder
from burnish.weights.extract import extract
from burnish.weights.merge import Merging, merge


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(apart, "SMALLEST", 0)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 5))
def test_every_tensor_has_one_process(sizes, count):
    named = {f"t{k}": size for k, size in enumerate(sizes)}
    groups = apart.shares(named, count)
    assert sorted(n for group in groups for n in group) == sorted(named)
    totals = [sum(named[n] for n in group) for group in groups]
    assert len(groups) <= count and max(totals) - min(totals) <= max(sizes) or len(groups) < count
    assert all(group == sorted(group, key=list(named).index) for group in groups)


def test_processes_give_the_bytes_of_one_thread(family, tmp_path, monkeypatch):
    base, tuned, _ = family
    delta = extract(base, tuned, output=tmp_path / "delta").path
    here = []
    plain = Merging.piece
    monkeypatch.setattr(Merging, "piece", lambda self, *at: (here.append(os.getpid()), plain(self, *at))[1])
    apart_record = merge(base, [(delta, 1.1)], output=tmp_path / "apart", threads=2)
    assert not here  # all of it happened elsewhere
    record = merge(base, [(delta, 1.1)], output=tmp_path / "one", threads=1)
    assert here
    assert apart_record["tensors"] == record["tensors"] and apart_record["digest"] == record["digest"]
    assert apart_record["base"] == record["base"] and apart_record["deltas"] == record["deltas"]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "apart")
    assert one.keys() == two.keys() and all(one[n].tobytes() == two[n].tobytes() for n in one)


def test_an_error_of_a_process_is_raised_and_nothing_is_left(family, tmp_path, monkeypatch):
    base, tuned, _ = family

    def refuse(self, worker, name, start, stop):
        raise BurnishError(f"'{name}' is another one", "the one that was recorded")

    monkeypatch.setattr(Merging, "piece", refuse)
    with pytest.raises(BurnishError, match="is another one; expected the one that was recorded"):
        merge(base, output=tmp_path / "out", tuned=[(tuned, 1.0)], threads=2)
    assert not (tmp_path / "out").exists() and not part_folder(tmp_path / "out").exists()


def test_a_process_that_dies_is_named(family, tmp_path, monkeypatch):
    base, tuned, _ = family
    monkeypatch.setattr(Merging, "piece", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(BurnishError, match=r"process of the merge died \(exit -9\)"):
        merge(base, output=tmp_path / "out", tuned=[(tuned, 1.0)], threads=2)


SLOW = """
import os, sys, time
from burnish.weights import processes as apart
from burnish.weights.merge import Merging, merge

apart.SMALLEST = 0
plain = Merging.piece
def slow(self, *at):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece, whatever else writes
    time.sleep(0.2)
    return plain(self, *at)
Merging.piece = slow
merge(sys.argv[1], output=sys.argv[3], tuned=[(sys.argv[2], 1.1)], threads=2)
"""


def test_no_process_outlives_its_parent_and_the_command_goes_on(family, tmp_path):
    base, tuned, _ = family
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW, base, tuned, out], stdout=subprocess.PIPE, text=True)
    children = {int(process.stdout.readline()) for _ in range(6)}
    process.kill()
    process.wait()
    assert len(children) == 2 and process.pid not in children
    limit = time.monotonic() + 20
    while any(_runs(child) for child in children):
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert not out.exists()
    merge(base, output=out, tuned=[(tuned, 1.1)], threads=2)
    merge(base, output=tmp_path / "fresh", tuned=[(tuned, 1.1)], threads=1)
    one, two = weights(out), weights(tmp_path / "fresh")
    assert one.keys() == two.keys() and all(one[n].tobytes() == two[n].tobytes() for n in one)


def _runs(pid):
    """Whether a process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
