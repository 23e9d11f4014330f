"""The course of posts: three ways through it, a trap for majorities, and episodes that depend on their seed alone."""

from collections import Counter
from itertools import product

import numpy as np
import pytest

from burnish.core.errors import BurnishError
from burnish.envs.base import InstructionSwap, RandomObject, expand, make_env
from burnish.envs.weave import WAYS, WeaveExpert


@pytest.fixture(scope="module")
def env():
    made = make_env("weave:plate", 32)
    yield made
    made.close()


def play(env, state, expert):
    env.reset(state)
    return next((step for step in range(1, env.spec.max_steps + 1) if env.step(expert.act())), None)


def test_ids(env):
    assert expand("weave") == ["weave:plate"] and expand("weave:way") == ["weave:way"]
    assert not isinstance(env, InstructionSwap | RandomObject)
    with pytest.raises(BurnishError, match=r"unknown task 'weave:lift'.*plate"):
        expand("weave:lift")


@pytest.mark.parametrize("pair", product((-1, 0, 1), repeat=2))
def test_only_the_three_ways_reach_the_plate(env, pair):
    """Whoever mixes two of them meets a post, whatever the scene, although the expert steers on from there."""
    for state in range(3):
        expert = WeaveExpert(env, 0)
        expert.todo = list(pair)
        assert (play(env, state, expert) is not None) == (pair in WAYS)
        assert env.way() == pair and (pair in WAYS or env.failure() == "wrong object")


def test_the_majority_of_every_step_is_no_way():
    first, second = (Counter(), Counter())
    for (one, two), share in WAYS.items():
        first[one] += share
        second[two] += share
    assert sum(WAYS.values()) == pytest.approx(1)
    assert (max(first, key=first.get), max(second, key=second.get)) == (1, -1) and (1, -1) not in WAYS


def test_the_expert_takes_a_way_by_its_seed_alone(env):
    taken = Counter(tuple(WeaveExpert(env, seed).todo) for seed in range(2000))
    for way, share in WAYS.items():  # three standard deviations of a binomial
        assert abs(taken[way] / 2000 - share) < 3 * (share * (1 - share) / 2000) ** 0.5
    ends = []
    for state in (5, 6, 5):
        assert play(env, state, env.expert(state)) in (4, 5)
        ends.append(np.concatenate([env.observe().state, env.observe(["front"]).images["front"].ravel()]))
    np.testing.assert_array_equal(ends[0], ends[2])


def test_a_way_is_judged_after_two_steps():
    env = make_env("weave:way", 32)
    for pair, solved in (((1, 1), 2), ((1, -1), None), ((-0.9, -0.8), 2), ((0.1, 0.1), None)):
        expert = WeaveExpert(env, 0)
        expert.todo = list(pair)
        assert play(env, 1, expert) == solved
    env.close()
