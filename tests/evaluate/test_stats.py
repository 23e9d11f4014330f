"""Statistics against scipy's own, brute force and published values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from burnish.core.errors import BurnishError
from burnish.evaluate.stats import (
    mcnemar,
    minimum_detectable_difference,
    paired_bootstrap,
    percentiles,
    wilson,
)


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([0.9, 0.95]))
def test_wilson_equals_scipy(n, share, level):
    successes = round(share * n)
    rate = wilson(successes, n, level)
    expected = binomtest(successes, n).proportion_ci(level, method="wilson")
    assert rate.low == pytest.approx(expected.low, abs=1e-12)
    assert rate.high == pytest.approx(expected.high, abs=1e-12)
    assert rate.low <= rate.rate <= rate.high


def test_wilson_known_value_and_refusals():
    rate = wilson(0, 10)
    assert (rate.low, round(rate.high, 4)) == (0.0, 0.2775)  # z^2 / (n + z^2)
    assert str(wilson(68, 100)) == "68.0 % [58.3, 76.3] (n=100)"
    for successes, n in [(0, 0), (3, 2), (-1, 5)]:
        with pytest.raises(BurnishError):
            wilson(successes, n)


def _binomial_two_sided(b: int, c: int) -> float:
    """Double the smaller tail: closed form of the symmetric exact test."""
    n, k = b + c, min(b, c)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_equals_the_doubled_tail(b, c):
    expected = 1.0 if b == c else _binomial_two_sided(b, c)
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(b, c) == pytest.approx(mcnemar(c, b))


def test_bootstrap_matches_normal_theory_and_is_seeded():
    rng = np.random.default_rng(0)
    differences = rng.choice([-1, 0, 1], size=900, p=[0.1, 0.6, 0.3])
    low, high = paired_bootstrap(differences, np.random.default_rng(1))
    half = norm.isf(0.025) * differences.std() / math.sqrt(differences.size)
    assert low == pytest.approx(differences.mean() - half, abs=0.003)
    assert high == pytest.approx(differences.mean() + half, abs=0.003)
    assert paired_bootstrap(differences, np.random.default_rng(1)) == (low, high)
    assert paired_bootstrap(np.zeros(5), rng) == (0.0, 0.0)
    with pytest.raises(BurnishError):
        paired_bootstrap(np.array([]), rng)


@given(st.floats(-1, 1), st.integers(1, 50))
def test_bootstrap_of_a_constant_is_that_constant(value, n):
    low, high = paired_bootstrap(np.full(n, value), np.random.default_rng(0), resamples=200)
    assert low == pytest.approx(value) and high == pytest.approx(value)


@given(st.integers(20, 5000), st.floats(0.02, 1.0), st.sampled_from([0.7, 0.8, 0.9, 0.98]))
def test_detectable_difference_solves_connors_equation(n, psi, power):
    d = minimum_detectable_difference(n, psi, power=power)
    z_a, z_b = norm.isf(0.025), norm.isf(1 - power)
    if d is None:  # then even one-sided discordance falls short
        assert n * psi**2 < (z_a * math.sqrt(psi) + z_b * math.sqrt(psi - psi**2)) ** 2 * (1 + 1e-9)
    else:
        assert n * d**2 == pytest.approx((z_a * math.sqrt(psi) + z_b * math.sqrt(psi - d**2)) ** 2, rel=1e-6)


def test_detectable_difference_has_the_promised_power():
    n, psi = 400, 0.3
    d = minimum_detectable_difference(n, psi)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, [(psi + d) / 2, (psi - d) / 2, 1 - psi], size=1500)
    found = np.mean([mcnemar(int(b), int(c)) < 0.05 for b, c, _ in counts])
    assert 0.74 < found < 0.86
    assert minimum_detectable_difference(50, 0.0) is None
    with pytest.raises(BurnishError):
        minimum_detectable_difference(0, 0.5)


def test_percentiles():
    figures = percentiles(list(range(1, 102)))
    assert (figures["p50"], figures["p95"], figures["p99"], figures["n"]) == (51, 96, 100, 101)
    assert percentiles([]) == {}
