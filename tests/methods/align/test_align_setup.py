"""Before the first step: which teacher, which pairs, one fill for several ranks, and what is stored."""

import json
import logging

import fake
import numpy as np
import pytest
import torch
from align_student import load_student, recipe
from safetensors.torch import load_file, save_file

from burnish.core.errors import BurnishError
from burnish.methods.align.analysis import Comparison, all_selections
from burnish.methods.align.layers import check_pairs
from burnish.methods.align.targets import VISION, choose_teacher
from burnish.train.loop import Run, train

TEACHER = "teacher: 'edges:Edges'"


@pytest.fixture(autouse=True)
def tiny(monkeypatch, edges):
    import burnish.policies

    monkeypatch.setattr(burnish.policies, "load_policy", load_student)


def test_the_default_teacher_follows_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data set"
    with pytest.raises(BurnishError, match=r"keeps no depth.*try: hf download facebook/dinov2-small --local-dir data"):
        choose_teacher(root, ["front"])
    VISION.mkdir(parents=True)
    (VISION / "config.json").write_text("{}")
    assert choose_teacher(root, ["front"]) == {"name": "folder", "path": "data/teachers/vision"}
    truth = root / "ground_truth"
    truth.mkdir(parents=True)
    row = {"episode_index": 0, "task_id": "libero:goal/0", "length": 9, "frames": "x/000000.jsonl"}
    (truth / "episodes.jsonl").write_text(json.dumps(row) + "\n")
    assert choose_teacher(root, ["front"])["name"] == "folder"  # recorded without depth
    (truth / "x").mkdir()
    np.save(truth / "x/000000.front.depth.npy", np.zeros((9, 2, 2), np.float16))
    assert choose_teacher(root, ["front"]) == {"name": "geometry"}
    assert choose_teacher(root, ["front", "wrist"])["name"] == "folder"
    (truth / "episodes.jsonl").write_text(json.dumps({**row, "task_id": "tabletop:lift"}) + "\n")
    assert choose_teacher(root, ["front", "wrist"]) == {"name": "geometry"}  # put back and rendered


def test_a_run_without_a_teacher_says_which_command_makes_one(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BurnishError, match="keeps no depth.*hf download") as error:
        Run(recipe(dataset, tmp_path / "x", "{name: align}"), progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "words"), [
    ("preset: paper", r"e2m_last1 makes 1 of 10 pairs, \[\[2, 1\]\]: the student has 3 layers, the teacher 2"),
    ("select: uniform-8", "uniform-8 makes 2 of 8 pairs"),
    ("", ""), ("select: uniform-2", ""), ("preset: spatial_forcing", ""),
])  # fmt: skip
def test_a_strategy_that_finds_fewer_pairs_says_so(dataset, tmp_path, caplog, options, words):
    with caplog.at_level(logging.WARNING, "burnish"):
        Run(recipe(dataset, tmp_path / "x", f"{{name: align, {TEACHER}, {options}}}"), progress=False)
    import re

    assert bool(re.search(words, caplog.text)) if words else "pairs" not in caplog.text


@pytest.mark.parametrize("student", [1, 2, 3, 4, 16, 18, 32])
@pytest.mark.parametrize("teacher", [1, 2, 3, 6, 12, 24])
def test_every_selection_names_layers_that_exist(student, teacher):
    rng = np.random.default_rng(0)
    comparison = Comparison(rng.random((student, teacher)), rng.random(student - 1).tolist(), 1)
    for count in (1, 3, 10):
        for name, pairs in all_selections(comparison, count).items():
            assert name == "sim-1-top" or name == "sim-1-last" or pairs, name
            if pairs:
                assert check_pairs(pairs, student, teacher) == pairs, name


def test_ranks_wait_at_no_barrier_for_frames_and_features(dataset, tmp_path, monkeypatch):
    def late(*_):
        raise AssertionError("a barrier of ranks has a time limit, filling has none")

    for name in ("main_process_first", "local_main_process_first", "wait_for_everyone"):
        monkeypatch.setattr(f"accelerate.Accelerator.{name}", late)
    made = recipe(dataset, tmp_path / "x", f"{{name: align, {TEACHER}, cache: '{tmp_path / 'features'}'}}")
    assert Run(made, progress=False).objectives["align"].targets.cache.folder.is_dir()


def test_one_process_fills_and_the_other_waits_and_finds(dataset, tmp_path, edges, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from feature_fakes import fill, make_data, make_key

    from burnish.data import feature_fill

    data, fills, original = make_data(dataset), [], feature_fill._fill
    monkeypatch.setattr(feature_fill, "_fill", lambda *a: (fills.append(a), original(*a)))
    with ThreadPoolExecutor(2) as pool:
        caches = list(pool.map(lambda _: fill(tmp_path / "c", make_key(data), data), range(2)))
    assert len(fills) == 1 and all(np.array_equal(caches[0].arrays[t], caches[1].arrays[t]) for t in (0, 1))


def as_earlier_versions_stored_it(folder):
    """Write a shared projector's tensors once for each pair."""
    path = folder / "burnish/objectives.safetensors"
    tensors = load_file(path)
    for name in [n for n in tensors if ".members.0.0." in n]:
        tensors[name.replace(".members.0.0.", ".members.0.1.")] = tensors[name].clone()
    save_file(tensors, path)


def test_a_shared_projector_is_stored_once_and_old_checkpoints_go_on(dataset, tmp_path):
    objective, more = f"{{name: align, {TEACHER}}}", ["--train.steps=8", "--train.keep_checkpoints=2"]
    whole = train(recipe(dataset, tmp_path / "whole", objective, more=more), progress=False)
    kept = load_file(tmp_path / "whole/checkpoints/last/burnish/objectives.safetensors")
    assert sorted({name.split(".")[4] for name in kept if ".members." in name}) == ["0"]
    begun = recipe(dataset, tmp_path / "begun", objective, more=more)
    train(begun, progress=False)
    for folder in ("checkpoints/000008", "policy", "train.json"):
        path = tmp_path / "begun" / folder
        path.unlink() if path.is_file() else __import__("shutil").rmtree(path)
    (tmp_path / "begun/checkpoints/last").unlink()
    as_earlier_versions_stored_it(tmp_path / "begun/checkpoints/000004")
    resumed = train(begun, progress=False)
    fake.assert_same_weights(whole.policy, resumed.policy)


def test_a_tensor_that_is_no_copy_is_still_refused(dataset, tmp_path):
    from burnish.train import checkpoint

    made = recipe(dataset, tmp_path / "x", f"{{name: align, {TEACHER}}}")
    train(made, progress=False)
    folder = tmp_path / "x/checkpoints/000012"
    as_earlier_versions_stored_it(folder)
    path = folder / "burnish/objectives.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if ".members.0.1." in n and n.endswith("fc1.weight"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, path)
    with pytest.raises(BurnishError, match="extra tensor 'align.aligner.projectors.members.0.1.fc1.weight'"):
        checkpoint.load(Run(made, progress=False), folder)


@pytest.mark.parametrize("sharing", ["shared", "trunk", "independent", "same_start"])
def test_no_way_of_sharing_stores_a_tensor_twice(sharing):
    from burnish.methods.align.aligner import Projectors

    projectors = Projectors(8, (6, 6, 6), 12, (12,) * 3, sharing, True, torch.Generator().manual_seed(0))
    stored = projectors.state_dict()
    assert len({t.data_ptr() for t in stored.values()}) == len(stored)
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in projectors.parameters())
    different = Projectors(8, (6, 5, 4), 12, (12,) * 3, "trunk", True, torch.Generator().manual_seed(0))
    assert projectors.similarity().isfinite() and different.similarity() == 1  # nothing of equal shape to compare
