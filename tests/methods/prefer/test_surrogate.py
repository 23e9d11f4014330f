"""The surrogate on flows of known density: closed forms, and the specification's tables."""

import math
from dataclasses import replace

import known_flows as toy
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from burnish.core.types import Draws
from burnish.methods.prefer.draws import ScoreConfig, WeightedDraws, make_draws, weigh
from burnish.runtime.flow_likelihood import log_prob, signs

ELBO = ScoreConfig(draws=256, times="logit", weight="elbo", antithetic=False, t_min=0.0183, t_max=0.9817)
UNIFORM = ScoreConfig(draws=256, times="uniform", weight="uniform", antithetic=False, t_min=1e-6, t_max=1 - 1e-6)
PAPER = ScoreConfig(
    draws=4, times="fixed", fixed_times=(0.125, 0.375, 0.625, 0.875), weight="uniform", stratified=False,
    antithetic=False,
)  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draws_for(n, dimension, config, generator, shared_rows=False):
    """Draws of n rows: noise [n, K, D]."""
    rows = []
    for _ in range(1 if shared_rows else n):
        noise = torch.randn(config.draws, dimension, generator=generator, dtype=torch.float64)
        time = torch.rand(config.draws, generator=generator, dtype=torch.float64)
        rows.append(make_draws(Draws(noise, time), config, generator))
    return WeightedDraws.stack(rows)


def score(flow, x, drawn):
    per_draw = flow.scores(x, drawn.draws.noise, drawn.draws.time)
    return weigh(per_draw[:, None], drawn.weight).mean(-1)[:, 0]


@pytest.mark.parametrize(("x", "std"), [(0.5, 0.3), (0.0, 1.0), (-1.2, 0.7), (0.1, 0.1)])
def test_uniform_score_of_a_gaussian_in_closed_form(x, std):
    """T1: S(x) = -pi / 4 (x^2 / s + s), so a dimension counts s pi / 2 of what it does in the log-likelihood."""
    drawn = draws_for(1, 1, replace(UNIFORM, draws=40_000), rng())
    found = score(toy.isotropic(1, std=std), torch.tensor([[x]], dtype=torch.float64), drawn)
    assert found.item() == pytest.approx(-math.pi / 4 * (x**2 / std + std), rel=0.02)


def test_elbo_score_is_the_log_probability_up_to_one_constant():
    """T2: differences between points and between Gaussians of other width equal those of log p."""
    drawn = draws_for(1, 1, replace(ELBO, draws=200_000, t_min=1e-3, t_max=1 - 1e-3), rng())
    points = torch.tensor([[0.0], [0.4], [-0.9]], dtype=torch.float64)
    gaps = []
    for std in (0.3, 0.6, 1.0):
        flow = toy.isotropic(1, std=std)
        gaps.append(score(flow, points, drawn) - flow.log_prob(points))
    gaps = torch.stack(gaps)
    assert (gaps - gaps.mean()).abs().max() < 0.03


def margins(flow, reference, chosen, rejected, config, generator, sharing):
    """[N] margins with draws shared by all four scores, by policy and reference only, or by none."""
    n, dimension = chosen.shape

    def fresh():
        return draws_for(n, dimension, config, generator)

    one = fresh()
    sets = {"all": (one,) * 4, "none": tuple(fresh() for _ in range(4))}
    two = fresh()
    sets["policy and reference"] = (one, one, two, two)
    a, b, c, d = sets[sharing]
    return (score(flow, chosen, a) - score(reference, chosen, b)) - (
        score(flow, rejected, c) - score(reference, rejected, d)
    )


def worlds(name):
    if name == "anisotropic":
        flow = toy.anisotropic()
        return flow, toy.Mixture(flow.w, flow.m + 0.1 * flow.s, flow.s * 1.1)
    if name == "mixture":
        return toy.heteroscedastic()
    return toy.isotropic(), toy.isotropic(mean=0.1)


@pytest.fixture(scope="module", params=["anisotropic", "mixture", "isotropic"])
def world(request):
    """Pairs of clean and disturbed points, and their exact margins."""
    g = rng(3)
    flow, reference = worlds(request.param)
    clean = flow.sample(700, g)
    noise = torch.rand(700, 1, generator=g, dtype=torch.float64) * 0.3 + 0.1
    disturbed = clean + 0.5 * noise * torch.randn(clean.shape, generator=g, dtype=torch.float64)
    exact = (flow.log_prob(clean) - reference.log_prob(clean)) - (
        flow.log_prob(disturbed) - reference.log_prob(disturbed)
    )
    return request.param, flow, reference, clean, disturbed, exact


# Specification 4.2: (rank correlation, share of right signs) of the margin with 4 draws and uniform weight.
PAPER_TABLE = {
    "all": {"anisotropic": (0.332, 0.726), "mixture": (0.546, 0.822), "isotropic": (1.0, 1.0)},
    "policy and reference": {"anisotropic": (0.121, 0.597), "mixture": (0.189, 0.595), "isotropic": (0.497, 0.657)},
    "none": {"anisotropic": (0.050, 0.511), "mixture": (0.027, 0.503), "isotropic": (0.093, 0.541)},
}


@pytest.mark.parametrize("sharing", list(PAPER_TABLE))
def test_four_draws_say_something_only_when_they_are_shared(world, sharing):
    name, flow, reference, clean, disturbed, exact = world
    found = margins(flow, reference, clean, disturbed, PAPER, rng(1), sharing)
    rank, sign = PAPER_TABLE[sharing][name]
    # 700 pairs: standard errors of about 0.04 and 0.02.
    assert spearmanr(found, exact).statistic == pytest.approx(rank, abs=0.12)
    assert ((found > 0) == (exact > 0)).double().mean().item() == pytest.approx(sign, abs=0.06)


def test_many_shared_draws_recover_the_margin_and_elbo_beats_uniform(world):
    """Specification 4.2: .917/.781/1 with uniform and .992/.966/1 with elbo weights, of 256 draws."""
    name, flow, reference, clean, disturbed, exact = world
    ranks = {}
    for weight, config in (("uniform", UNIFORM), ("elbo", ELBO)):
        found = margins(flow, reference, clean[:300], disturbed[:300], config, rng(2), "all")
        ranks[weight] = spearmanr(found, exact[:300]).statistic
    assert ranks["elbo"] > 0.93
    if name == "isotropic":
        assert ranks["uniform"] > 0.99
    else:
        assert ranks["elbo"] > ranks["uniform"]


def test_stratified_times_and_antithetic_noise_sharpen_the_margin_of_likely_chunks():
    g = rng(3)
    flow, reference = worlds("anisotropic")
    chosen = flow.sample(500, g)
    rejected = chosen.roll(1, 0)
    exact = (flow.log_prob(chosen) - reference.log_prob(chosen)) - (
        flow.log_prob(rejected) - reference.log_prob(rejected)
    )
    plain = ScoreConfig(draws=8, stratified=False)
    ranks = [
        spearmanr(margins(flow, reference, chosen, rejected, config, rng(1), "all"), exact).statistic
        for config in (plain, replace(plain, stratified=True), replace(plain, stratified=True, antithetic=True))
    ]
    assert ranks[0] < ranks[1] < ranks[2] - 0.02  # .80, .82, .88


def test_equal_flows_and_shared_draws_give_a_margin_of_exactly_zero():
    flow = toy.isotropic()
    x = flow.sample(50, rng())
    shared = margins(flow, flow, x, x.flip(0), PAPER, rng(), "all")
    independent = margins(flow, flow, x, x.flip(0), PAPER, rng(), "none")
    assert shared.abs().max() == 0 and 1.5 < independent.std() < 5  # specification: about 2.5 to 3


def test_the_opposite_convention_of_time_gives_the_same_score():
    """CrossVLA's equation 1 has data at 1 and the velocity data minus noise; written out here in numpy."""
    flow, _ = toy.heteroscedastic()
    x = flow.sample(20, rng())
    drawn = draws_for(20, 2, PAPER, rng(1))
    noise = drawn.draws.noise.numpy()
    total = np.zeros(20)
    for k, s in enumerate(1 - drawn.draws.time[0].numpy()):
        at = s * x.numpy() + (1 - s) * noise[:, k]
        velocity = -flow.velocity(torch.from_numpy(at), torch.full((20,), 1 - s, dtype=torch.float64)).numpy()
        total -= ((velocity - (x.numpy() - noise[:, k])) ** 2).sum(1) / 4
    np.testing.assert_allclose(score(flow, x, drawn).numpy(), total, rtol=1e-10)


def test_ode_equals_the_analytic_log_probability():
    flow, _ = toy.heteroscedastic()
    x = flow.sample(60, rng())
    found = log_prob(lambda p, t: flow.velocity(p, t), x[None], torch.eye(2, dtype=torch.float64), steps=200)
    torch.testing.assert_close(found[0], flow.log_prob(x), atol=1e-2, rtol=0)


def test_hutchinson_is_unbiased():
    flow = toy.anisotropic(dimension=4, low=0.3)
    x = flow.sample(8, rng(1))

    def field(p, t):
        turn = torch.tensor([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1], [0, 0, -1, 0]], dtype=torch.float64)
        return flow.velocity(p, t) + torch.sin(p) @ turn  # off-diagonal, so that single probes are wrong

    exact = log_prob(field, x[None], torch.eye(4, dtype=torch.float64), steps=20)
    probes = signs(4000, 4, rng(2)).double()
    many = log_prob(field, x[None], probes, steps=20, exact=False)
    few = log_prob(field, x[None], probes[:1], steps=20, exact=False)
    assert (many - exact).abs().max() < 0.05 < (few - exact).abs().max()
