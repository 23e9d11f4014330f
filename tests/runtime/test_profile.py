"""The anatomy of a call: every millisecond is charged once, to the right stage."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from burnish.cli.main import main
from burnish.policies import load_policy
from burnish.policies.base import Stage
from burnish.policies.keys import TASK
from burnish.runtime import profile as module
from burnish.runtime.observations import observations
from burnish.runtime.profile import Clock, dissect, profile, quantiles
from workshop.tiny import make_tiny


class Sleepy:
    """A policy whose stages take known times; it nests them as real ones do."""

    device = torch.device("cpu")
    chunk_size, n_action_steps = 8, 4

    def __init__(self, ticks):
        self.ticks, self.counter = ticks, nn.Identity()

    def stages(self):
        names = {"look": "vision", "read": "prompt", "step": "pass", "speak": "head"}
        return [Stage(stage, self, call) for call, stage in names.items()]

    def token_counters(self):
        return [self.counter]

    def eval(self):
        return self

    def supports(self, capability):
        return False

    def act(self, batch):
        self.ticks(1)
        self.look()
        self.read()
        for _ in range(3):
            self.step()
        self.read()  # a second run over the prompt is a pass

    def look(self):
        self.ticks(10)

    def read(self):
        self.counter(torch.zeros(1, 20, 2))
        self.ticks(100)

    def step(self):
        self.ticks(1000)
        self.read_inside()
        self.speak()

    def read_inside(self):
        self.read()

    def speak(self):
        self.ticks(10_000)


@pytest.fixture
def sleepy(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0] / 1000))

    def ticks(milliseconds):
        now[0] += milliseconds

    return Sleepy(ticks)


def test_time_is_charged_to_the_innermost_stage(sleepy):
    found = dissect(sleepy, {TASK: [""]})
    expected = {"vision": 10, "prompt": 100, "passes": 3 * 1100 + 100, "head": 30_000, "host": 1}
    assert found.stages == pytest.approx({"preprocess": 0, "postprocess": 0, **expected})
    assert found.passes == pytest.approx([1100, 1100, 1100, 100])
    assert found.total == pytest.approx(sum(found.stages.values())) and found.positions == 5 * 20


def test_nothing_stays_wrapped(sleepy):
    dissect(sleepy, {TASK: [""]})
    assert not {"look", "read", "step", "speak"} & set(vars(sleepy)) and not sleepy.counter._forward_pre_hooks


def test_figures(sleepy):
    found = profile(sleepy, [{TASK: [""]}], repeats=4, warmup=1, progress=False).figures()
    whole = 1 + 10 + 100 + 3 * 11_100 + 100
    assert found["total"]["median"] == pytest.approx(whole) and found["stages_over_total"] == pytest.approx(1)
    assert found["replans_per_second"] == pytest.approx(1000 / whole)
    assert found["actions_per_second"] == pytest.approx(4000 / whole)
    assert found["passes"] == 5 and len(found["each_pass"]) == 4 and found["first_action"] == found["total"]


def test_quantiles_are_numpys():
    values = list(np.random.default_rng(0).random(50))
    assert quantiles(values)["p95"] == pytest.approx(np.percentile(values, 95))
    assert quantiles([3.0]) == {"median": 3.0, "p95": 3.0, "p99": 3.0}


def test_the_clock_survives_an_error():
    clock = Clock(torch.device("cpu"))
    with pytest.raises(KeyError), clock.stage("vision"):
        raise KeyError
    assert clock.open == []


@pytest.fixture(scope="module")
def tiny_discrete(tmp_path_factory):
    overrides = {"block_size": 7, "decoder": "pipelined"}
    return make_tiny("burnish_discrete", tmp_path_factory.mktemp("profile") / "p", overrides=overrides)


@pytest.mark.parametrize("kind", ["tiny_smolvla", "tiny_pi0", "tiny_pi05", "tiny_discrete"])
def test_real_policies(kind, request):
    policy = load_policy(request.getfixturevalue(kind))
    batch = observations(policy, 1)
    before = policy.act(batch, policy.draw(1, torch.Generator().manual_seed(0))).actions
    found = dissect(policy, batch)
    assert sum(found.stages.values()) == pytest.approx(found.total, rel=0.02)
    assert all(found.stages[name] > 0 for name in ("preprocess", "vision", "prompt", "passes", "head", "postprocess"))
    if kind != "tiny_discrete":
        assert len(found.passes) == 3
    assert found.positions > 20
    assert policy.act(batch, policy.draw(1, torch.Generator().manual_seed(0))).actions.equal(before)


def test_first_action_comes_before_the_last(tiny_discrete):
    policy = load_policy(tiny_discrete)
    result = profile(policy, [observations(policy, 1)], repeats=3, warmup=1, progress=False)
    figures = result.figures()
    assert figures["first_action"]["median"] < figures["total"]["median"]


def test_command_writes_table_and_json(tiny_discrete, tmp_path, capsys, recwarn):
    command = ["policy", "profile", str(tiny_discrete), "--repeats", "2", "--warmup", "1"]
    assert main([*command, "--output", str(tmp_path / "out.json"), "--fps", "1e6"]) == 0
    shown = capsys.readouterr().out
    assert not [one for one in recwarn if "Profiler clears events" in str(one.message)]
    assert "pass 2" in shown and "actions a second" in shown and "operators launched; late by" in shown
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["launches"] > 100 and kept["control_steps"] == np.ceil(1000 * kept["total"]["p95"])
    assert kept["type"] == "burnish_discrete" and kept["decoder"] == "pipelined"
    assert main([*command[:3], "--repeats", "1", "--warmup", "0", "--set", "decoder=sequential", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decoder"] == "sequential"
    assert main(["policy", "profile", str(tiny_discrete), "--repeats", "0"]) == 2


def test_without_waiting_the_prompt_is_charged_to_what_comes_after(monkeypatch):
    """A device that works on what the host has launched: the rule without synchronisation books it elsewhere."""
    now, busy = [0.0], [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0] / 1000))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: now.__setitem__(0, max(now[0], busy[0])))

    class Launching(Sleepy):
        device = torch.device("cuda")

        def stages(self):
            return [Stage("prompt", self, "read"), Stage("pass", self, "step")]

        def act(self, batch):
            self.read()
            self.step()
            torch.cuda.synchronize(None)  # the actions are copied to the host

        def launch(self, host, device):
            now[0] += host
            busy[0] = max(busy[0], now[0]) + device

        def read(self):
            self.launch(1, 99)

        def step(self):
            self.launch(1, 9)

    waited = dissect(Launching(None), {TASK: [""]})
    assert waited.stages["prompt"] == pytest.approx(100) and waited.stages["passes"] == pytest.approx(10)
    launched = dissect(Launching(None), {TASK: [""]}, wait=False)
    assert launched.stages["prompt"] == pytest.approx(1) and launched.stages["host"] == pytest.approx(107)
    found = profile(Launching(None), [{TASK: [""]}], repeats=2, warmup=1, progress=False).figures()
    assert found["shares"]["prompt"] > 0.9 > 0.02 > found["launched"]["prompt"]


def test_the_executor_is_dissected_too(tiny_smolvla):
    found = module.profile_policy(tiny_smolvla, tier="exact", repeats=2, warmup=1, progress=False)
    policy = load_policy(tiny_smolvla)
    assert found["tier"] == "exact" and len(found["each_pass"]) == policy.config.num_steps
    assert found["stages_over_total"] == pytest.approx(1, abs=0.01)
    assert all(found["stages"][name]["median"] > 0 for name in module.STAGES)
    assert found["rows"] == module.profile_policy(tiny_smolvla, repeats=1, warmup=1, progress=False)["rows"]
