"""BURNISH_RUNTIME: LeRobot's own policies sample through the executor, and say the same."""

import copy
import importlib
import logging

import pytest
import torch
from test_executor import observed

from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from burnish.runtime.executor import Sampler
from lerobot_policy_burnish import executor


@pytest.fixture
def hooked():
    yield executor.enable
    executor.disable()


def chunks(policy, seeds=(0, 1)):
    """LeRobot's own call, with noise from the global generator as lerobot-eval has it."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append(policy.policy.predict_action_chunk(policy.preprocessor(dict(observed(policy, 2, seed)))))
    return found


@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
def test_predict_action_chunk_is_the_same(kind, request, hooked, monkeypatch):
    folder, ran = request.getfixturevalue(f"tiny_{kind}"), []
    want = chunks(load_policy(folder))
    hooked("exact")
    policy, real = load_policy(folder), Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, *args: ran.append(self.tier) or real(self, *args))
    assert all(map(torch.equal, chunks(policy), want))
    assert ran == ["exact"] * 3  # one of them to be compared
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        twin.policy.model.action_out_proj.bias.add_(1)
    assert not torch.equal(chunks(twin)[0], want[0]) and torch.equal(chunks(policy)[0], want[0])
    batch = observed(policy, 2)
    prefix = torch.zeros(2, 3, 7)
    assert policy.act(batch, prefix=prefix).actions[:, :3].equal(prefix)


def test_a_tier_that_differs_is_left_with_one_line(tiny_smolvla, hooked, monkeypatch, caplog):
    want = chunks(load_policy(tiny_smolvla))
    hooked("auto")
    policy, real = load_policy(tiny_smolvla), Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, *args: real(self, *args) + 1e-3)
    with caplog.at_level(logging.WARNING, "burnish"):
        assert all(map(torch.equal, chunks(policy, (0, 1)), want))
    said = [record.getMessage() for record in caplog.records if record.name == "burnish"]
    assert len(said) == 2 and "going on with exact" in said[0] and "LeRobot's own sampler" in said[1]
    monkeypatch.setattr(Sampler, "sample", real)
    again = load_policy(tiny_smolvla)
    torch.testing.assert_close(chunks(again)[0], want[0])
    assert again.policy.model._burnish_executors.samplers[0].tier == "fused"


def test_guided_calls_are_lerobots(tiny_pi05, hooked):
    hooked("exact")
    policy = load_policy(tiny_pi05)
    inputs, _ = policy.begin(observed(policy, 2))
    model = policy.policy.model
    noise = torch.zeros(2, 8, 8)
    with torch.no_grad():
        model.sample_actions(*inputs, noise=noise, num_steps=3)
    assert "_burnish_executors" not in vars(model)


def test_an_unknown_mode_is_refused(hooked):
    with pytest.raises(BurnishError, match="BURNISH_RUNTIME=quick; expected one of exact, fused, auto; try: unset"):
        hooked("quick")


def test_the_variable_is_read_when_lerobot_imports_the_plug_in(hooked, monkeypatch):
    monkeypatch.setenv(executor.VARIABLE, "exact")
    importlib.reload(executor)
    assert executor._HOOKED
    executor.disable()
    monkeypatch.delenv(executor.VARIABLE)
    importlib.reload(executor)
    assert not executor._HOOKED
