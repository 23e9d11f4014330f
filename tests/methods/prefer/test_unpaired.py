"""Losses without pairs, pairs that are held out, and what a dimension counts."""

import json
import math
import shutil

import fake
import numpy as np
import pytest
import torch

from burnish import train
from burnish.core.errors import BurnishError
from burnish.data.pairs import OutcomeData, Pair, PairData, write_index
from burnish.data.pairs_import import import_pairs
from burnish.methods.prefer import losses
from burnish.methods.prefer import scoring as heldout
from burnish.methods.prefer.draws import ScoreConfig, make_draws
from burnish.methods.prefer.options import make_config


def test_kto_in_closed_form():
    change, drift = torch.tensor([1.0, -2.0, 1.0]), torch.tensor(0.5)
    found = losses.kto(change, torch.tensor([True, True, False]), 0.3, drift)
    sigmoid = [1 / (1 + math.exp(-z)) for z in (0.3 * 0.5, 0.3 * -2.5, 0.3 * 0.5)]
    assert found.tolist() == pytest.approx([1 - sigmoid[0], 1 - sigmoid[1], sigmoid[2]])
    below = losses.kto(change, torch.tensor([True] * 3), 0.3, torch.tensor(-4.0))
    torch.testing.assert_close(below, losses.kto(change, torch.tensor([True] * 3), 0.3, torch.tensor(0.0)))


def test_kto_raises_successes_and_lowers_failures():
    change = torch.zeros(2, requires_grad=True)
    losses.kto(change, torch.tensor([True, False]), 1.0, torch.tensor(0.0)).sum().backward()
    assert change.grad[0] < 0 < change.grad[1]


@pytest.mark.parametrize("options", [
    {"loss": "kto", "label_smoothing": 0.1}, {"loss": "kto", "reference": "none"}, {"loss": "kto", "batch_size": 1},
    {"held_out": 1.0}, {"held_out": -0.1}, {"held_out": math.nan}, {"loss": "kot"},
], ids=str)  # fmt: skip
def test_options_that_cannot_be(options):
    with pytest.raises(BurnishError):
        make_config("default", {"pairs": "x", **options})


def test_held_out_pairs_share_no_episode_with_the_others():
    pairs = [Pair((4 * g + i, 0), (4 * g + 3, i)) for g in range(20) for i in range(3)]
    trained, held = heldout.split(pairs, 0.25)
    assert sorted([*trained, *held]) == list(range(60)) and 12 <= len(held) <= 15
    episodes = [{e for i in ids for e in (pairs[i].chosen[0], pairs[i].rejected[0])} for ids in (trained, held)]
    assert not episodes[0] & episodes[1]
    assert heldout.split(pairs, 0.25)[1].tolist() == held.tolist()
    assert not len(heldout.split(pairs, 0.0)[1]) and not len(heldout.split(pairs[:3], 0.5)[1])


@pytest.fixture
def root(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "pairs")


@pytest.fixture
def fake_policy(monkeypatch):
    fake.register(monkeypatch.setattr)
    monkeypatch.setattr(fake.FakePolicy, "n_action_steps", 2, raising=False)


def run(dataset, output, root, *more, **options):
    entry = {"name": "prefer", "pairs": str(root), "batch_size": 6, "pool": 2, "score": {"draws": 2}} | options
    words = [f"--objectives={json.dumps([entry])}", "--train.imitation_weight=0", *more]
    return fake.figures(train(fake.recipe(dataset, output, *words), progress=False).output / "metrics.jsonl")


def test_outcomes_of_episodes_train_without_a_pair(dataset, root, tmp_path, fake_policy):
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"episode": e, "success": e != 1}) + "\n" for e in range(3)))
    import_pairs(root, labels, progress=False)
    rows = run(dataset, tmp_path / "run", root, "--train.steps=60", "--train.log_every=1", loss="kto", beta=0.5)
    assert rows[0]["loss_prefer"] == pytest.approx(0.5, abs=1e-6) and rows[0]["prefer_drift"] == 0
    assert rows[-1]["prefer_desirable"] > rows[-1]["prefer_undesirable"] and "prefer_margin" not in rows[0]
    assert np.isfinite(rows[-1]["loss_prefer_sft"])
    cloned = run(dataset, tmp_path / "clone", root, "--train.steps=2", loss="clone")
    assert np.isfinite(cloned[-1]["loss_prefer"])
    with pytest.raises(BurnishError, match="outcomes of episodes and no pairs"):
        run(dataset, tmp_path / "dpo", root)
    assert len(OutcomeData(root, ("front",), 4, every=2, progress=False)) == 5 + 5 + 6


def test_held_out_margins_are_on_common_draws(dataset, root, tmp_path, fake_policy, monkeypatch):
    """Whatever a run trains with: at the start they are 0, and two runs that do the same say the same of them."""
    monkeypatch.setattr(PairData, "check_units", lambda *_: None)
    monkeypatch.setattr(heldout, "split", lambda pairs, share: (np.arange(4), np.arange(4, 8)))
    write_index(root, [Pair((0, i), (2, i)) for i in range(8)], {"source": "test"}, 1e9)
    same = {"loss": "dpo", "sft_weight": 0.0}
    one = run(dataset, tmp_path / "one", root, "--train.steps=52", "--train.log_every=1", **same)
    two = run(dataset, tmp_path / "two", root, "--train.steps=2", "--train.log_every=1", **same, preset="released_code")
    assert one[0]["prefer_held_out_margin"] == two[0]["prefer_held_out_margin"] == 0
    assert one[0]["prefer_held_out_accuracy"] == 0.5
    assert one[-1]["prefer_held_out_margin"] != 0 and one[20]["prefer_held_out_margin"] == 0, "measured every 50 steps"


def test_a_narrow_dimension_counts_as_in_the_likelihood():
    """Slope of the default score of a Gaussian of width 0.05, over the exact one: 0.86 when times were cut at 0.02."""
    config = ScoreConfig(draws=20_000)
    own = torch.Generator().manual_seed(0)
    from burnish.core.types import Draws

    drawn = make_draws(Draws(torch.zeros(20_000, 1), torch.rand(20_000, dtype=torch.float64)), config, own)
    t, std = drawn.draws.time, 0.05
    variance = t**2 + (1 - t) ** 2 * std**2
    slope = float((drawn.weight * (t / variance) ** 2).mean())  # of -x^2, by the best velocity field
    assert slope * 2 * std**2 == pytest.approx(1.0, abs=0.01)
