"""Hostile and broken records of task vectors and merges, and outputs that hold somebody's work."""

import json
import os

import numpy as np
import pytest
from hostile_weights import CONFIG, A, B, checkpoint, raw, write

from burnish.weights.extract import extract
from burnish.weights.merge import merge
from burnish.weights.writer import read_summary, write_summary


@pytest.fixture
def base(tmp_path):
    return checkpoint(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path):
    return checkpoint(tmp_path / "tuned", 0.25)


@pytest.fixture
def delta(base, tuned, tmp_path):
    return extract(base, tuned, output=tmp_path / "delta").path


@pytest.fixture
def merged(base, delta, tmp_path):
    merge(base, [(delta, 1.0)], output=tmp_path / "merged")
    return tmp_path / "merged"


# --- deltas and records, forged with a fresh seal --------------------------------------------------------------------


def forge(folder, name, change):
    """Apply `change` to a summary and seal it again, as whoever made it could."""
    value = read_summary(folder / name, "")
    changed = change(value)
    write_summary(folder, name, value if changed is None else changed)


def put(*keys, value):
    def change(meta):
        for key in keys[:-1]:
            meta = meta[key]
        meta[keys[-1]] = value

    return change


META = {
    "no tensors": put("tensors", value=[]),
    "an entry null": put("tensors", "a.weight", value=None),
    "integers": put("tensors", "a.weight", "dtype", value="I64"),
    "a shape in words": put("tensors", "a.weight", "shape", value="68"),
    "another shape": put("tensors", "a.weight", "shape", value=[8, 6]),
    "a group of its own": put("tensors", "a.weight", "group", value="other"),
    "a form of its own": put("tensors", "a.weight", "form", value="sparse"),
    "low rank without scales": put("tensors", "a.weight", "form", value="lowrank"),
    "a norm in words": put("tensors", "a.weight", "norm", value="1"),
    "a norm below 0": put("tensors", "a.weight", "norm", value=-1.0),
    "a norm that is none": put("tensors", "a.weight", "norm", value=float("nan")),
    "a norm of 400 digits": put("tensors", "a.weight", "norm", value=10**400),
    "a norm whose square is none": put("tensors", "a.weight", "norm", value=1e200),
    "no digest": put("tensors", "a.weight", "digest", value=None),
    "another digest": put("tensors", "a.weight", "digest", value="0" * 32),
    "no base": put("base", value=None),
    "a base without path": put("base", "path", value=3),
    "a base's tensors": put("base", "tensors", value={"a.weight": 3}),
    "tied to nothing": put("tied", value={"x": "nothing"}),
    "tied in a list": put("tied", value=[1]),
    "an embodiment of words": put("embodiment", value={"action": "7"}),
    "another format": put("format", value=[2]),
    "a tensor more": put("tensors", "more", value={"dtype": "F32", "shape": [1], "group": "vision", "form": "dense",
                                                   "digest": "0", "norm": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", META)
def test_forged_deltas(refused, base, delta, tmp_path, kind):
    forge(delta, "delta.json", META[kind])
    refused(["weights", "merge", base, "--delta", delta, "-o", tmp_path / "out"], "delta")
    if kind not in ("another digest", "a base's tensors"):
        for words in (["control", delta, "flip", "-o", tmp_path / "out"], ["inspect", delta]):
            refused(["weights", *words], "delta")
    assert not (tmp_path / "out").exists()


FIGURES = {
    "geometry": put("geometry", value={"cosine": "much"}), "noise": put("rounding_noise", value="x"),
    "not exact": put("not_exact", value=None), "differences": put("runs_differ", value="all"),
    "renames": put("rename", value=[["("]]), "skipped": put("skipped", value=3),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIGURES)
def test_forged_figures(refused, delta, kind):
    forge(delta, "delta.json", FIGURES[kind])
    for words in (["inspect", delta], ["verify", delta]):
        refused(["weights", *words], "delta.json")


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b"\xff\xfe{\0}\0", b'{"a": 1, "a": 2}', b"[" * 9999, b"{}",
                                     b'{"sealed": 3}', "pipe", "link"])  # fmt: skip
def test_summaries_that_are_none(refused, base, delta, tmp_path, content):
    path = delta / "delta.json"
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content == "link":
        path.symlink_to(base / "config.json")
    else:
        path.write_bytes(content)
    for words in (["inspect", delta], ["merge", base, "--delta", delta, "-o", tmp_path / "out"], ["verify", delta]):
        refused(["weights", *words], "delta.json")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_in_a_delta(refused, base, delta, tmp_path, value):
    """With the digest that fits them."""
    from burnish.weights.tensorfile import TensorFile

    numbers = np.full((6, 8), 0.25)
    numbers[2, 3] = value
    header = {"a.weight": {"dtype": "F64", "shape": [6, 8], "data_offsets": [0, 384]},
              "b.bias": {"dtype": "F64", "shape": [5], "data_offsets": [384, 424]}}  # fmt: skip
    raw(delta / "delta.safetensors", header, numbers.tobytes() + np.full(5, 0.25).tobytes())
    file = TensorFile(delta / "delta.safetensors")

    def change(meta):
        for name, entry in meta["tensors"].items():
            entry["digest"] = file.digest(name)

    forge(delta, "delta.json", change)
    for operator in ("task", "linear", "slerp", "ties", "dare"):
        out = ["weights", "merge", base, "--delta", delta, "--operator", operator, "-o", tmp_path / "out"]
        refused(out, "'a.weight'", "not finite")
    for words in (["control", delta, "flip", "-o", tmp_path / "out"], ["inspect", delta, "--other", delta]):
        refused(["weights", *words], "'a.weight'", "not finite")
    refused(["weights", "verify", delta], "'a.weight'", "not finite")


RECORD = {
    "another kind": put("kind", value="soup"),
    "no deltas": put("deltas", value=[]),
    "a delta null": put("deltas", value=[None]),
    "a weight in words": put("deltas", 0, "weight", value="1"),
    "stored in words": put("deltas", 0, "stored", value="yes"),
    "no operator": put("operator", value=None),
    "an unknown operator": put("operator", value="os.system"),
    "an unknown option": put("options", value={"x": 1}),
    "no weights": put("tensors", "a.weight", "weights", value=None),
    "a vector that is not there": put("tensors", "a.weight", "weights", value=[[7, "a.weight", 1.0]]),
    "a tensor that is not there": put("tensors", "a.weight", "weights", value=[[0, "c.weight", 1.0]]),
    "a tensor of another shape": put("tensors", "a.weight", "weights", value=[[0, "b.bias", 1.0]]),
    "a base that is nowhere": put("base", "path", value="/nowhere/at/all"),
    "a base that is a device": put("base", "path", value="/dev/zero"),
    "a delta that is nowhere": put("deltas", 0, "path", value="/nowhere"),
    "a path that is none": put("base", "path", value="x" * 5000),
    "patterns in words": put("include", value="a"),
    "a tensor less": lambda record: record["tensors"].pop("a.weight") and None,
}  # fmt: skip


@pytest.mark.parametrize("kind", RECORD)
def test_forged_records(refused, merged, kind):
    if kind == "an unknown option":
        forge(merged, "capability.json", put("operator", value="dare"))
    forge(merged, "capability.json", RECORD[kind])
    refused(["weights", "verify", merged])


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("who", ["base", "tuned", "control"])
def test_parents_that_are_not_finite(refused, base, tuned, tmp_path, who, value):
    checkpoint(tmp_path / "control", 0.5)
    bad = A.copy()
    bad[1, 2] = value
    write(tmp_path / who / "model.safetensors", {"a.weight": bad, "b.bias": B})
    three = ["extract", base, tuned, "--control", tmp_path / "control", "-o", tmp_path / "out", "--verify"]
    line = refused(["weights", *three], "'a.weight'")
    assert str(tmp_path / who) in line and not (tmp_path / "out").exists()
    if who != "control":
        merging = ["weights", "merge", base, "--tuned", tuned, "--verify", "-o", tmp_path / "out"]
        for more in ([], ["--operator", "ties"], ["--operator", "dare"]):
            refused([*merging, *more], "'a.weight'")
            assert not (tmp_path / "out").exists()


def test_a_base_with_nan_where_nothing_changes(refused, base, tuned, tmp_path):
    write(base / "model.safetensors", {"a.weight": A, "b.bias": B * np.float32(np.nan)})
    refused(
        ["weights", "merge", base, "--tuned", tuned, "--include", "a.weight", "-o", tmp_path / "out"], "'b.bias'", "NaN"
    )


def test_a_merge_with_nan_is_not_verified(refused, base, tuned, tmp_path):
    from burnish.weights.sources import Checkpoint
    from burnish.weights.tensorfile import whole_digest

    merge(base, tuned=[(tuned, 1.0)], output=tmp_path / "merged")
    for folder in (base, tuned, tmp_path / "merged"):
        write(folder / "model.safetensors", {"a.weight": A * np.float32(np.nan), "b.bias": B})
    digests = {name: Checkpoint(base).digest(name) for name in ("a.weight", "b.bias")}

    def change(record):
        record["base"]["digest"] = whole_digest(digests)
        for name, digest in digests.items():
            record["tensors"][name]["digest"] = digest

    forge(tmp_path / "merged", "capability.json", change)
    refused(["weights", "verify", tmp_path / "merged"], "'a.weight'", "NaN")


# --- outputs that hold somebody's work -------------------------------------------------------------------------------


def works(tmp_path, base, tuned, delta):
    yield ["merge", base, "--tuned", tuned]
    yield ["extract", base, tuned]
    yield ["control", delta, "flip"]


@pytest.mark.parametrize("holds", ["notes.txt", "meta/info.json", "model.safetensors", "delta.json", "capability.json",
                                   "train.json", ".hidden"])  # fmt: skip
def test_folders_that_are_not_ours(refused, untouched, base, tuned, delta, tmp_path, holds):
    target = tmp_path / "mine"
    (target / holds).parent.mkdir(parents=True)
    (target / holds).write_text('{"precious": 1}')
    check = untouched(tmp_path)
    for words in works(tmp_path, base, tuned, delta):
        refused(["weights", *words, "-o", target], "mine")
        refused(["weights", *words, "-o", target, "--force"], "mine", "overwrite")
    check()


def test_what_is_ours_is_replaced(accepted, refused, untouched, base, tuned, delta, merged, tmp_path):
    """With the marker, or without it where the summary is whole (of earlier versions); and of the same kind alone."""
    accepted(["weights", "merge", base, "--tuned", f"{tuned}=2", "-o", merged, "--force"])
    (merged / ".burnish.json").unlink()
    accepted(["weights", "merge", base, "--tuned", f"{tuned}=3", "-o", merged, "--force"])
    assert json.loads((merged / ".burnish.json").read_text())["kind"] == "merged checkpoint"
    check = untouched(tmp_path)
    refused(["weights", "extract", base, tuned, "-o", merged, "--force"], "merged checkpoint")
    refused(["weights", "merge", base, "--tuned", tuned, "-o", delta, "--force"], "task vector")
    check()


def test_a_hidden_folder_that_is_not_ours(refused, untouched, base, tuned, tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part/notes.txt").write_text("mine")
    check = untouched(tmp_path)
    refused(["weights", "merge", base, "--tuned", tuned, "-o", tmp_path / "out"], ".out.part")
    check()


@pytest.mark.parametrize("where", ["file", "file/below", "link", "dangling", "base", ".", "x" * 300])
def test_places_that_cannot_be(refused, untouched, base, tuned, delta, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "dangling").symlink_to("nowhere")
    check = untouched(tmp_path)
    for words in works(tmp_path, base, tuned, delta):
        if (where, words[0]) != ("base", "control"):
            refused(["weights", *words, "-o", tmp_path / where, "--force"])
    check()


def test_inspect_writes_over_nothing(accepted, refused, untouched, delta, base, tmp_path):
    accepted(["weights", "inspect", delta, "--output", tmp_path / "found.json", "--plots", tmp_path / "plots"])
    accepted(["weights", "inspect", delta, "--output", tmp_path / "found.json", "--plots", tmp_path / "plots"])
    (tmp_path / "notes.txt").write_text("mine")
    check = untouched(tmp_path)
    for place in (base / "config.json", base / "model.safetensors", tmp_path / "notes.txt", base, delta / "delta.json",
                  tmp_path / "notes.txt/below.json"):  # fmt: skip
        refused(["weights", "inspect", delta, "--output", place])
    for place in (base, tmp_path / "notes.txt", tmp_path / "notes.txt/below"):
        refused(["weights", "inspect", delta, "--plots", place])
    check()


COMPANIONS = {
    "a link that leads out": (lambda f: f.symlink_to("/etc/hostname"), "outside"),
    "a link upwards": (lambda f: f.symlink_to("../" * 40 + "etc/hostname"), "outside"),
    "a link to a folder outside": (lambda f: f.symlink_to("/etc"), "outside"),
    "a link to a folder": (lambda f: f.symlink_to("."), "is a folder"),
    "a link to nothing": (lambda f: f.symlink_to("nowhere"), "a link to nothing"),
    "a pipe": (lambda f: os.mkfifo(f), "is a pipe"),
    "a pointer of Git LFS": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMPANIONS)
@pytest.mark.parametrize("name", ["tokenizer.json", "vlm/tokenizer.json"])
def test_what_lies_beside_the_weights(refused, base, tuned, tmp_path, name, kind):
    (base / name).parent.mkdir(exist_ok=True)
    COMPANIONS[kind][0](base / name)
    refused(["weights", "merge", base, "--tuned", tuned, "-o", tmp_path / "out"], COMPANIONS[kind][1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["[]", '{"input_features": [1]}', '{"input_features": {"action": null}}', "{",
                                    '{"output_features": {"action": {"shape": "7"}}}', "[" * 9999,
                                    "{}".encode("utf-16"),
                                    '{"output_features": {"action": {"shape": [[7]]}}}'])  # fmt: skip
def test_configs_that_are_none(refused, base, tuned, tmp_path, config):
    (tuned / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    refused(["weights", "extract", base, tuned, "-o", tmp_path / "out"], "config.json")


def test_an_output_whose_name_needs_quotes(accepted, base, tuned, tmp_path):
    (base / "config.json").write_text(json.dumps(CONFIG | {"vlm_model_name": f"{base}/vlm"}))
    accepted(["weights", "merge", base, "--tuned", tuned, "-o", tmp_path / 'a "b"'])
    config = json.loads((tmp_path / 'a "b"/config.json').read_text())
    assert config["vlm_model_name"] == f'{tmp_path}/a "b"/vlm'
