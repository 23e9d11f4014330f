"""A robot's actor behind the relay of a trial, with two real policy servers: the one whose turn it is answers."""

import time

import numpy as np
import pytest
from serve_fakes import Seen, served

from burnish.core.errors import BurnishError
from burnish.evaluate.trial import Trial, TrialOptions
from burnish.runtime.client import Actor, PolicyClient


@pytest.mark.parametrize("said", [True, False])
def test_what_is_too_large_for_a_server_is_refused_on_the_way(said, tmp_path, monkeypatch):
    """By the relay where both servers say their limit, by the server where not; the robot is told once."""
    if not said:
        monkeypatch.setattr("burnish.runtime.client.unpack_openpi", lambda frame: {})
    small, large = Seen(("top",), 1), Seen(("top",), 1)
    with (
        served(small, max_mb=1) as one,
        served(large, max_mb=1 if not said else 3) as other,
        Trial(tmp_path / "t", one.address, other.address, TrialOptions(trials=1, relay_port=0)) as trial,
    ):
        trial.connect()
        trial.start(0)
        before = len(small.calls) + len(large.calls)
        with PolicyClient(trial.relay.address, patience=20) as robot:
            with pytest.raises(BurnishError, match="too large|message too big|exceeds|over"):
                robot.infer({"x": np.zeros(1 << 20, np.uint8)})
            assert robot.reconnects == 0 and len(small.calls) + len(large.calls) == before


def test_each_try_is_served_by_its_own_policy_and_stops_with_its_outcome(tmp_path):
    policies = {"a": Seen(("top",), 1), "b": Seen(("top",), 1)}
    seen = {"observation.images.top": np.zeros((8, 8, 3), np.uint8), "observation.state": np.ones(1), "task": "go"}
    with (
        served(policies["a"]) as one,
        served(policies["b"]) as other,
        Trial(tmp_path / "t", one.address, other.address, TrialOptions(trials=1, relay_port=0)) as trial,
    ):
        trial.connect()
        for number in range(2):
            arm = trial.arm(*trial.now)
            before = {name: len(policy.calls) for name, policy in policies.items()}
            trial.start(number)
            actor = Actor(PolicyClient(trial.relay.address))
            assert all(actor.act(seen).shape == (7,) for _ in range(6))
            if actor._waiting:
                actor._waiting[2].result(20)
            trial.outcome(number, True)
            made = {name: len(policy.calls) - before[name] for name, policy in policies.items()}
            assert made.pop(arm) >= 1 and list(made.values()) == [0]
            with pytest.raises(BurnishError, match="this trial is over"):
                for _ in range(2000):  # an actor holds its last action while it waits for an answer
                    actor.act(seen)
                    time.sleep(0.01)
            assert {name: len(policy.calls) - before[name] for name, policy in policies.items()}[arm] <= 6
            actor.close()
        assert [entry.asked > 0 for entry in trial.outcomes] == [True, True]
