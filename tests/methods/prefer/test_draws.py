"""Draws: what is shared, where times lie, which settings are refused."""

import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.types import Draws
from burnish.methods.prefer.draws import ScoreConfig, importance, make_draws, margin_error, weigh
from burnish.methods.prefer.options import PRESETS, make_config


def own(K, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Draws(torch.randn(K, 3, 2, generator=g), torch.rand(K, generator=g))


def made(config, seed=0):
    return make_draws(own(config.draws), config, torch.Generator().manual_seed(seed))


def test_antithetic_halves_have_opposite_noise_and_equal_times():
    drawn = made(ScoreConfig(draws=6, antithetic=True))
    assert torch.equal(drawn.draws.noise[:3], -drawn.draws.noise[3:])
    assert torch.equal(drawn.draws.time[:3], drawn.draws.time[3:])


def test_stratified_times_hit_every_part_of_the_logit_range():
    config = ScoreConfig(draws=8, antithetic=False)
    for seed in range(5):
        logits = torch.logit(made(config, seed).draws.time.double()).sort().values
        edges = torch.linspace(*torch.logit(torch.tensor([config.t_min, config.t_max], dtype=torch.float64)), 9)
        assert (logits >= edges[:-1] - 1e-5).all() and (logits <= edges[1:] + 1e-5).all()


@pytest.mark.parametrize("times", ["logit", "uniform"])
def test_importance_weights_average_to_the_integral(times):
    """Of w = 1 over [t_min, t_max], whatever the times are drawn from."""
    config = ScoreConfig(draws=4000, times=times, weight="uniform", antithetic=False)
    drawn = made(config)
    assert drawn.weight.double().mean().item() == pytest.approx(config.t_max - config.t_min, rel=1e-3)


def test_elbo_weights_are_bounded():
    config = ScoreConfig(draws=1000, antithetic=False)
    weight = made(config).weight
    ends = torch.logit(torch.tensor([config.t_min, config.t_max]))
    assert weight.max() < ends[1] - ends[0] and weight.min() > 0


def test_given_weights_and_fixed_times():
    config = ScoreConfig(draws=2, times="fixed", fixed_times=[0.2, 0.7], weight=[3.0, 1.0], antithetic=False)
    drawn = made(config)
    torch.testing.assert_close(drawn.draws.time, torch.tensor([0.2, 0.7]))
    per_draw = torch.tensor([[[-1.0, -2.0], [-4.0, 0.0]]])
    assert weigh(per_draw, drawn.weight[None]).mean(-1).tolist() == [[-2.5, -6.0]]
    assert weigh(per_draw, drawn.weight[None], torch.tensor([[5, 2]])).mean(-1).tolist() == [[-0.5, -3.0]]


def test_policy_times_keep_the_policys_weight():
    config = ScoreConfig(draws=3, times="policy", weight="uniform", antithetic=False)
    drawn = made(config)
    assert torch.equal(drawn.draws.time, own(3).time) and torch.equal(drawn.weight, torch.ones(3))
    assert torch.equal(importance(torch.tensor([0.5, 0.25]), ScoreConfig(times="policy")), torch.tensor([1.0, 3.0]))


def test_margin_error_is_the_standard_error_of_the_difference():
    per_draw = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])  # differences 1 and 3: std sqrt 2, over sqrt 2
    assert margin_error(per_draw).item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"draws": 3, "antithetic": True}, "3 antithetic draws; expected an even number"),
        ({"times": "beta"}, "times is 'beta'"),
        ({"weight": [1.0]}, "1 weights; expected one for each of 4 draws"),
        ({"times": "fixed", "fixed_times": [0.1]}, "fixed_times"),
        ({"t_min": 0.0}, "t_min is 0.0; expected above 0"),
        ({"reduce": "max"}, "reduce is 'max'"),
    ],
)
def test_refused_settings(settings, words):
    with pytest.raises(BurnishError, match=words):
        ScoreConfig(**settings)


def test_presets_and_overrides():
    for preset in PRESETS:
        make_config(preset, {"pairs": "x"})
    released = make_config("released_code", {"pairs": "x", "score": {"draws": 8}})
    assert released.score.draws == 8 and not released.score.shared and released.score.reduce == "mean"
    with pytest.raises(BurnishError, match="unknown option 'betta'"):
        make_config("default", {"pairs": "x", "betta": 1})
    with pytest.raises(BurnishError, match=r"prefer.score: unknown option 'draw'"):
        make_config("default", {"pairs": "x", "score": {"draw": 1}})
    with pytest.raises(BurnishError, match="no pairs"):
        make_config("default", {})
    with pytest.raises(BurnishError, match="proximal_weight without a reference"):
        make_config("default", {"pairs": "x", "reference": "none", "proximal_weight": 1.0})
