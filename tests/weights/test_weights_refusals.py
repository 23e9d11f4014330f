"""What must not be guessed: each refusal is one line that names the culprit, and leaves no file behind."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from weight_files import SHAPES, assert_same, read_file, weights, write_file

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.weights.delta import Delta
from burnish.weights.extract import extract
from burnish.weights.merge import merge
from burnish.weights.sources import Checkpoint
from burnish.weights.verify import verify
from burnish.weights.writer import read_summary, write_summary


def refused(action, *words, tmp_path=None):
    """The action raises one line with these words, and `out` is not there afterwards, nor any hidden part of it."""
    with pytest.raises(BurnishError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    if tmp_path is not None:
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.part").exists()


@pytest.fixture
def delta(family, tmp_path):
    return extract(family[0], family[1], output=tmp_path / "delta").path


def test_another_base(make, family, delta, tmp_path):
    one_number_off = dict(make.values["base"])
    key = "model.vlm.text_model.layers.1.down_proj.weight"
    one_number_off[key] = one_number_off[key].copy()
    one_number_off[key][0, 0] += 1e-3
    other = make.save("other", one_number_off)
    refused(lambda: merge(other, [(delta, 1.0)], output=tmp_path / "out"), "is not the one", key, tmp_path=tmp_path)
    merge(other, [(delta, 1.0)], output=tmp_path / "out", other_base=True)


def test_a_base_with_other_tensors(make, family, delta, tmp_path):
    fewer = {k: v for k, v in make.values["base"].items() if "norm" not in k}
    lacking = make.save("lacking", fewer)
    refused(lambda: merge(lacking, [(delta, 1.0)], output=tmp_path / "out"), "another base", "norm", tmp_path=tmp_path)
    refused(lambda: merge(lacking, [(delta, 1.0)], output=tmp_path / "out", other_base=True), "the base lacks", "norm",
            "--exclude", tmp_path=tmp_path)  # fmt: skip
    extra = make.save("extra", make.values["base"] | {"model.more": np.ones(3, np.float32)})
    refused(lambda: merge(extra, [(delta, 1.0)], output=tmp_path / "out"), "another base", "model.more")


@pytest.mark.parametrize("who", ["tuned", "control"])
def test_missing_and_extra_tensors(make, family, tmp_path, who):
    lacking = make.save("lacking", {k: v for k, v in make.values["tuned"].items() if "norm" not in k})
    extra = make.save("extra", make.values["tuned"] | {"projector.weight": np.ones((3, 3), np.float32)})
    for folder, culprit in ((lacking, "norm"), (extra, "projector")):
        pair = {"tuned": family[1], "control": family[2], who: folder}
        refused(lambda pair=pair: extract(family[0], output=tmp_path / "out", **pair), culprit, "--exclude",
                tmp_path=tmp_path)  # fmt: skip
    extract(family[0], extra, output=tmp_path / "out", exclude=["projector"])


def test_shapes_that_differ(make, family, tmp_path):
    shapes = SHAPES | {"model.vlm.text_model.layers.0.q_proj.weight": (33, 41)}
    other = make("other", 5, shapes=shapes)
    refused(lambda: extract(family[0], other, output=tmp_path / "out"), "q_proj", "[33, 41]", tmp_path=tmp_path)


def test_heads_need_a_rule(make, family, tmp_path):
    """Another robot: the head has another width in the fine-tune, or the base acts in another space."""
    shapes = SHAPES | {"model.action_in_proj.weight": (12, 14)}
    wide = make("wide", 5, shapes=shapes)
    refused(lambda: extract(family[0], wide, output=tmp_path / "out"), "head", "action_in_proj", "--heads skip",
            tmp_path=tmp_path)  # fmt: skip
    assert "model.action_in_proj.weight" not in extract(family[0], wide, output=tmp_path / "out", heads="skip").tensors


def test_heads_in_a_merge_across_robots(make, family, delta, tmp_path):
    make.joints = 14
    other = make("other", 9)
    refused(lambda: merge(other, [(delta, 1.0)], output=tmp_path / "out", other_base=True), "head", "across robots",
            "--heads", tmp_path=tmp_path)  # fmt: skip
    merge(other, [(delta, 1.0)], output=tmp_path / "out", other_base=True, heads="skip")
    got, before = weights(tmp_path / "out"), weights(other)
    for key in SHAPES:
        same = np.array_equal(got[key], before[key])
        assert same == ("action_" in key or before[key].size == 0), key
    merge(other, [(delta, 1.0)], output=tmp_path / "kept", other_base=True, heads="keep")
    assert not np.array_equal(weights(tmp_path / "kept")["model.action_in_proj.weight"],
                              before["model.action_in_proj.weight"])  # fmt: skip


def test_truncated_files(family, delta, tmp_path):
    def cut(path):
        path.write_bytes(path.read_bytes()[:-100])

    short = tmp_path / "short"
    shutil.copytree(family[1], short)
    cut(short / "model.safetensors")
    refused(lambda: extract(family[0], short, output=tmp_path / "out"), "truncated", "short", tmp_path=tmp_path)
    cut(delta / "delta.safetensors")
    refused(lambda: merge(family[0], [(delta, 1.0)], output=tmp_path / "out"), "truncated", tmp_path=tmp_path)
    (short / "model.safetensors").write_bytes(b"PK\x03\x04")
    refused(lambda: Checkpoint(short), "no safetensors file")


@pytest.mark.parametrize("position", [-1, -20000, 4000])
def test_tampered_numbers(family, delta, tmp_path, position):
    path = delta / "delta.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)
    refused(lambda: merge(family[0], [(delta, 1.0)], output=tmp_path / "out"), "delta.safetensors", "damaged",
            tmp_path=tmp_path)  # fmt: skip


def test_tampered_metadata(family, delta, tmp_path):
    path = delta / "delta.json"
    original = path.read_text()
    path.write_text(original.replace('"not_exact": 0', '"not_exact": 3'))
    refused(lambda: Delta(delta), "changed after it was written")
    path.write_text(original)
    meta = read_summary(path, "")
    write_summary(delta, "delta.json", meta | {"format": 1, "low": "ab"})  # with what float32 lacks in another file
    refused(lambda: Delta(delta), "format 1", "extract it again")
    write_summary(delta, "delta.json", meta | {"format": 1, "low": ""})
    assert Delta(delta).norm() > 0


def test_a_changed_merge_is_noticed(family, delta, tmp_path):
    merge(family[0], [(delta, 1.0)], output=tmp_path / "merged")
    path = tmp_path / "merged/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(lambda: verify(tmp_path / "merged"), "damaged")
    refused(lambda: verify(family[0]), "no delta at")


def test_too_little_disk(family, delta, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(lambda: merge(family[0], [(delta, 1.0)], output=tmp_path / "out"), "needs", "MB left", tmp_path=tmp_path)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    refused(lambda: merge(family[0], [(delta, 1.0)], output=tmp_path / "out"), "no room left", tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}, "do not fit its shape"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}, "do not fit its shape"),
        ({"dtype": "C64", "shape": [3], "data_offsets": [0, 12]}, "dtype C64"),
        ({"dtype": "F32", "shape": [3]}, "unreadable header"),
        ("F32", "unreadable header"),
    ],
)
def test_headers_that_lie(tmp_path, entry, words):
    text = json.dumps({"w": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)
    refused(lambda: Checkpoint(tmp_path), words)


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    refused(lambda: Checkpoint(tmp_path), "no weights", "safe_serialization")


def test_an_index_that_does_not_fit(make, tmp_path):
    folder = make("cut", 0, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: Checkpoint(folder), "model.ghost", "missing from the shards")


def test_an_existing_output_is_kept(family, delta, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/precious").write_text("x")
    refused(lambda: merge(family[0], [(delta, 1.0)], output=tmp_path / "there"), "exists", "--force")
    assert (tmp_path / "there/precious").read_text() == "x"
    refused(lambda: merge(family[0], [(delta, 1.0)], output=tmp_path / "there", force=True), "precious", "overwrite")
    assert (tmp_path / "there/precious").read_text() == "x"
    merge(family[0], [(delta, 1.0)], output=tmp_path / "ours")
    merge(family[0], [(delta, 0.0)], output=tmp_path / "ours", force=True)
    assert_same(weights(tmp_path / "ours"), weights(family[0]))


def test_a_finished_command_is_not_repeated(family, delta, tmp_path):
    merge(family[0], [(delta, 1.0)], output=tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    merge(family[0], [(delta, 1.0)], output=tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(BurnishError, match="exists"):
        merge(family[0], [(delta, 1.1)], output=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--delta", "{delta}=much"], "'much'"),
        (["--delta", "{delta}", "--operator", "magic"], "unknown merge operator 'magic'"),
        (["--delta", "{delta}", "--operator", "ties", "--option", "density=lots"], "density"),
        (["--delta", "{delta}", "--option", "drop=0.5"], "no option 'drop'"),
        (["--delta", "{delta}", "--include", "nothing_like_it"], "matches no tensor"),
        (["--delta", "{delta}", "--include", "("], "regular expression"),
        (["--delta", "nowhere"], "no delta at nowhere"),
        ([], "nothing to merge"),
    ],
)
def test_one_line_on_the_command_line(family, delta, tmp_path, capsys, arguments, words):
    given = [text.replace("{delta}", str(delta)) for text in arguments]
    assert main(["weights", "merge", str(family[0]), "-o", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("burnish weights merge: ") and error.count("\n") == 1


def test_quantised_weights_are_refused(make, family, delta, tmp_path):
    tensors = {k: ("F32", v) for k, v in make.values["base"].items()}
    tensors["model.vlm.lm_head.weight"] = ("I64", np.zeros(SHAPES["model.vlm.lm_head.weight"], np.int64))
    folder = tmp_path / "quantised"
    write_file(folder / "model.safetensors", tensors | {"model.position_ids": ("I64", np.arange(5))})
    refused(lambda: merge(folder, [(delta, 1.0)], output=tmp_path / "out", other_base=True, heads="skip"), "I64",
            "unquantised")  # fmt: skip
    assert read_file(folder / "model.safetensors")
