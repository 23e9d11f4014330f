"""What preference optimisation refuses, and what its kept reference depends on."""

import math
from types import SimpleNamespace

import pytest
from torch import nn

from burnish.core.errors import BurnishError
from burnish.data.pairs import Pair, check_unique, read_labels
from burnish.methods import reference
from burnish.methods.prefer import losses
from burnish.methods.prefer.options import make_config


@pytest.mark.parametrize("options", [
    {"weight": -1}, {"weight": "a"}, {"sft_weight": -0.1}, {"proximal_weight": math.nan}, {"beta": math.inf},
    {"beta": math.nan}, {"horizon": -1}, {"horizon": 0}, {"steps": -3}, {"pool": 1.5}, {"batch_size": 2.5},
    {"pairs": 5}, {"score": "foo"}, {"score": {"draws": 2.5}}, {"score": {"t_min": "low"}},
    {"score": {"draws": 4, "times": "fixed", "fixed_times": [0.1, 0.9, 0.2, 0.8], "antithetic": True}},
], ids=str)  # fmt: skip
def test_options_that_cannot_be(options):
    with pytest.raises(BurnishError):
        make_config("default", {"pairs": "somewhere", **options})


def test_attention_with_a_rate_of_its_own_is_a_dropout_too():
    class Attention(nn.Module):
        attention_dropout = 0.0

        def __init__(self, rate):
            super().__init__()
            self.attention_dropout = rate

    inside = nn.ModuleList([nn.Linear(2, 2), nn.Dropout(0.1), Attention(0.2), Attention(0.0)])
    assert reference.dropouts(inside) == [inside[1], inside[2]]
    with reference.without_dropout(reference.dropouts(inside)):
        assert not inside[1].training and not inside[2].training and inside[3].training
    assert inside[2].training


def test_the_kept_reference_depends_on_what_the_policy_computes():
    config = SimpleNamespace(block_size=0, normalization_mapping={"ACTION": "MIN_MAX"}, device="cpu", decoder="auto")
    policy = SimpleNamespace(settings=lambda: vars(config))
    before = reference.settings(policy)
    config.device, config.decoder = "cuda", ""
    assert reference.settings(policy) == before
    config.block_size = 3
    assert reference.settings(policy) != before


def test_without_a_reference_nothing_falls_below_it():
    figures = {"logit_scale": 1.0, "linear_share": 0.0, "chosen_displacement": -114.0, "accuracy": 0.9}
    assert "below the reference" in losses.warning(figures, 0.0, 0.1)
    assert losses.warning(figures, 0.0, 0.1, referenced=False) == ""


@pytest.mark.parametrize("line", [
    '{"chosen": 1.9, "rejected": 2}', '{"chosen": [1, 2, 3], "rejected": 2}', '{"chosen": 1}', "[1, 2]",
    '{"chosen": Infinity, "rejected": 2}', '{"chosen": true, "rejected": 2}',
])  # fmt: skip
def test_labels_that_are_none(tmp_path, line):
    (tmp_path / "labels.jsonl").write_text(line)
    with pytest.raises(BurnishError, match="no pair|a JSON object"):
        read_labels(tmp_path / "labels.jsonl")


def test_a_pair_has_one_direction():
    one = Pair((0, 3), (1, 3))
    check_unique([one, Pair((0, 3), (2, 3))])
    with pytest.raises(BurnishError, match="twice"):
        check_unique([one, one])
    with pytest.raises(BurnishError, match="both directions"):
        check_unique([one, Pair(one.rejected, one.chosen)])
