"""Distances and streaming statistics against closed forms and scipy (U1 to U4)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from burnish.methods.isolate import anchor as distances
from burnish.methods.isolate.anchor import Moments


def rows(seed, count=50, width=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) * rng.uniform(0.3, 2, width) + rng.normal(size=width)


def general_w2(mean_a, cov_a, mean_b, cov_b):
    root = sqrtm(cov_b)
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(root @ cov_a @ root).real)


@pytest.mark.parametrize("seed", range(5))
def test_u1_diagonal_form_is_the_general_one_on_diagonal_covariances(seed):
    x, other = rows(seed), rows(seed + 10)
    mean, variance = other.mean(0), other.var(0)
    found = float(distances.w2_diagonal(torch.tensor(x), torch.tensor(mean), torch.tensor(variance)))
    expected = general_w2(x.mean(0), np.diag(x.var(0)), mean, np.diag(variance))
    assert found == pytest.approx(expected, rel=1e-5)
    swapped = float(distances.w2_diagonal(torch.tensor(other), torch.tensor(x.mean(0)), torch.tensor(x.var(0))))
    assert swapped == pytest.approx(found, rel=1e-4)
    same = distances.w2_diagonal(torch.tensor(x), torch.tensor(x.mean(0)), torch.tensor(x.var(0)))
    assert float(same) == pytest.approx(0, abs=1e-12)


def test_u2_gradient_of_the_penalty():
    """(2 / N) [(mu - mu0) + (1 - sigma0 / sigma) (h - mu)] for every row."""
    x = torch.tensor(rows(1), requires_grad=True)
    mean, variance = torch.tensor(rows(2).mean(0)), torch.tensor(rows(2).var(0))
    (found,) = torch.autograd.grad(distances.w2_diagonal(x, mean, variance), x)
    mu, sigma = x.detach().mean(0), x.detach().var(0, unbiased=False).sqrt()
    closed = 2 / len(x) * ((mu - mean) + (1 - variance.sqrt() / sigma) * (x.detach() - mu))
    torch.testing.assert_close(found, closed, rtol=1e-4, atol=1e-6)


def test_normalised_gives_every_channel_the_same_say():
    x = torch.tensor(rows(4))
    mean, variance = torch.tensor(rows(5).mean(0)), torch.tensor(rows(5).var(0))
    scale = torch.tensor([1.0, 10.0, 0.3, 3.0, 1.0, 7.0])
    plain = distances.w2_normalised(x, mean, variance)
    scaled = distances.w2_normalised(x * scale, mean * scale, variance * scale**2)
    assert float(plain) == pytest.approx(float(scaled), rel=1e-2)


def test_tokens_distance():
    x = torch.tensor(rows(6))
    assert float(distances.token_distance(x, x)) == 0
    moved = distances.token_distance(x.mean(0).expand_as(x), x)  # every token at the mean: all of the variance is lost
    assert float(moved) == pytest.approx(1, rel=1e-9)


def test_u3_zero_on_its_own_data_and_the_known_noise_on_a_fresh_batch():
    rng = np.random.default_rng(0)
    width, count, deviation = 200, 128, 0.7
    own = rng.normal(size=(5000, width)) * deviation
    mean, variance = torch.tensor(own.mean(0)), torch.tensor(own.var(0))
    assert float(distances.w2_diagonal(torch.tensor(own), mean, variance)) < 1e-12
    exact_mean, exact = torch.zeros(width).double(), torch.full((width,), deviation**2).double()
    fresh = [
        float(distances.w2_diagonal(torch.tensor(rng.normal(size=(count, width)) * deviation), exact_mean, exact))
        for _ in range(200)
    ]
    assert np.mean(fresh) == pytest.approx(1.5 * width * deviation**2 / count, rel=0.02)


@given(st.integers(0, 10**6), st.lists(st.integers(0, 9), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_u4_streaming_equals_numpy_whatever_the_split(seed, sizes):
    x = rows(seed, sum(sizes) + 2) * 1e3 + 1e5  # far from zero: naive sums of squares would lose digits
    moments = Moments.empty(6)
    start = 0
    for size in [*sizes, 2]:
        moments.add(torch.tensor(x[start : start + size], dtype=torch.float64))
        start += size
    assert float(moments.count) == len(x)
    np.testing.assert_allclose(moments.mean.numpy(), x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance.numpy(), x.var(0), rtol=1e-8)
