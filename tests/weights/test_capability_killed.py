"""A killed command leaves nothing half done under its name, and goes on where it stopped."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from capability_files import assert_same, weights, write_file

from burnish.weights import engine
from burnish.weights.extract import extract
from burnish.weights.merge import Merging, merge
from burnish.weights.tensorfile import TensorFile

SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background inherits deafness to Ctrl-C
from burnish.weights import engine
from burnish.weights.merge import merge

plain = engine.Writer._done
def slow(self, name, slot):
    plain(self, name, slot)
    print(name, flush=True)
    time.sleep(0.3)
engine.Writer._done = slow
merge(sys.argv[1], [(sys.argv[2], 1.1)], output=sys.argv[3], undoable=True, threads=1)
"""


def kill_in_the_middle(base, delta, out, how=signal.SIGKILL):
    process = subprocess.Popen([sys.executable, "-c", SLOW, base, delta, out], stdout=subprocess.PIPE, text=True)
    done = [process.stdout.readline().strip() for _ in range(4)]
    process.send_signal(how)
    process.wait()
    return done


@pytest.mark.parametrize("damage", [False, True])
def test_killed_merge_goes_on(family, tmp_path, monkeypatch, damage):
    base, tuned, _ = family
    delta = extract(base, tuned, output=tmp_path / "delta").path
    done = kill_in_the_middle(base, delta, tmp_path / "out")
    part = engine.part_folder(tmp_path / "out")
    assert not (tmp_path / "out").exists() and part.is_dir()
    if damage:  # as after a power cut: the journal knows of data that never reached the disk
        first = json.loads((part / engine.JOURNAL).read_text().splitlines()[0])["name"]
        slot_file = part / "model.safetensors"
        content = bytearray(slot_file.read_bytes())
        from burnish.weights.tensorfile import TensorFile

        slot = TensorFile(slot_file).slots[first]
        content[slot.offset] ^= 1
        slot_file.write_bytes(content)
    made = []
    plain = Merging.piece
    monkeypatch.setattr(Merging, "piece", lambda self, w, name, *at: (made.append(name), plain(self, w, name, *at))[1])
    merge(base, [(delta, 1.1)], output=tmp_path / "out", undoable=True)
    assert (done[0] in made) == damage and done[1] not in made and not part.exists()
    merge(base, [(delta, 1.1)], output=tmp_path / "fresh", undoable=True)
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "fresh"))
    undo = "capability_undo.safetensors"
    assert (tmp_path / "out" / undo).read_bytes() == (tmp_path / "fresh" / undo).read_bytes()


def test_another_command_starts_over(family, tmp_path):
    base, tuned, other = family
    delta = extract(base, tuned, output=tmp_path / "delta").path
    kill_in_the_middle(base, delta, tmp_path / "out", signal.SIGINT)
    assert engine.part_folder(tmp_path / "out").is_dir()
    second = extract(base, other, output=tmp_path / "second").path
    merge(base, [(second, 1.0)], output=tmp_path / "out")
    assert_same(weights(tmp_path / "out"), weights(other))


def test_memory_stays_flat(tmp_path):
    """Peak memory of a merge does not grow with the checkpoint: 4 times the tensors of 8 MB, the same peak."""
    from bench.merge import timed

    rng, peaks = np.random.default_rng(0), []
    values = [rng.normal(size=1 << 21).astype(np.float32) for _ in range(2)]
    for count in (4, 16):
        for name, value in zip(("base", "tuned"), values, strict=True):
            write_file(tmp_path / name / "model.safetensors", {f"layers.{k}.w": ("F32", value) for k in range(count)})
        command = [sys.executable, "-m", "burnish.cli.main", "capability", "merge", "--base", str(tmp_path / "base")]
        command += ["--tuned", f"{tmp_path / 'tuned'}=1.1", "-o", str(tmp_path / "out"), "--force", "--threads", "2"]
        peaks.append(timed(command)["rss"])
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 0.2e9


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's list of mappings")
def test_reading_every_second_tensor_leaves_nothing_mapped(tmp_path):
    """Linux maps the neighbours of a page that is read: they belong to tensors that another process handles."""
    path, size = tmp_path / "model.safetensors", 1 << 18
    write_file(path, {f"w{k:02}": ("F32", np.ones(size, np.float32)) for k in range(32)})
    file = TensorFile(path)
    for name in sorted(file.slots)[::2]:
        assert file.raw(name, 0, size).sum() > 0
        file.release(name, 0, size)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    (at,) = (k for k, line in enumerate(lines) if line.endswith(str(path)))
    resident = next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))
    assert resident <= 64, f"{resident} kB of the file stayed in memory"


def test_merging_needs_no_torch():
    """PyTorch alone would take the half gigabyte that a merge may."""
    modules = ", ".join(
        f"burnish.methods.capability.{name}" for name in ("merge", "extract", "unmerge", "verify", "cli")
    )
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
