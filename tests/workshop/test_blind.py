"""What studies of auxiliary losses measure with: a probe, a teacher that knows nothing, a base that has forgotten."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch

from burnish.policies import load_policy
from burnish.teachers.base import Views
from burnish.teachers.geometry import GeometryTeacher
from workshop.blind import blind
from workshop.probe import OtherScene, explained, main, occupied


def test_what_is_linear_in_the_features_is_explained_and_nothing_else():
    draws = np.random.default_rng(0)
    features = draws.normal(size=(300, 4, 6))
    linear = features @ draws.normal(size=(6, 2)) + np.arange(4)[:, None]
    assert explained(features, linear).mean() > 0.99
    assert abs(explained(features, draws.normal(size=linear.shape) + np.arange(4)[:, None]).mean()) < 0.1
    noisy = linear + linear.std() * draws.normal(size=linear.shape)
    assert explained(features, noisy).mean() == pytest.approx(0.5, abs=0.08)


def test_a_cell_is_occupied_by_the_centres_in_it():
    found = occupied(np.array([[[0.1, 0.1], [0.9, 0.1], [0.95, 0.2]], [[0.3, 0.6], [0.3, 0.6], [1.0, 1.0]]]), 16)
    assert np.flatnonzero(found[0, :, 0]).tolist() == [0, 3] and np.flatnonzero(found[1, :, 0]).tolist() == [9, 15]


def test_the_teacher_of_another_scene_gives_what_the_right_one_gives_elsewhere():
    depth, points = torch.rand(6, 1, 8, 8), torch.rand(6, 1, 8, 8, 3)
    views = Views(torch.zeros(6, 1, 3, 8, 8), torch.ones(6, 1, dtype=torch.bool), ("front",), depth, points)
    right, other = (kind([2, 2]).features(views, [0, 2]) for kind in (GeometryTeacher, OtherScene))
    for layer in (0, 2):
        torch.testing.assert_close(other[layer], right[layer][[3, 4, 5, 0, 1, 2]], rtol=0, atol=0)
    assert OtherScene([2, 2]).identity != GeometryTeacher([2, 2]).identity


def test_blinding_draws_the_named_matrices_anew_and_keeps_the_rest(tiny_smolvla, tmp_path):
    assert blind(str(tiny_smolvla), tmp_path / "blind") > 0
    before, after = (load_policy(folder).state_dict() for folder in (tiny_smolvla, tmp_path / "blind"))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed and all("q_proj" in name and "text_model" in name for name in changed)
    for name in changed:
        assert after[name].std() == pytest.approx(float(before[name].float().std()), rel=0.2)


def test_what_was_kept_is_handed_out_again(tmp_path):
    (tmp_path / "probe.json").write_text(json.dumps({"values": [1.0], "target": [0.5, 0.25]}))
    args = Namespace(policy=str(tmp_path / "probe.json"), output=str(tmp_path / "out.json"), kept="target")
    assert main(args) == 0 and json.loads((tmp_path / "out.json").read_text()) == {"values": [0.5, 0.25]}
