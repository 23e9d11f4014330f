"""The two-way interval, Holm's rule, verdicts and letters: against other formulas and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t, ttest_1samp

from burnish.core.errors import BurnishError
from burnish.evaluate.stats import holm, letters, two_way, verdict


def differences(rng, seeds, states, spread):
    """Two arms of equal quality on shared states: seeds move each arm by `spread`, states are of all difficulties."""
    base, table = rng.beta(1.5, 1.5, states), np.zeros((seeds, states))
    for sign in (1, -1):
        rate = base + rng.normal(0, spread, seeds)[:, None] + rng.normal(0, 0.1, states)
        table += sign * (rng.random((seeds, states)) < rate)
    return table


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.06])
def test_the_interval_covers_in_simulation(seeds, spread):
    rng = np.random.default_rng(seeds)
    found = [two_way(differences(rng, seeds, 100, spread)) for _ in range(600)]
    covered = np.mean([f.low <= 0 <= f.high for f in found])
    assert 0.93 - 0.012 <= covered <= 0.97 + 0.012  # two standard errors of 600 tables beside the promise
    assert np.mean([f.p < 0.05 for f in found]) == pytest.approx(1 - covered)


def test_the_mean_squares_are_those_of_the_analysis_of_variance():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 30)) + 2 * rng.normal(size=(4, 1)) + rng.normal(size=30)
    k, n = values.shape
    # Variances of means, with what is left taken out once: another way to the same estimate.
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    e = (rest**2).sum() / ((k - 1) * (n - 1))
    square = values.mean(1).var(ddof=1) / k + values.mean(0).var(ddof=1) / n - e / (k * n)
    found = two_way(values)
    assert found.error == pytest.approx(math.sqrt(square))
    assert (found.low, found.high) == pytest.approx(t.interval(0.95, found.freedom, values.mean(), math.sqrt(square)))


def test_one_seed_is_students_interval_over_states():
    row = np.random.default_rng(1).normal(0.1, 1, 40)
    found, scipy = two_way(row[None]), ttest_1samp(row, 0)
    assert (found.low, found.high) == pytest.approx(tuple(scipy.confidence_interval()))
    assert found.p == pytest.approx(scipy.pvalue)


def test_seeds_that_differ_widen_it_and_order_does_not_matter():
    rng = np.random.default_rng(2)
    quiet = rng.integers(-1, 2, (5, 60)).astype(float)
    loud = quiet + np.array([-1, -0.5, 0, 0.5, 1])[:, None]
    assert two_way(loud).error > 2 * two_way(quiet).error
    shuffled = two_way(quiet[rng.permutation(5)][:, rng.permutation(60)])
    assert (shuffled.low, shuffled.high) == pytest.approx((two_way(quiet).low, two_way(quiet).high))


def test_one_number_for_each_seed_is_students_interval_over_seeds():
    column = np.random.default_rng(1).normal(0.1, 1, 5)
    assert (two_way(column[:, None]).low, two_way(column[:, None]).p) == (
        two_way(column[None]).low,
        two_way(column[None]).p,
    )


def test_the_spread_of_states_counts_once():
    """The same effects of states in every seed do not average out over seeds."""
    effects = np.random.default_rng(0).normal(size=(1, 50))
    assert two_way(np.repeat(effects, 20, axis=0)).error == pytest.approx(two_way(effects).error)


def test_equal_outcomes_and_empty_tables():
    assert two_way(np.zeros((3, 5))).interval == [0, 0]
    for shape in [(0, 5), (1, 1), (3, 0)]:
        with pytest.raises(BurnishError):
            two_way(np.zeros(shape))


def test_the_detectable_difference_is_found_at_its_power():
    rng = np.random.default_rng(3)
    reference = two_way(differences(rng, 5, 200, 0.03))
    shifted = rng.standard_t(reference.freedom, 4000) * reference.error + reference.detectable
    half = reference.high - reference.mean
    assert np.mean(shifted > half) == pytest.approx(0.8, abs=0.03)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_against_the_rejections_of_the_step_down_procedure(p):
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected, left = set(), sorted(range(len(p)), key=lambda i: p[i])
        while left and p[left[0]] * len(left) <= level:
            rejected.add(left.pop(0))
        assert {i for i, value in enumerate(adjusted) if value <= level} >= rejected
        assert all(adjusted[i] <= level or i not in rejected for i in range(len(p)))
    assert all(a >= b for a, b in zip(adjusted, p, strict=True))


def test_verdicts():
    assert verdict(0.01, 0.2) == "better" and verdict(-0.2, -0.01) == "worse" and verdict(-0.1, 0.1) == "undecided"
    assert verdict(-0.04, 0.05, 0.05) == "equivalent" and verdict(-0.04, 0.06, 0.05) == "undecided"
    assert verdict(0.0, 0.0) == "undecided"


@settings(max_examples=60)
@given(
    st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)))))
)
def test_arms_share_a_letter_exactly_where_they_do_not_differ(drawn):
    arms, pairs = drawn
    differ = np.zeros((arms, arms), bool)
    for i, j in pairs:
        if i != j and max(i, j) < arms:
            differ[i, j] = differ[j, i] = True
    found = letters(differ)
    for i in range(arms):
        for j in range(arms):
            assert bool(set(found[i]) & set(found[j])) == (i == j or not differ[i, j])
