"""What alignment refuses, and what its kept features depend on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from align_student import load_student, recipe
from feature_fakes import SPEC, fill, make_data, make_key

from burnish.core.errors import BurnishError
from burnish.data import feature_fill as filling
from burnish.methods.align.objective import cache_key
from burnish.methods.align.options import make_config
from burnish.methods.align.targets import LiveTargets
from burnish.teachers.base import TEACHERS, Teacher, make_teacher
from burnish.teachers.placing import Placement
from burnish.train.loop import Run

TEACHER = "teacher: 'edges:Edges'"


@pytest.fixture(scope="module")
def data(dataset):
    return make_data(dataset)


@pytest.fixture
def key(data, edges):
    return make_key(data)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, edges):
    import burnish.policies

    monkeypatch.setattr(burnish.policies, "load_policy", load_student)


@pytest.mark.parametrize("options", [
    {"warmup_steps": -5}, {"hidden": "wide"}, {"pairs": 5}, {"select": 3}, {"ensemble": 2}, {"components": 1.5},
    {"measure_every": None}, {"cache": 5}, {"decay": "false"}, {"weight": float("nan")}, {"workers": 2},
    {"gradient_norm_ratio": "a"},
], ids=str)  # fmt: skip
def test_options_that_cannot_be(options):
    with pytest.raises(BurnishError):
        make_config("default", options)


@pytest.mark.parametrize("spec", [{"name": 5}, {"name": "math:pi"}, {"name": None}])
def test_teachers_that_are_none(spec):
    with pytest.raises(BurnishError):
        make_teacher(spec, (2, 2))


def test_a_local_variable_is_no_option(monkeypatch):
    class Plain(Teacher):
        def __init__(self):
            super().__init__()
            grid = 3
            self.widths, self.identity = (grid,), {"name": "plain"}

    monkeypatch.setitem(TEACHERS._entries, "plain", Plain)
    assert make_teacher({"name": "plain"}, (2, 2)).widths == (3,)


def test_off_is_off_however_yaml_reads_it(dataset, tmp_path):
    for off in ("off", "'off'", "false"):
        made = recipe(dataset, tmp_path / "x", f"{{name: align, {TEACHER}, cache: {off}}}")
        assert isinstance(Run(made, progress=False).objectives["align"].targets, LiveTargets)


def test_without_imitation_there_is_nothing_to_align(dataset, tmp_path):
    made = recipe(dataset, tmp_path / "x", f"{{name: align, {TEACHER}}}", more=["--train.imitation_weight=0"])
    with pytest.raises(BurnishError, match="imitation_weight"):
        Run(made, progress=False)


def test_matching_counts_the_weight_of_imitation(dataset, tmp_path):
    """A quarter of the task's push leaves a quarter of lambda."""
    strengths = []
    for weight in (1.0, 0.25):
        objective = f"{{name: align, {TEACHER}, gradient_norm_ratio: 0.5, measure_every: 1}}"
        made = recipe(dataset, tmp_path / "x", objective, more=[f"--train.imitation_weight={weight}"])
        run = Run(made, progress=False)
        align, policy = run.objectives["align"], run.policy
        batch = run.data.finish(run.data.raw(0), 0)
        with align.watch(run):
            out = policy.loss(batch, policy.draw(5, torch.Generator().manual_seed(0)))
        align.loss(run, batch, out)
        strengths.append(float(align.strength))
    assert strengths[1] == pytest.approx(0.25 * strengths[0], rel=1e-4)


def test_the_key_knows_depth_files_and_settings(data, edges, tmp_path, monkeypatch):
    teacher = make_teacher(SPEC, (2, 2))
    config = make_config("default", {"teacher": SPEC})
    teacher.needs_geometry = True
    monkeypatch.setattr(data, "root", tmp_path)
    (tmp_path / "ground_truth").mkdir()
    (tmp_path / "ground_truth/0.depth.npy").write_bytes(b"near")
    one = cache_key(config, teacher, [(0, 0)], data, ["front"], (2, 2))
    (tmp_path / "ground_truth/0.depth.npy").write_bytes(b"far!")
    two = cache_key(config, teacher, [(0, 0)], data, ["front"], (2, 2))
    assert one.name != two.name and "geometry" not in teacher.identity


def test_cameras_of_two_sizes_and_shapes_are_in_the_key(data, edges, monkeypatch):
    teacher, config = make_teacher(SPEC, (2, 2)), make_config("default", {"teacher": SPEC})
    arrays = {"observation.images.front": np.zeros((1, 32, 32, 3)), "observation.images.side": np.zeros((1, 12, 16, 3))}
    monkeypatch.setattr(data, "frames", SimpleNamespace(arrays=arrays, hash="0" * 16))
    padded = [Placement.whole((32, 32)), Placement(16, 16, 4, 0, 12, 16)]
    one, two = (
        cache_key(config, teacher, [(0, 0)], data, ["front", "side"], (2, 2), placements)
        for placements in (padded, [padded[0], Placement(16, 16, 2, 0, 12, 16)])
    )
    assert one.image_sizes == [[32, 32], [12, 16]] and one.placements == tuple(padded) and one.name != two.name


@pytest.mark.parametrize("file", ["meta.json", "statistics.safetensors", "layer-0.npy"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_features_are_told(tmp_path, key, data, file, how):
    fill(tmp_path / "c", key, data)
    path = tmp_path / "c" / file
    if how == "cut":
        path.write_bytes(path.read_bytes()[:20])
    else:
        path.unlink()
    with pytest.raises(BurnishError):
        fill(tmp_path / "c", key, data)


def test_a_short_list_of_blocks_is_no_whole_cache(tmp_path, key, data, monkeypatch):
    """Blocks that nobody noted are rows of zeros."""
    monkeypatch.setattr(filling, "BLOCK", 8)

    def stop(*_):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(filling, "run_blocks", stop)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "c", key, data)
    (tmp_path / "c.partial/done").write_bytes(b"\x01")
    with pytest.raises(BurnishError, match="notes 1 blocks"):
        fill(tmp_path / "c", key, data)
