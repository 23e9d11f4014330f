"""Hostile and broken files of weights, indices, adapters, options and paths."""

import json
import os
import shutil

import numpy as np
import pytest
from hostile_weights import A, adapter, checkpoint, entry, raw, write

from burnish.weights.writer import read_summary


@pytest.fixture
def base(tmp_path):
    return checkpoint(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path):
    return checkpoint(tmp_path / "tuned", 0.25)


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
                         "half a character"),
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
