"""Tokenizers, noise schedules and masks of burnish_discrete, against closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.policies.discrete.losses import NOISE, Shares, any_order_masks, cross_entropy, hide, ordinal
from burnish.policies.discrete.tokenizers import Bins, Fast


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Bins.


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 300), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_a_round_trip_is_off_by_half_a_bin_at_most(bins, dims, steps, seed):
    tokens = Bins(dims, steps, bins)
    actions = torch.rand(3, steps, dims, generator=seeded(seed)) * 2 - 1
    ids = tokens.encode(actions)
    assert ids.shape == (3, steps * dims) and ids.min() >= 0 and ids.max() < bins
    assert (tokens.decode(ids) - actions).abs().max() <= 1 / bins + 1e-6
    assert tokens.encode(tokens.decode(ids)).equal(ids)


def test_ids_are_time_major_and_edges_clip():
    tokens = Bins(2, 3, 4)
    actions = torch.tensor([[[-9.0, 9.0], [-0.9, -0.4], [0.1, 0.6]]])
    assert tokens.encode(actions).tolist() == [[0, 3, 0, 1, 2, 3]]
    assert tokens.decode(torch.tensor([[0, 3, 0, 1, 2, 3]])).tolist() == [[[-0.75, 0.75], [-0.75, -0.25], [0.25, 0.75]]]


def test_quantile_bins_hold_equal_shares():
    """Data that is uniform between its quantiles is cut into bins of equal mass; constant dimensions survive."""
    levels = {"min": 0.0, "q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99, "max": 1.0}
    bent = {name: [level**2, 2.0] for name, level in levels.items()}  # dimension 1 never changes
    tokens = Bins(2, 1, 8)
    tokens.fit_quantiles(bent, ("min", "max"))
    inner = np.interp(np.linspace(0, 1, 9), list(levels.values()), [2 * level**2 - 1 for level in levels.values()])
    np.testing.assert_allclose(tokens.edges[0].numpy(), inner, rtol=1e-6)
    assert torch.isfinite(tokens.edges).all() and (tokens.edges.diff(dim=1) >= 0).all()
    # Between the known quantiles the cumulative distribution is straight: draws from it fill all bins alike.
    uniform = np.random.default_rng(0).random(80_000)
    drawn = np.interp(uniform, list(levels.values()), [2 * level**2 - 1 for level in levels.values()])
    ids = tokens.encode(torch.from_numpy(np.stack([drawn, 0 * drawn], 1)).float()[:, None])
    np.testing.assert_allclose(torch.bincount(ids[:, 0]) / 80_000, 1 / 8, atol=0.006)
    with pytest.raises(BurnishError, match="q10"):
        tokens.fit_quantiles({"min": [0], "q01": [0]}, ("min", "max"))


# FAST.


def test_fast_is_a_rounded_cosine_transform(fast_folder):
    tokens = Fast(str(fast_folder), action_dim=3, chunk_size=5, length=64)
    actions = torch.rand(4, 5, 3, generator=seeded()) * 2 - 1
    ids = tokens.encode(actions)
    assert ids.shape == (4, 64) and (ids[:, -1] == tokens.vocabulary - 1).all()
    t, k = np.arange(5), np.arange(5)[:, None]
    basis = np.sqrt(2 / 5) * np.cos(np.pi * (t + 0.5) * k / 5)  # orthonormal DCT-II
    basis[0] /= np.sqrt(2)
    rounded = np.rint(10 * np.einsum("kt,bta->bka", basis, actions.double().numpy())) / 10
    expected = np.einsum("kt,bka->bta", basis, rounded)
    np.testing.assert_allclose(tokens.decode(ids).numpy(), expected, atol=1e-6)


def test_fast_says_what_is_missing(fast_folder, tmp_path):
    with pytest.raises(BurnishError, match="tokenizer.json"):
        Fast(str(tmp_path / "nowhere"), 3, 5, 64)
    with pytest.raises(BurnishError, match="fast_length"):
        Fast(str(fast_folder), 3, 5, 2).encode(torch.rand(1, 5, 3))
    spelled_wrongly = Fast(str(fast_folder), 3, 5, 64)
    assert torch.isfinite(spelled_wrongly.decode(torch.full((1, 64), 5))).all()


# Noise.


@pytest.mark.parametrize("name", list(NOISE))
def test_every_schedule_hides_something_to_learn_from(name):
    for blocks in (1, 8):
        shares = NOISE.get(name)(500, blocks, seeded())
        assert shares.hidden.shape == shares.learned.shape == (500, blocks)
        assert shares.hidden.min() >= 0 and shares.hidden.max() <= 1
        hidden, learned = hide(shares, 4, seeded(1))
        assert hidden.shape == (500, 4 * blocks) and learned.any(dim=1).all() and not (learned & ~hidden).any()


def test_hidden_tokens_follow_their_share():
    shares = Shares(torch.tensor([[0.0, 0.25, 1.0]]).repeat(20_000, 1), torch.tensor([[True, True, True]] * 20_000))
    hidden, learned = hide(shares, 2, seeded())
    rates = hidden.float().mean(0)
    assert rates[:2].max() == 0 and rates[4:].min() == 1 and (rates[2:4] - 0.25).abs().max() < 0.015
    assert learned.equal(hidden)


def test_d2f_has_the_statistics_of_its_code():
    """Eight blocks: shares rise from 0.45 to 0.575 on average and never pass 0.7."""
    shares = NOISE.get("d2f")(40_000, 8, seeded()).hidden
    assert abs(shares[:, 0].mean() - 0.45) < 0.003 and abs(shares[:, -1].mean() - 0.575) < 0.003
    assert (shares.diff(dim=1) >= 0).all() and shares.min() >= 0.2 and shares.max() <= 0.7


def test_sorted_shares_are_order_statistics():
    shares = NOISE.get("sorted")(40_000, 4, seeded()).hidden
    np.testing.assert_allclose(shares.mean(0), np.arange(1, 5) / 5, atol=0.005)


def test_cosine_hides_two_over_pi():
    assert abs(NOISE.get("cosine")(40_000, 3, seeded()).hidden.mean() - 2 / math.pi) < 0.005


@pytest.mark.parametrize("window", [3, 1])
def test_pipeline_states(window):
    shares = NOISE.get("pipeline")(20_000, 6, seeded(), window=window)
    is_open = shares.learned & (shares.hidden > 0)
    first, count = is_open.int().argmax(1), is_open.sum(1)
    assert count.min() == 1 and count.max() == window
    index = torch.arange(6)
    assert (shares.hidden[index < first[:, None]] == 0).all(), "blocks before the first open one are known"
    absent = index >= (first + count)[:, None]
    assert (shares.hidden[absent] == 1).all() and not shares.learned[absent].any()
    assert ((shares.hidden.diff(dim=1) >= 0) | ~is_open[:, 1:]).all(), "open blocks are ever less decoded"
    assert torch.bincount(first, minlength=6).min() > 20_000 / 6 * 0.9
    whole = (shares.hidden.gather(1, (first + count - 1)[:, None]) == 1).float().mean()
    assert abs(whole - 0.5) < 0.02


# Losses.


def test_ordinal_is_the_distance_of_the_mean():
    centres = torch.tensor([[-0.5, 0.5], [-1.0, 3.0]])
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]])
    found = ordinal(logits, torch.tensor([[0.2, 1.0]]), centres)
    torch.testing.assert_close(found, torch.tensor([[0.2, 1.0]]))
    assert cross_entropy(logits, torch.tensor([[0, 0]]))[0, 1].item() == pytest.approx(-math.log(0.75))


@pytest.mark.parametrize("block", [4, 2])
def test_the_bound_is_the_chain_rule_over_all_orders(block):
    """With any cost c(token, hidden set), the estimate's mean is the cost of unmasking a block in a random order."""
    cost = {}
    draws = torch.Generator().manual_seed(3)
    for hidden in itertools.product([False, True], repeat=4):
        cost[hidden] = torch.rand(4, generator=draws)

    def exact():
        total = 0.0
        orders = list(itertools.permutations(range(block)))
        for start in range(0, 4, block):
            for order in orders:
                for i, token in enumerate(order):
                    hidden = [False] * 4
                    for later in order[i:]:
                        hidden[start + later] = True
                    total += cost[tuple(hidden)][start + token] / len(orders)
        return float(total)

    n = 40_000
    noise, time = torch.randn(n, 4, generator=draws), 1 - torch.rand(n, generator=draws)
    hidden, weight = any_order_masks(noise, time, torch.ones(n, 4, dtype=torch.bool), block)
    total = 0.0
    for start in range(0, 4, block):  # what a block sees: its own hidden tokens, all others known
        own = torch.zeros(n, 4, dtype=torch.bool)
        own[:, start : start + block] = hidden[:, start : start + block]
        costs = torch.stack([cost[tuple(row)] for row in own.tolist()])
        total += (costs * weight)[:, start : start + block].sum(1).mean().item()
    assert total == pytest.approx(exact(), rel=0.01)


def test_padding_is_hidden_and_not_scored():
    valid = torch.ones(500, 8, dtype=torch.bool)
    valid[:, 5:] = False
    noise, time = torch.randn(500, 8, generator=seeded()), 1 - torch.rand(500, generator=seeded(1))
    hidden, weight = any_order_masks(noise, time, valid, 8)
    assert hidden[:, 5:].all() and (weight[:, 5:] == 0).all()
    torch.testing.assert_close(weight.sum(1), torch.full((500,), 5.0))
    all_gone, _ = any_order_masks(noise, time, torch.zeros_like(valid), 4)
    assert all_gone.all()
