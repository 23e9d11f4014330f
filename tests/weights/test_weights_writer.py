"""A killed or failing command leaves nothing half done under its name, and memory is flat."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from weight_files import assert_same, weights, write_file

from burnish.core.errors import BurnishError
from burnish.weights import merge as merging
from burnish.weights.extract import extract
from burnish.weights.merge import merge
from burnish.weights.tensorfile import TensorInfo
from burnish.weights.writer import Plan, output_folder, part_folder, write_tensors

SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background inherits deafness to Ctrl-C
from burnish.weights import merge as merging

plain, names = merging._Merge.compute, []
def slow(self, name, start, stop):
    print(name, flush=True)
    names.append(name)
    time.sleep(2 * (len(names) == 4))
    return plain(self, name, start, stop)
merging._Merge.compute = slow
merging.merge(sys.argv[1], [(sys.argv[2], 1.1)], output=sys.argv[3], threads=1, force=True)
"""


def stop_in_the_middle(base, delta, out, how):
    process = subprocess.Popen([sys.executable, "-c", SLOW, base, delta, out], stdout=subprocess.PIPE, text=True)
    for _ in range(4):
        process.stdout.readline()
    process.send_signal(how)
    assert process.wait() != 0


def test_a_killed_merge_starts_again(family, tmp_path):
    base, tuned, _ = family
    delta, out = extract(base, tuned, output=tmp_path / "delta").path, tmp_path / "out"
    stop_in_the_middle(base, delta, out, signal.SIGKILL)
    assert not out.exists() and part_folder(out).is_dir()
    (part_folder(out) / "vlm").mkdir(exist_ok=True)
    (part_folder(out) / "vlm/left.txt").write_text("by a writer that was killed")
    merge(base, [(delta, 1.1)], output=out)
    assert not part_folder(out).exists() and not (out / "vlm/left.txt").exists()
    merge(base, [(delta, 1.1)], output=tmp_path / "fresh")
    assert_same(weights(out), weights(tmp_path / "fresh"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_was_there_stays_until_the_new_one_is_whole(family, tmp_path, how):
    base, tuned, other = family
    delta, out = extract(base, tuned, output=tmp_path / "delta").path, tmp_path / "out"
    merge(base, tuned=[(other, 1.0)], output=out)
    before = weights(out)
    stop_in_the_middle(base, delta, out, how)
    assert_same(weights(out), before)
    assert part_folder(out).exists() == (how == signal.SIGKILL)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_thread_is_raised_and_nothing_is_left(family, tmp_path, monkeypatch, threads):
    base, tuned, _ = family
    plain, made = merging._Merge.compute, []

    def refuse(self, name, start, stop):
        made.append(name)
        if len(made) > 2:
            raise BurnishError(f"'{name}' is another one", "the one that was recorded")
        return plain(self, name, start, stop)

    monkeypatch.setattr(merging._Merge, "compute", refuse)
    with pytest.raises(BurnishError, match="is another one; expected the one that was recorded"):
        merge(base, tuned=[(tuned, 1.0)], output=tmp_path / "out", threads=threads)
    assert not (tmp_path / "out").exists() and not part_folder(tmp_path / "out").exists()


def test_one_function_is_all_that_the_writer_asks_for(tmp_path):
    tensors = {"a": TensorInfo("F32", (3, 5)), "b": TensorInfo("I64", (0,)), "c": TensorInfo("F16", ())}
    files = {"x/model.safetensors": (tensors, {"format": "pt"})}
    plan = Plan(tmp_path / "out", files, "any", "about.json", "something")
    asked = []

    def compute(name, start, stop):
        asked.append((name, start, stop))
        return np.arange(start, stop).astype(tensors[name].stored)

    with output_folder(plan) as folder:
        assert folder != plan.target and not plan.target.exists()
        digests = write_tensors(plan, folder, compute, 1, "writing", step=4)
    assert asked == [*(("a", k, min(k + 4, 15)) for k in range(0, 15, 4)), ("b", 0, 0), ("c", 0, 1)]
    from safetensors.numpy import load_file

    found = load_file(tmp_path / "out/x/model.safetensors")
    assert np.array_equal(found["a"], np.arange(15, dtype=np.float32).reshape(3, 5)) and found["b"].shape == (0,)
    assert digests.keys() == tensors.keys() and len(set(digests.values())) == 3


def test_a_file_that_becomes_shorter_while_it_is_read(family, tmp_path, monkeypatch):
    base, tuned, _ = family
    plain = merging._Merge.compute

    def cut(self, name, start, stop):
        os.truncate(base / "model.safetensors", 5000)
        return plain(self, name, start, stop)

    monkeypatch.setattr(merging._Merge, "compute", cut)
    with pytest.raises(BurnishError, match="became shorter"):
        merge(base, tuned=[(tuned, 1.0)], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_stays_flat(tmp_path):
    """Peak memory of a merge does not grow with the checkpoint: 4 times the tensors of 8 MB, the same peak."""
    from bench.merge import timed

    rng, peaks = np.random.default_rng(0), []
    values = [rng.normal(size=1 << 21).astype(np.float32) for _ in range(2)]
    for count in (4, 16):
        for name, value in zip(("base", "tuned"), values, strict=True):
            write_file(tmp_path / name / "model.safetensors", {f"layers.{k}.w": ("F32", value) for k in range(count)})
        command = [sys.executable, "-m", "burnish.cli.main", "weights", "merge", str(tmp_path / "base")]
        command += ["--tuned", f"{tmp_path / 'tuned'}=1.1", "-o", str(tmp_path / "out"), "--force", "--threads", "2"]
        peaks.append(timed(command)["rss"])
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 0.2e9


def test_merging_needs_no_torch():
    """PyTorch alone would take the half gigabyte that a merge may."""
    modules = ", ".join(f"burnish.weights.{name}" for name in ("merge", "extract", "control", "inspect", "verify"))
    code = f"import sys, burnish.cli.weights, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
