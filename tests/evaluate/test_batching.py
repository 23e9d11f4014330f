"""A chunk does not depend, to the last bit, on who shares the policy's batch."""

from types import SimpleNamespace

import numpy as np
import pytest

from burnish.core.config import CacheConfig, EvalConfig
from burnish.core.errors import BurnishError
from burnish.envs.base import Observation, make_env
from burnish.evaluate.batching import BatchedPolicy, Request
from burnish.evaluate.rollout import _Job
from burnish.evaluate.scheduler import Measurement, Planned
from burnish.runtime.caches import Reuse
from burnish.runtime.executor import Runtime


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from burnish.policies import load_policy
    from workshop.tiny import make_tiny

    folder = tmp_path_factory.mktemp("policy") / "p"
    return load_policy(make_tiny("smolvla", folder, state_dim=4, action_dim=4))


def request(state: int, text: str = "lift the red cube", replan: int = 0) -> Request:
    rng = np.random.default_rng(state)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Request(Observation({"cam": image}, rng.normal(size=4).astype(np.float32), text), "t", state, replan)


def test_rows_are_independent_of_neighbours_places_and_texts(policy):
    batched = BatchedPolicy(policy, {"top": "cam"}, seed=1, width=4, n_action_steps=8)
    alone, milliseconds = batched.act([request(0)])
    assert alone.shape == (1, 8, 4) and milliseconds > 0
    others = [request(5), request(6, "put the very small green ball on the plate near the left edge"), request(0)]
    shared, _ = batched.act(others)
    assert np.array_equal(shared[2], alone[0])
    full, _ = batched.act([request(0), *[request(i, "go") for i in range(7, 10)]])
    assert np.array_equal(full[0], alone[0])
    assert not np.array_equal(batched.act([request(0, replan=1)])[0], alone), "noise follows the replan"
    other_seed = BatchedPolicy(policy, {"top": "cam"}, seed=2, width=4, n_action_steps=8)
    assert not np.array_equal(other_seed.act([request(0)])[0], alone)


def test_the_executor_plays_the_same_episodes(policy):
    """Rows that fill the batch up and the ruler's text are in it, and another tier is another evaluation."""
    plain, executed = (BatchedPolicy(policy, {"top": "cam"}, seed=1, width=4, n_action_steps=8) for _ in range(2))
    executed.runner = Runtime(policy, tier="exact")
    for rows in ([request(0)], [request(i, "go" * i) for i in range(1, 5)]):
        assert np.array_equal(executed.act(rows)[0], plain.act(rows)[0])


def test_an_episode_that_begins_again_sees_nothing_of_the_one_whose_simulator_died(policy):
    batched = BatchedPolicy(policy, {"top": "cam"}, seed=1, width=1, n_action_steps=8)
    batched.reuse = Reuse(CacheConfig("images", 9, guard=False), policy)
    for replan in (0, 1, 0):
        batched.act([request(0, replan=replan)])
    assert batched.reuse.counts == {"fresh": 2, "reused": 1}


def test_pictures_of_an_episode_that_has_ended_are_not_kept(policy):
    batched = BatchedPolicy(policy, {"top": "cam"}, seed=1, width=1, n_action_steps=8)
    batched.reuse = Reuse(CacheConfig("images", 9, guard=False), policy, most=2)
    journal = SimpleNamespace(append=lambda record: None, records=[])
    measured = Measurement(None, batched, 2, journal, {"seed": 0, "weights": "", "commit": "", "variant": ""})
    batched.act([request(0)])
    batched.act([request(1)])
    run = Planned(SimpleNamespace(task="t", initial_state=1))
    ended = SimpleNamespace(success=True, steps=3, instruction="", other_success=None, failure="")
    measured.finished(run, ended, SimpleNamespace(set_postfix_str=lambda *_, **__: None))
    batched.act([request(2)])
    assert [state for _, state in batched.reuse._anchors] == [0, 2]


@pytest.mark.parametrize(("tier", "named"), [("", False), ("exact", False), ("fused", True)])
def test_a_tier_that_rounds_otherwise_is_named_in_the_settings(tier, named):
    job = _Job(EvalConfig(env="tabletop:lift", tier=tier), 32, False, False, make_env, swap=False)
    assert (job.settings("hash", ("front",), 8).get("tier") == "fused") is named


def test_refuses_nan_and_too_many_steps(policy):
    with pytest.raises(BurnishError, match="9 action steps; expected 1 to 8"):
        BatchedPolicy(policy, {"top": "cam"}, seed=1, width=1, n_action_steps=9)
    broken = request(0)
    broken.observation.state[0] = np.nan
    with pytest.raises(BurnishError, match="not finite"):
        BatchedPolicy(policy, {"top": "cam"}, seed=1, width=1, n_action_steps=8).act([broken])
