"""Teacher folders, options of `align` and kept features that are not what they should be: one line, nothing run."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_fakes import make_vision
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from burnish.core.errors import BurnishError
from burnish.teachers.base import Views, make_teacher, run_teacher

sys.path.insert(0, str(Path(__file__).parents[1] / "methods" / "align"))

from align_student import load_student  # noqa: E402


@pytest.fixture(autouse=True)
def tiny(monkeypatch, edges):
    import burnish.policies

    monkeypatch.setattr(burnish.policies, "load_policy", load_student)


@pytest.fixture(scope="module")
def whole_vision(tmp_path_factory):
    return make_vision(tmp_path_factory.mktemp("vision") / "whole")


@pytest.fixture
def vision(whole_vision, tmp_path):
    """A vision folder of one's own to damage."""
    return shutil.copytree(whole_vision, tmp_path / "vision")


def words(dataset, output, options):
    return [
        "train", f"--data.root={dataset}", f"--output={output}", "--policy.path=fake", "--train.steps=1",
        "--train.batch_size=2", "--train.self_check=false", f"--objectives=[{{name: align, {options}}}]",
    ]  # fmt: skip


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def link_outside(path):
    other = path.parent.parent / "outside.json"
    shutil.move(path, other)
    path.symlink_to(other)


def shards(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors", metadata={"format": "pt"})


CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
DEEP = "[" * 400 + "]" * 400
FOLDERS = {
    "config a list": (lambda f: (f / CONFIG).write_text("[1, 2]"), "a JSON object"),
    "config null": (lambda f: (f / CONFIG).write_text("null"), "a JSON object"),
    "config cut": (lambda f: (f / CONFIG).write_text('{"model_type": "din'), "is not JSON"),
    "config in UTF-16": (lambda f: (f / CONFIG).write_bytes('{"a": 1}'.encode("utf-16")), "UTF-16"),
    "config binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\x00\xfe" * 9), "UTF-8"),
    "config too deep": (lambda f: (f / CONFIG).write_text(f'{{"a": {DEEP}}}'), "too deep"),
    "config says a key twice": (lambda f: (f / CONFIG).write_text('{"a": 1, "a": 2}'), "twice"),
    "config a pipe": (lambda f: replace_by_pipe(f / CONFIG), "is a pipe"),
    "config a folder": (lambda f: replace_by_folder(f / CONFIG), "is a folder"),
    "config a link outside": (lambda f: link_outside(f / CONFIG), "outside"),
    "config missing": (lambda f: (f / CONFIG).unlink(), "no vision model"),
    "config an LFS pointer": (lambda f: (f / CONFIG).write_text("version https://git-lfs.github.com/spec/v1\n"), "LFS"),
    "type a list": (lambda f: change(f / CONFIG, model_type=["dinov2"]), "a model of type"),
    "type of a language model": (lambda f: change(f / CONFIG, model_type="llama"), "a model of type 'llama'"),
    "type of its own": (lambda f: change(f / CONFIG, model_type="evil"), "a model of type 'evil'"),
    "hidden_size 1e9": (lambda f: change(f / CONFIG, hidden_size=10**9), "hidden_size is 1000000000"),
    "hidden_size negative": (lambda f: change(f / CONFIG, hidden_size=-16), "hidden_size is -16"),
    "hidden_size a word": (lambda f: change(f / CONFIG, hidden_size="large"), "hidden_size is large"),
    "hidden_size true": (lambda f: change(f / CONFIG, hidden_size=True), "hidden_size is True"),
    "hidden_size NaN": (lambda f: change(f / CONFIG, hidden_size=float("nan")), "hidden_size is nan"),
    "hidden_size a fraction": (lambda f: change(f / CONFIG, hidden_size=16.5), "no vision model"),
    "hidden_size of another": (lambda f: change(f / CONFIG, hidden_size=32), "vision"),
    "layers 1e9": (lambda f: change(f / CONFIG, num_hidden_layers=10**9), "num_hidden_layers"),
    "layers more than stored": (lambda f: change(f / CONFIG, num_hidden_layers=4), "lack"),
    "image 1e9": (lambda f: change(f / CONFIG, image_size=10**9), "image_size"),
    "patch 0": (lambda f: change(f / CONFIG, patch_size=0), "no vision model"),
    "patch a list": (lambda f: change(f / CONFIG, patch_size=[7, 7]), "patch_size is [7, 7]"),
    "mlp_ratio 1e9": (lambda f: change(f / CONFIG, mlp_ratio=10**9), "no vision model"),
    "heads 0": (lambda f: change(f / CONFIG, num_attention_heads=0), "no vision model"),
    "heads that do not divide": (lambda f: change(f / CONFIG, num_attention_heads=5), "no vision model"),
    "kernels to fetch": (lambda f: change(f / CONFIG, attn_implementation="someone/kernel"), "attn_implementation"),
    "quantised": (lambda f: change(f / CONFIG, quantization_config={"quant_method": "awq"}), "quantization_config"),
    "a backbone to fetch": (lambda f: change(f / CONFIG, backbone="facebook/dinov2-base"), "backbone is"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}'), "adapters"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "no model.safetensors"),
    "weights a pipe": (lambda f: replace_by_pipe(f / WEIGHTS), "is a pipe"),
    "weights a folder": (lambda f: replace_by_folder(f / WEIGHTS), "is a folder"),
    "weights a link outside": (lambda f: link_outside(f / WEIGHTS), "outside"),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "no vision model"),
    "weights cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]), "no vision model"),
    "weights with a vast header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}" * 40000), "no vision model"),
    "weights an LFS pointer": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "LFS"),
    "weights pickled": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "no model.safetensors"),
    "weights of something else": (lambda f: weights(f, lambda t: {"x": torch.zeros(99999)}), "lack"),
    "weights without a tensor": (lambda f: weights(f, lambda t: dict(sorted(t.items())[1:])), "lack"),
    "weights of another shape": (
        lambda f: weights(f, lambda t: t | {"layernorm.weight": torch.zeros(99)}), "vision"),
    "weights not finite": (
        lambda f: weights(f, lambda t: {n: torch.full_like(w, torch.nan) for n, w in t.items()}), "not finite"),
    "shards outside": (lambda f: shards(f, {"weight_map": {"a": "../../x.safetensors"}}), "leads out"),
    "shards absolute": (lambda f: shards(f, {"weight_map": {"a": "/etc/passwd"}}), "leads out"),
    "shards missing": (lambda f: shards(f, {"weight_map": {"a": "x.safetensors"}}), "no file at"),
    "shards without a map": (lambda f: shards(f, {}), "no weight_map"),
    "shards a list": (lambda f: shards(f, [1]), "a JSON object"),
    "shards named by numbers": (lambda f: shards(f, {"weight_map": {"a": 3}}), "no weight_map"),
    "preprocessor missing": (lambda f: (f / PREPROCESSOR).unlink(), PREPROCESSOR),
    "preprocessor a list": (lambda f: (f / PREPROCESSOR).write_text("[]"), "a JSON object"),
    "preprocessor a pipe": (lambda f: replace_by_pipe(f / PREPROCESSOR), "is a pipe"),
    "mean of two": (lambda f: change(f / PREPROCESSOR, image_mean=[0.5, 0.5]), "three numbers"),
    "mean of words": (lambda f: change(f / PREPROCESSOR, image_mean=["a", "b", "c"]), "three numbers"),
    "mean null": (lambda f: change(f / PREPROCESSOR, image_mean=None), "three numbers"),
    "deviation 0": (lambda f: change(f / PREPROCESSOR, image_std=[0.0, 0.5, 0.5]), "above 0"),
    "deviation infinite": (lambda f: change(f / PREPROCESSOR, image_std=[float("inf")] * 3), "three numbers"),
    "side 1e9": (lambda f: change(f / PREPROCESSOR, crop_size={"height": 10**9}), "size is"),
    "side a word": (lambda f: change(f / PREPROCESSOR, crop_size={"height": "big"}), "size is"),
    "side below a patch": (lambda f: change(f / PREPROCESSOR, crop_size={"height": 3}), "at least one patch"),
    "side negative": (lambda f: change(f / PREPROCESSOR, crop_size=-5), "size is"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_teacher_folder(dataset, vision, tmp_path, refused, case):
    damage, needle = FOLDERS[case]
    damage(vision)
    refused(words(dataset, tmp_path / "run", f"teacher: {{name: folder, path: '{vision}'}}, cache: 'off'"), needle)


@pytest.mark.parametrize("kind", ["dinov2", "evil"])
def test_nothing_in_a_folder_runs(dataset, vision, tmp_path, refused, accepted, kind):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "image_processing_evil.py", "__init__.py"):
        (vision / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_evil.Config", "AutoModel": "modeling_evil.Model"}
    change(vision / CONFIG, model_type=kind, auto_map=auto_map)
    change(vision / PREPROCESSOR, auto_map={"AutoImageProcessor": "image_processing_evil.Processor"},
           image_processor_type="os.system")  # fmt: skip
    run = words(dataset, tmp_path / "run", f"teacher: {{name: folder, path: '{vision}'}}, cache: 'off'")
    if kind == "evil":
        refused(run, "a model of type 'evil'")
    else:
        accepted(run)
    assert not marker.exists()


EDGES = "teacher: 'edges:Edges', "
OPTIONS = [
    "teacher: 5", "teacher: [folder]", "teacher: {path: x}", "teacher: {name: 5}", "teacher: nobody",
    "teacher: {name: folder}", "teacher: {name: folder, path: 7}", "teacher: {name: folder, path: [a]}",
    "teacher: {name: folder, path: /dev/null}", "teacher: {name: folder, path: ''}",
    "teacher: {name: folder, path: x, precision: [1]}", "teacher: {name: folder, path: x, precision: double}",
    "teacher: {name: geometry, grid: 5}", "teacher: {name: geometry, grid: [0, 0]}",
    "teacher: {name: geometry, grid: [1000000000, 4]}", "teacher: {name: geometry, grid: [a, b]}",
    "teacher: {name: scene3d, path: 5}", "teacher: {name: scene3d, path: nowhere}", "teacher: {name: vggt}",
    "teacher: {name: vggt, path: [1]}", "teacher: 'os:system'", "teacher: 'nowhere:Teacher'", "teacher: ''",
    EDGES + "preset: [paper]", EDGES + "preset: 5", EDGES + "select: 5", EDGES + "select: uniform-0",
    EDGES + "select: uniform--3", EDGES + "select: uniform-99999999999", EDGES + "select: ''",
    EDGES + "count: -1", EDGES + "count: 1.5", EDGES + "count: 100000000", EDGES + "count: true",
    EDGES + "pairs: 3", EDGES + "pairs: [3]", EDGES + "pairs: ['ab']", EDGES + "pairs: [[0, 1, 2]]",
    EDGES + "pairs: [[true, 0]]", EDGES + "pairs: [[0, 99999999999]]", EDGES + "pairs: [[0.0, 1]]",
    EDGES + "pairs: {a: 1}", EDGES + "weight: .nan", EDGES + "weight: .inf", EDGES + "weight: -0.1",
    EDGES + "weight: 1e300", EDGES + "weight: '1'", EDGES + "gradient_norm_ratio: -1",
    EDGES + "gradient_norm_ratio: .inf",
    EDGES + "warmup_steps: -1", EDGES + "stop_after: 0", EDGES + "stop_after: 2", EDGES + "decay: maybe",
    EDGES + "pair_weights: [.nan, 1]", EDGES + "pair_weights: [-1, 2]", EDGES + "pair_weights: [0, 0]",
    EDGES + "pair_weights: ['1', 1]", EDGES + "pair_weights: [1]", EDGES + "sharing: [shared]", EDGES + "hidden: -1",
    EDGES + "hidden: 1000000000000", EDGES + "nested: 3", EDGES + "nested_low: 0", EDGES + "nested_high: 1.1",
    EDGES + "pooling: max", EDGES + "positional: -1", EDGES + "positional: 1e300", EDGES + "late_tokens: 1000000000",
    EDGES + "late_tokens: 3", EDGES + "cache: 5", EDGES + "cache_format: zip", EDGES + "components: -1",
    EDGES + "cache_format: pca, components: 1", EDGES + "measure_every: -1", EDGES + "lambda: 1", EDGES + "cache: [a]",
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_an_option(dataset, tmp_path, monkeypatch, refused, options):
    monkeypatch.chdir(tmp_path)
    separate = "" if "cache:" in options else f", cache: '{tmp_path / 'features'}'"
    refused(words(dataset, tmp_path / "run", options + separate))


@pytest.fixture(scope="module")
def whole_cache(dataset, edges, tmp_path_factory):
    """Features of the example teacher as a run has left them."""
    from align_student import recipe

    import burnish.policies
    from burnish.train.run import Run

    folder = tmp_path_factory.mktemp("features") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(burnish.policies, "load_policy", load_student)
        made = recipe(dataset, folder / "run", f"{{name: align, {EDGES} cache: '{folder}'}}")
        Run(made, progress=False)
    return folder


def statistics(folder, edit):
    path = folder / "statistics.safetensors"
    save_file(edit(load_file(path)), path)


META, LAYER, STATISTICS = "meta.json", "layer-0.npy", "statistics.safetensors"
CACHES = {
    "meta a list": lambda f: (f / META).write_text("[]"),
    "meta null": lambda f: (f / META).write_text("null"),
    "meta empty": lambda f: (f / META).write_text(""),
    "meta a pipe": lambda f: replace_by_pipe(f / META),
    "meta without a key": lambda f: (f / META).write_text("{}"),
    "meta with a key that is a list": lambda f: change(f / META, key=[1]),
    "meta without shapes": lambda f: change(f / META, shapes={}),
    "meta with shapes that are numbers": lambda f: change(f / META, shapes={"0": 3, "1": 4}),
    "meta missing": lambda f: (f / META).unlink(),
    "layer a pipe": lambda f: replace_by_pipe(f / LAYER),
    "layer missing": lambda f: (f / LAYER).unlink(),
    "layer empty": lambda f: (f / LAYER).write_bytes(b""),
    "layer cut": lambda f: (f / LAYER).write_bytes((f / LAYER).read_bytes()[:300]),
    "layer a link outside": lambda f: link_outside(f / LAYER),
    "layer of another type": lambda f: np.save(f / LAYER, np.load(f / LAYER).astype(np.float64)),
    "layer of another grid": lambda f: np.save(f / LAYER, np.load(f / LAYER)[:, :, :1]),
    "layer of pickles": lambda f: np.save(f / LAYER, np.array([{}], object), allow_pickle=True),
    "statistics a pipe": lambda f: replace_by_pipe(f / STATISTICS),
    "statistics cut": lambda f: (f / STATISTICS).write_bytes((f / STATISTICS).read_bytes()[:50]),
    "statistics missing": lambda f: (f / STATISTICS).unlink(),
    "statistics without a layer": lambda f: statistics(f, lambda t: {n: x for n, x in t.items() if "0" not in n}),
    "statistics without a scale": lambda f: statistics(f, lambda t: {n: x for n, x in t.items() if n != "scale.0"}),
    "statistics not finite": lambda f: statistics(f, lambda t: t | {"mean.0": t["mean.0"] * torch.nan}),
    "statistics of another width": lambda f: statistics(f, lambda t: t | {"scale.0": torch.ones(3)}),
    "statistics with half a basis": lambda f: statistics(f, lambda t: t | {"basis.0": torch.ones(3, 12)}),
}


@pytest.mark.parametrize("case", CACHES)
def test_kept_features(dataset, whole_cache, tmp_path, refused, case):
    folder = shutil.copytree(whole_cache, tmp_path / "features")
    CACHES[case](folder)
    refused(words(dataset, tmp_path / "run", f"{EDGES} cache: '{folder}'"))


@pytest.mark.parametrize("kind", ["a file", "a pipe", "below a file", "a foreign folder", "a foreign folder beside it"])
def test_a_place_for_features(dataset, tmp_path, refused, untouched, kind):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    place = {"a file": mine / "notes.txt", "a pipe": mine / "pipe", "below a file": mine / "notes.txt/features",
             "a foreign folder": mine, "a foreign folder beside it": mine / "features"}[kind]  # fmt: skip
    if kind == "a pipe":
        os.mkfifo(place)
    if kind == "a foreign folder beside it":
        (mine / "features.partial").mkdir()
        (mine / "features.partial/thesis.txt").write_text("mine")
    check = untouched(mine)
    refused(words(dataset, tmp_path / "run", f"{EDGES} cache: '{place}'"))
    check()


PARTS = {
    "begun a list": lambda f: (f / "begun.json").write_text("[]"),
    "begun a pipe": lambda f: replace_by_pipe(f / "begun.json"),
    "done a pipe": lambda f: replace_by_pipe(f / "done"),
    "done too short": lambda f: (f / "done").write_bytes(b""),
    "done missing": lambda f: (f / "done").unlink(),
    "statistics cut": lambda f: (f / STATISTICS).write_bytes(b"{}"),
    "a layer missing": lambda f: (f / LAYER).unlink(),
    "a layer a pipe": lambda f: replace_by_pipe(f / LAYER),
}


@pytest.mark.parametrize("case", PARTS)
def test_features_that_are_being_filled(dataset, whole_cache, tmp_path, refused, case):
    folder = shutil.copytree(whole_cache, tmp_path / "features.partial")
    key = json.loads((folder / META).read_text())["key"]
    (folder / META).unlink()
    (folder / "begun.json").write_text(json.dumps(key))
    (folder / "done").write_bytes(b"\0")
    PARTS[case](folder)
    refused(words(dataset, tmp_path / "run", f"{EDGES} cache: '{tmp_path / 'features'}'"))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
FIELDS = [
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "mlp_ratio",
    "layer_norm_eps", "hidden_act", "num_channels", "qkv_bias", "image_mean", "image_std", "size", "crop_size",
    "architectures", "dtype", "layerscale_value", "out_features", "pruned_heads",
]  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FIELDS), VALUES)
@example("image_mean", "\n").via("a line in a value")
def test_any_value_of_any_field_is_a_teacher_or_one_line(whole_vision, vision, field, value):
    for name in (CONFIG, PREPROCESSOR):
        shutil.copyfile(whole_vision / name, vision / name)
        change(vision / name, **{field: value})
    try:
        teacher = make_teacher({"name": "folder", "path": str(vision)}, (2, 2))
        views = Views(torch.rand(1, 1, 3, 64, 48), torch.ones(1, 1, dtype=torch.bool), ("front",))
        run_teacher(teacher, views, [0])
    except BurnishError as error:
        assert "\n" not in str(error)
