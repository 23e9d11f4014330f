"""Hostile and broken weights, adapters, deltas and records, and outputs that hold somebody's work."""

import json
import os
import shutil
import struct

import numpy as np
import pytest

from burnish.weights.extract import extract
from burnish.weights.merge import merge
from burnish.weights.writer import read_summary, write_summary

A = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
B = np.random.default_rng(1).normal(size=(5,)).astype(np.float32)
CONFIG = {"input_features": {"observation.state": {"shape": [7]}}, "output_features": {"action": {"shape": [7]}}}


def raw(path, header, data=b"", length=None):
    """A safetensors file of any bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape, begin=0, end=None, dtype="F32"):
    return {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [begin, begin + 4 * int(np.prod(shape)) if end is None else end],
    }


def write(path, tensors):
    header, data = {}, b""
    for name, value in tensors.items():
        header[name] = entry(list(value.shape), len(data))
        data += value.tobytes()
    raw(path, header, data)


def checkpoint(folder, shift=0.0):
    write(folder / "model.safetensors", {"a.weight": A + np.float32(shift), "b.bias": B + np.float32(shift)})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def adapter(folder, settings=None, tensors=None):
    up, down = np.ones((6, 2), np.float32), np.ones((2, 8), np.float32)
    own = {"base_model.model.a.lora_A.weight": down, "base_model.model.a.lora_B.weight": up, **(tensors or {})}
    write(folder / "adapter_model.safetensors", own)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **(settings or {})}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


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


def both_ways(refused, base, broken, tmp_path, *needles):
    """The folder is refused as a fine-tune and as a base, and nothing is left."""
    for words in (["extract", base, broken], ["merge", base, "--tuned", broken], ["merge", broken, "--tuned", base]):
        refused(["weights", *words, "-o", tmp_path / "out"], *needles)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.part").exists()


# --- files of tensors ------------------------------------------------------------------------------------------------

HEADERS = {
    "empty": (lambda f: f.write_bytes(b""), "truncated"),
    "seven bytes": (lambda f: f.write_bytes(b"1234567"), "truncated"),
    "endless header": (lambda f: raw(f, b"{}", length=2**63), "truncated"),
    "longer than the file": (lambda f: raw(f, b"{}", length=3), "truncated"),
    "no JSON": (lambda f: raw(f, b"{'a'}"), "is not JSON"),
    "a list": (lambda f: raw(f, b"[]"), "unreadable header"),
    "null": (lambda f: raw(f, b"null"), "unreadable header"),
    "too deep": (lambda f: raw(f, b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "too deep"),
    "deep": (lambda f: raw(f, b'{"a":' + b"[" * 80 + b"]" * 80 + b"}"), "too deep"),
    "a key twice": (lambda f: raw(f, b'{"a.weight": 1, "a.weight": 2}'), "twice"),
    "no text": (lambda f: raw(f, b"\xff\xfe{}"), "unreadable header"),
    "entry null": (lambda f: raw(f, {"a": None}), "unreadable header"),
    "no offsets": (lambda f: raw(f, {"a": {"dtype": "F32", "shape": [1]}}), "unreadable header"),
    "three offsets": (lambda f: raw(f, {"a": entry([1]) | {"data_offsets": [0, 4, 8]}}, b"1234"), "unreadable header"),
    "negative": (lambda f: raw(f, {"a": entry([-1], end=4)}, b"1234"), "shape"),
    "a fraction": (lambda f: raw(f, {"a": entry([1.0], end=4)}, b"1234"), "shape"),
    "a truth value": (lambda f: raw(f, {"a": entry([True], end=4)}, b"1234"), "shape"),
    "a word": (lambda f: raw(f, {"a": entry([1]) | {"shape": "1"}}, b"1234"), "shape"),
    "huge": (lambda f: raw(f, {"a": entry([2**62], end=4)}, b"1234"), "shape"),
    "huge and empty": (lambda f: raw(f, {"a": entry([0, 2**62], end=0)}), "shape"),
    "a thousand dimensions": (lambda f: raw(f, {"a": entry([1] * 1000, end=4)}, b"1234"), "shape"),
    "dtype a list": (lambda f: raw(f, {"a": entry([1]) | {"dtype": ["F32"]}}, b"1234"), "unreadable header"),
    "dtype unknown": (lambda f: raw(f, {"a": entry([1], dtype="C64", end=8)}, b"12345678"), "dtype C64"),
    "overlap": (lambda f: raw(f, {"a": entry([2]), "b": entry([2], 4)}, b"1" * 12), "do not fit"),
    "a gap": (lambda f: raw(f, {"a": entry([1]), "b": entry([1], 8)}, b"1" * 12), "do not fit"),
    "offsets in fractions": (lambda f: raw(f, {"a": entry([1]) | {"data_offsets": [0.0, 4.0]}}, b"1234"), "do not fit"),
    "offsets in words": (lambda f: raw(f, {"a": entry([1]) | {"data_offsets": ["0", "4"]}}, b"1234"), "do not fit"),
    "too long": (lambda f: raw(f, {"a": entry([1])}, b"12345"), "too long"),
    "metadata a list": (lambda f: raw(f, {"__metadata__": [1], "a": entry([1])}, b"1234"), "__metadata__"),
    "metadata a number": (lambda f: raw(f, {"__metadata__": {"x": 1}, "a": entry([1])}, b"1234"), "__metadata__"),
    "a bell in a name": (lambda f: raw(f, {"a\x07\x1b[2J": entry([1])}, b"1234"), "can be printed"),
    "half a character": (lambda f: raw(f, b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
                         "can be printed"),
    "no name": (lambda f: raw(f, {"": entry([1])}, b"1234"), "can be printed"),
    "a pointer of Git LFS": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"),
                             "git lfs pull"),
    "a pipe": (lambda f: os.mkfifo(f), "is a pipe"),
    "a device": (lambda f: f.symlink_to("/dev/zero"), "outside"),
    "a folder": (lambda f: f.mkdir(), "is a folder"),
    "a link that leads out": (lambda f: f.symlink_to(f.parent.parent / "base/model.safetensors"), "outside"),
    "a link to nothing": (lambda f: f.symlink_to("nowhere"), "a link to nothing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_files_of_tensors(refused, base, tmp_path, kind):
    make, needle = HEADERS[kind]
    (tmp_path / "broken").mkdir()
    make(tmp_path / "broken/model.safetensors")
    both_ways(refused, base, tmp_path / "broken", tmp_path, "broken", needle)


INDICES = {
    "a list": ([], "holds a list"),
    "null": (None, "holds null"),
    "no map": ({"weight_map": ["a"]}, "weight_map"),
    "a number": ({"weight_map": {"a.weight": 3}}, "weight_map"),
    "empty names": ({"weight_map": {"a.weight": ""}}, "weight_map"),
    "metadata": ({"weight_map": {"a.weight": "one.safetensors"}, "metadata": [1]}, "metadata"),
    "upwards": ({"weight_map": {"a.weight": "../base/model.safetensors"}}, "leads out"),
    "absolute": ({"weight_map": {"a.weight": "/dev/zero"}}, "leads out"),
    "home": ({"weight_map": {"a.weight": "~/model.safetensors"}}, "leads out"),
    "a NUL": ({"weight_map": {"a.weight": "one\0.safetensors"}}, "leads out"),
    "no such shard": ({"weight_map": {"a.weight": "two.safetensors"}}, "no file at"),
    "a ghost": ({"weight_map": {"a.weight": "one.safetensors", "ghost": "one.safetensors"}}, "ghost"),
    "left out": ({"weight_map": {}}, "no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDICES)
def test_indices(refused, base, tmp_path, kind):
    content, needle = INDICES[kind]
    write(tmp_path / "broken/one.safetensors", {"a.weight": A})
    (tmp_path / "broken/model.safetensors.index.json").write_text(json.dumps(content))
    refused(["weights", "extract", base, tmp_path / "broken", "--include", "a", "-o", tmp_path / "out"]
            if kind != "left out" else
            ["weights", "extract", tmp_path / "broken", tmp_path / "broken", "-o", tmp_path / "o"], needle)  # fmt: skip


@pytest.mark.parametrize("how", ["pipe", "utf-16", "deep", "twice"])
def test_indices_that_are_no_text(refused, base, tmp_path, how):
    write(tmp_path / "broken/one.safetensors", {"a.weight": A})
    path = tmp_path / "broken/model.safetensors.index.json"
    contents = {"utf-16": "{}".encode("utf-16"), "deep": b"[" * 10000, "twice": b'{"weight_map": {}, "weight_map": {}}'}
    path.write_bytes(contents[how]) if how in contents else os.mkfifo(path)
    both_ways(refused, base, tmp_path / "broken", tmp_path, "index.json")


# --- adapters --------------------------------------------------------------------------------------------------------

ADAPTERS = {
    "another kind": ({"peft_type": "IA3"}, "IA3"),
    "no rank": ({"r": None}, "r is None"),
    "a rank in words": ({"r": "2"}, "r is 2"),
    "rank true": ({"r": True}, "r is True"),
    "rank NaN": ({"r": float("nan")}, "r is nan"),
    "rank 0": ({"r": 0}, "r is 0"),
    "rank 1e9": ({"r": 1e9}, "rank 1e+09"),
    "rank of 5000 digits": ({"r": 10**400}, "r is 1000"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha inf"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
    "CorDA": ({"init_lora_weights": "corda"}, "corda"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "loftq"),
    "a start of tomorrow": ({"init_lora_weights": "next_year"}, "next_year"),
    "a start that is none": ({"init_lora_weights": 3}, "init_lora_weights 3"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora"),
    "bare parameters": ({"target_parameters": ["experts"]}, "target_parameters"),
    "patterns in a list": ({"rank_pattern": ["a"]}, "pattern"),
    "a pattern with a word": ({"alpha_pattern": {"a": "many"}}, "'many'"),
    "a pattern with NaN": ({"alpha_pattern": {"a": float("nan")}}, "nan"),
    "a pattern that is none": ({"alpha_pattern": {"(": 2}}, "regular expression"),
    "a pattern for ever": ({"alpha_pattern": {"(a+)+b": 2}}, "too involved"),
    "a pattern for longer": ({"alpha_pattern": {"a*a*a*a*a*b": 2}}, "too involved"),
    "half a DoRA": ({"use_dora": True}, "use_dora"),
    "a switch in words": ({"use_dora": "yes"}, "use_dora"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(refused, base, tmp_path, kind):
    settings, needle = ADAPTERS[kind]
    adapter(tmp_path / "lora", settings)
    for words in (["extract", base, tmp_path / "lora"], ["merge", base, "--tuned", tmp_path / "lora"]):
        refused(["weights", *words, "-o", tmp_path / "out"], needle)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone(accepted, base, tmp_path, start):
    adapter(tmp_path / "lora", {"init_lora_weights": start})
    accepted(["weights", "extract", base, tmp_path / "lora", "-o", tmp_path / "out", "--verify"])


@pytest.mark.parametrize("tensors, needle", [
    ({"base_model.model.a.lora_A.weight": np.full((2, 8), np.nan, "f4")}, "not finite"),
    ({"base_model.model.a.lora_A.weight": np.ones((2, 9), "f4")}, "shape [6, 9]"),
    ({"base_model.model.a.lora_A.weight": np.ones((2, 8, 1), "f4")}, "linear layer"),
    ({"base_model.model.a.lora_embedding_A": np.ones((2, 8), "f4")}, "kind that is not supported"),
    ({"base_model.model.c.weight": np.ones(3, "f4")}, "the base lacks"),
])  # fmt: skip
def test_adapters_that_do_not_fit(refused, base, tmp_path, tensors, needle):
    adapter(tmp_path / "lora", tensors=tensors)
    refused(["weights", "extract", base, tmp_path / "lora", "-o", tmp_path / "out"], needle)


def test_a_magnitude_of_another_length(refused, base, tmp_path):
    adapter(tmp_path / "lora", {"use_dora": True}, {"base_model.model.a.lora_magnitude_vector": np.ones(5, "f4")})
    refused(["weights", "extract", base, tmp_path / "lora", "-o", tmp_path / "out"], "5 magnitudes")


def test_an_adapter_config_that_is_a_pipe(refused, base, tmp_path):
    (adapter(tmp_path / "lora") / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "lora/adapter_config.json")
    refused(["weights", "extract", base, tmp_path / "lora", "-o", tmp_path / "out"], "is a pipe")


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


# --- options and paths -----------------------------------------------------------------------------------------------

OPTIONS = [
    (["merge", "BASE", "--tuned", "TUNED=nan"], "finite"), (["merge", "BASE", "--tuned", "TUNED=1e999"], "finite"),
    (["merge", "BASE", "--tuned", "TUNED=much"], "--tuned"),
    (["merge", "BASE", "--delta", "nowhere/lr=1e-4/x"], "--delta"),
    (["merge", "BASE", "--tuned", "=1"], "--tuned"), (["merge", "BASE", "--tuned", ""], "--tuned"),
    (["merge", "BASE", "--tuned", "TUNED", "--module", "a=x"], "--module"),
    (["merge", "BASE", "--tuned", "TUNED", "--module", "(=1"], "regular expression"),
    (["merge", "BASE", "--tuned", "TUNED", "--option", "density"], "--option"),
    (["merge", "BASE", "--tuned", "TUNED", "--operator", "ties", "--option", "density=1e999"], "density"),
    (["merge", "BASE", "--tuned", "TUNED", "--operator", "ties", "--option", "density=-1"], "density"),
    (["merge", "BASE", "--tuned", "TUNED", "--operator", "dare", "--option", "seed=" + "9" * 5000], "seed"),
    (["merge", "BASE", "--tuned", "TUNED", "--operator", "../../x:y"], "operator"),
    (["merge", "BASE", "--tuned", "TUNED", "--threads", "-1"], "--threads"),
    (["merge", "BASE", "--tuned", "TUNED", "--threads", "1000000"], "--threads"),
    (["merge", "BASE", "--tuned", "TUNED=1e300"], "too large"),
    (["merge", "x" * 5000, "--tuned", "TUNED"], "no path"), (["merge", "y" * 300, "--tuned", "TUNED"], "no path"),
    (["merge", "~nobody-of-that-name/x", "--tuned", "TUNED"], "~"),
    (["extract", "BASE", "TUNED", "--rename", "a"], "--rename"),
    (["extract", "BASE", "TUNED", "--rename", "(=x"], "--rename"),
    (["extract", "BASE", "TUNED", "--include", "("], "regular expression"),
    (["extract", "BASE", "nowhere"], "no weights at nowhere"), (["extract", "BASE", "/dev/zero"], "device"),
    (["extract", "BASE", "TUNED", "--control", "TUNED", "--strict"], "nothing is recorded"),
    (["control", "TUNED", "flip"], "no delta"), (["inspect", "x" * 5000], "no path"),
    (["inspect", "TUNED"], "no delta"), (["verify", "TUNED"], "no delta"), (["verify", "z" * 5000], "delta"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_options(refused, base, tuned, tmp_path, number):
    words, needle = OPTIONS[number]
    given = [word.replace("BASE", str(base)).replace("TUNED", str(tuned)) for word in words]
    output = [] if words[0] in ("inspect", "verify") else ["-o", tmp_path / "out"]
    refused(["weights", *given, *output], needle)
    assert not (tmp_path / "out").exists()


def test_equals_signs_in_paths(accepted, refused, base, tuned, tmp_path):
    """A path that is there as it stands is a path; else the last sign splits."""
    for name in ("steps=5000", "lr=1e-4/policy"):
        shutil.copytree(tuned, tmp_path / name)
    one = accepted(["weights", "merge", base, "--tuned", tmp_path / "steps=5000", "-o", tmp_path / "m1"])
    accepted(["weights", "merge", base, "--tuned", tmp_path / "lr=1e-4/policy", "-o", tmp_path / "m2"])
    accepted(["weights", "merge", base, "--tuned", f"{tmp_path}/lr=1e-4/policy=1", "-o", tmp_path / "m3"])
    files = [(tmp_path / m / "model.safetensors").read_bytes() for m in ("m1", "m2", "m3")]
    assert files[0] == files[1] == files[2] and "2 of 2 tensors changed" in one
    weights = [read_summary(tmp_path / m / "capability.json", "")["deltas"][0]["weight"] for m in ("m1", "m3")]
    assert weights == [1.0, 1.0]
    line = refused(["weights", "merge", base, "--tuned", f"{tmp_path}/lr=1e-4/polcy", "-o", tmp_path / "m"], "--tuned")
    assert "1e-4/polcy" in line and "--delta" not in line


def test_home_in_paths(accepted, base, tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    accepted(["weights", "extract", "~/base", "~/tuned", "--control", "~/base", "--output=~/d"])
    accepted(["weights", "merge", "~/base", "--delta=~/d=0.5", "--output=~/m", "--verify"])
    accepted(["weights", "control", "~/d", "flip", "--norm-of=~/d", "--output=~/flip"])
    accepted(["weights", "inspect", "~/d", "--other=~/flip"])
    assert (tmp_path / "m/model.safetensors").is_file() and not os.path.exists("~")


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
