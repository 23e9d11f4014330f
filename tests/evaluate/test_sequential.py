"""The test that may be looked at after every trial."""

import numpy as np
import pytest

from burnish.core.errors import BurnishError
from burnish.evaluate.sequential import confidence_sequence, sequential


def trials(rng, a, b, n):
    return (rng.random(n) < b).astype(int) - (rng.random(n) < a).astype(int)


@pytest.mark.parametrize("rate", [0.5, 0.85])
def test_looking_after_every_trial_finds_no_difference_between_equal_policies(rate):
    rng = np.random.default_rng(0)
    wrong = [sequential(trials(rng, rate, rate, 150)).decided is not None for _ in range(200)]
    assert np.mean(wrong) <= 0.05


def test_it_finds_a_large_difference_long_before_a_fixed_test_would_end():
    rng = np.random.default_rng(1)
    found = [sequential(trials(rng, 0.5, 0.8, 150)) for _ in range(60)]
    assert np.mean([f.verdict == "better" for f in found]) > 0.95
    assert np.mean([f.decided or 150 for f in found]) < 65
    assert sequential(-trials(rng, 0.4, 0.9, 100)).verdict == "worse"


def test_the_true_difference_is_inside_at_every_look():
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(100):
        low, high, p = confidence_sequence(trials(rng, 0.6, 0.75, 120))
        assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all() and (np.diff(p) <= 0).all()
        missed += bool(((low > 0.15) | (high < 0.15)).any())
    assert missed <= 8


def test_an_interval_out_of_which_every_value_has_been_ruled_stays_where_it_is():
    low, high, _ = confidence_sequence(np.repeat([1.0, -1.0, 1.0], 400))
    assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all()


def test_equivalent_needs_a_margin():
    same = np.tile([1, -1, 0, 0, 0, 0, 0, 0], 100)
    assert sequential(same).verdict == "undecided"
    found = sequential(same, margin=0.15)
    assert found.verdict == "equivalent" and found.decided < 800 and "stop" in str(found)


def test_the_first_trials_alone_decide_nothing_and_the_future_changes_nothing_before():
    rng = np.random.default_rng(3)
    long = trials(rng, 0.5, 0.7, 80)
    for part, whole in zip(confidence_sequence(long[:30]), confidence_sequence(long), strict=True):
        assert np.array_equal(part, whole[:30])
    assert sequential(np.ones(3)).verdict == "undecided"


@pytest.mark.parametrize("values, margin", [([], None), ([2.0], None), ([np.nan], None), ([0.0], 0.0), ([0.0], 1.5)])
def test_refusals(values, margin):
    with pytest.raises(BurnishError):
        sequential(np.array(values), margin)
