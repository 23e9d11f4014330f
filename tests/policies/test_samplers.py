"""Samplers on LeRobot's own models: the default is theirs bit for bit, and others differ as samplers do."""

import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from burnish.runtime.executor import Runtime
from burnish.sampling.solvers import make_solver
from burnish.sampling.steering import Steering


def chunk(policy, batch, sampler="", **how):
    policy.sampler, draws = sampler, policy.draw(3, torch.Generator().manual_seed(5))
    return policy.eval().act(batch, draws, **how).actions


def test_euler_of_the_configs_steps_is_the_default_bit_for_bit(folder, batch):
    policy = load_policy(folder)
    policy.set_steps(3)
    before = dict(vars(policy.policy.model))
    default = chunk(policy, batch)
    assert torch.equal(chunk(policy, batch, sampler="euler:3"), default)
    assert vars(policy.policy.model).keys() == before.keys()
    assert not torch.equal(chunk(policy, batch, sampler="ab2:3"), default)


@pytest.mark.parametrize("sampler", ["ab2:3", "midpoint:2", "heun:3", "dpm2m:3", "euler:2:1.5"])
def test_executor_and_policy_agree_on_every_sampler(tiny_smolvla, batch, sampler):
    policy = load_policy(tiny_smolvla)
    theirs = chunk(policy, batch, sampler)
    draws = policy.draw(3, torch.Generator().manual_seed(5))
    ours = Runtime(policy, solver=make_solver(sampler)).act(batch, draws).actions
    assert torch.allclose(ours, theirs, atol=1e-6) and torch.equal(Runtime(policy).act(batch, draws).actions, ours)


def test_committed_rows_are_followed_by_other_samplers(policy, batch):
    prefix = batch["action"][:, :2]
    assert torch.equal(chunk(policy, batch, prefix=prefix, sampler="ab2:3")[:, :2], prefix)


@pytest.mark.parametrize("mode", ["guided", "inpaint"])
def test_steering_by_euler_is_the_default_steering(policy, batch, mode):
    """The same pull, in LeRobot's loop and in ours; and what AB2 is steered to holds its committed rows."""
    policy.set_steps(3)
    old = policy.eval().act(batch, policy.draw(3, torch.Generator().manual_seed(6))).raw[:, 2:]
    steering = Steering(old, 2, 5, mode=mode)
    default = chunk(policy, batch, steering=steering)
    assert torch.allclose(chunk(policy, batch, "euler:3", steering=steering), default, atol=1e-5)
    policy.sampler = "ab2:3"
    assert torch.equal(policy.act(batch, steering=steering).raw[:, :2, :7], old[:, :2, :7])
    with pytest.raises(BurnishError, match="single pass"):
        chunk(policy, batch, "midpoint:4", steering=steering)


def test_candidates_follow_the_sampler(policy, batch):
    draws = [policy.draw(3, torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    policy.eval().sampler = "ab2:3"
    found = policy.candidates(batch, torch.stack([d.noise for d in draws], 1)).actions
    assert torch.allclose(found[:, 0], policy.act(batch, draws[0]).actions, atol=1e-5)


def test_an_unknown_sampler_is_refused_before_the_network_runs(policy, batch):
    with pytest.raises(BurnishError, match="unknown sampler"):
        chunk(policy, batch, sampler="rk4:4")


def test_the_steps_are_saved_for_lerobot(policy, tmp_path):
    policy.set_steps(2)
    policy.save(tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    assert again.flow_parts().steps == 2 == policy.flow_parts().steps
