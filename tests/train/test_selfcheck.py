from types import SimpleNamespace

import numpy as np
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.seeding import generator
from burnish.train import selfcheck


def stats(actions):
    return {"mean": actions.mean(0), "std": actions.std(0), "min": actions.min(0), "max": actions.max(0),
            "q01": np.quantile(actions, 0.01, 0), "q99": np.quantile(actions, 0.99, 0)}  # fmt: skip


def test_a_well_behaved_data_set_has_no_warnings():
    actions = np.random.default_rng(0).normal(size=(2000, 3))
    for mode in ("MEAN_STD", "MIN_MAX", "QUANTILES"):
        assert selfcheck.normalisation_warnings(actions, stats(actions), ["x", "y", "z"], mode) == []


def test_outliers_and_constant_dimensions_are_named():
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(2000, 3))
    known = stats(actions)
    actions[:100, 1] = 50.0  # 5 % of the values lie far outside the statistics
    known["std"][2] = known["max"][2] - known["max"][2]
    lines = selfcheck.normalisation_warnings(actions, known, ["x", "y", "grip"])
    share = np.mean(np.abs(actions[:, 1] - known["mean"][1]) > 4 * known["std"][1])
    assert len(lines) == 2 and f"'y': {share:.1%}" in lines[0] and "'grip' never changes" in lines[1]
    known["max"], known["min"] = np.ones(3), -np.ones(3)
    share = np.mean(np.abs(actions[:, 0]) > 1)
    assert f"'x': {share:.1%}" in selfcheck.normalisation_warnings(actions, known, ["x", "y", "grip"], "MIN_MAX")[0]


def test_loss_band():
    assert selfcheck.loss_warning(1.9, True) == [] and selfcheck.loss_warning(40.0, False) == []
    assert "40" in selfcheck.loss_warning(40.0, True)[0]


def test_missing_statistics(tmp_path):
    with pytest.raises(BurnishError, match="no 'std' of 'action'"):
        selfcheck.check_statistics({"action": {"mean": [0.0]}}, ("action",), tmp_path)
    bad = {"action": {"mean": [0.0], "std": [float("nan")], "min": [0.0], "max": [0.0]}}
    with pytest.raises(BurnishError, match="'std' of 'action' is not finite"):
        selfcheck.check_statistics(bad, ("action",), tmp_path)


def test_statistics_that_are_no_numbers(tmp_path):
    for figure in (None, "x", ["x"], [None], [[1], [1, 2]]):
        bad = {"action": {"mean": figure, "std": [1.0], "min": [0.0], "max": [0.0]}}
        with pytest.raises(BurnishError, match="'mean' of 'action' is not finite"):
            selfcheck.check_statistics(bad, ("action",), tmp_path)


@pytest.fixture(params=["smolvla", "pi0", "burnish_discrete"])
def two_cameras(request, tmp_path):
    from burnish.policies import load_policy
    from workshop.tiny import make_tiny

    policy = load_policy(make_tiny(request.param, tmp_path / "policy", cameras=("top", "wrist")))
    batch = {
        "observation.images.top": torch.rand(4, 3, 32, 32), "observation.images.wrist": torch.zeros(4, 3, 32, 32),
        "observation.state": torch.randn(4, 7), "action": torch.randn(4, 8, 7),
        "action_is_pad": torch.zeros(4, 8, dtype=torch.bool), "task": ["a", "b", "c", "d"],
    }  # fmt: skip
    return policy, batch


def blind(policy, monkeypatch):
    """The wrist camera never reaches the model, as a rename map can have it."""
    plain = policy.preprocessor

    def without(batch):
        return {**(seen := plain(batch)), "observation.images.wrist": torch.zeros_like(seen["observation.images.top"])}

    monkeypatch.setattr(policy, "preprocessor", without)


def test_every_camera_of_a_sound_policy_is_seen(two_cameras):
    policy, batch = two_cameras
    before = torch.get_rng_state()
    assert selfcheck.unseen_cameras(policy.train(), batch) == [] and policy.training
    assert torch.get_rng_state().equal(before)


def test_a_camera_that_reaches_nothing_is_told_and_then_refused(two_cameras, monkeypatch):
    policy, batch = two_cameras
    blind(policy, monkeypatch)
    assert selfcheck.unseen_cameras(policy, batch) == ["wrist"]
    said = []
    run = SimpleNamespace(policy=policy, step=0, recipe=SimpleNamespace(train=SimpleNamespace(steps=100)),
                          say=said.extend, sharded=False, ask=lambda call, *rest: call(*rest))  # fmt: skip
    selfcheck.check_cameras(run, batch)
    assert len(said) == 1 and "camera 'wrist' reaches nothing" in said[0]
    run.step = 5
    selfcheck.check_cameras(run, batch)
    run.step = 10
    with pytest.raises(BurnishError, match=r"'wrist' reaches nothing.*after 10 steps.*--data.cameras='\[top\]'"):
        selfcheck.check_cameras(run, batch)
    run.step = run.recipe.train.steps = 2
    selfcheck.check_cameras(run, batch)
    run.step = 1
    with pytest.raises(BurnishError, match="after 1 steps"):
        selfcheck.check_cameras(run, batch)


def test_a_camera_is_looked_at_where_the_samples_have_it(two_cameras, monkeypatch):
    """With several data sets of which one lacks it: there its pictures are black, and a mask says so."""
    policy, batch = two_cameras
    batch["observation.images.wrist"][2:] = torch.rand(2, 3, 32, 32)
    batch["observation.images.wrist_padding_mask"] = torch.tensor([False, False, True, True])
    with monkeypatch.context() as patch:
        rows, loss = [], policy.loss
        patch.setattr(policy, "loss", lambda seen, draws: (rows.append(seen["task"]), loss(seen, draws))[1])
        assert selfcheck.unseen_cameras(policy, batch) == []
    assert rows == [["a", "b"]] * 2 + [["c", "d"]] * 2
    none = {**batch, "observation.images.wrist_padding_mask": torch.zeros(4, dtype=torch.bool)}
    blind(policy, monkeypatch)
    assert selfcheck.unseen_cameras(policy, batch) == ["wrist"] and selfcheck.unseen_cameras(policy, none) == []


def test_fingerprints_tell_order_and_last_bits():
    a = torch.randn(1000, generator=generator(0))
    swapped = a.clone()
    swapped[[3, 4]] = a[[4, 3]]
    nudged = a.clone()
    nudged[500] = torch.nextafter(a[500], torch.tensor(9.0))
    prints = [selfcheck.fingerprint({"t": t}) for t in (a, a.clone(), swapped, nudged)]
    assert torch.equal(prints[0], prints[1])
    assert not torch.equal(prints[0], prints[2]) and not torch.equal(prints[0], prints[3])
