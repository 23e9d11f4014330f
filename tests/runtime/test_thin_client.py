"""The actor of the thin client: when it asks, what it executes, what a robot does for which there is no action."""

import threading
import time

import numpy as np
import pytest

from burnish.core.errors import BurnishError

pytest.importorskip("msgpack")

from burnish.runtime.client import Actor, Late  # noqa: E402


class Slow:
    """A client whose answers come when they are let go: the committed rows, then rows that say their control step."""

    session = "slow"

    def __init__(self, horizon=8):
        self.metadata = {"action_horizon": horizon, "n_action_steps": 4, "prefix": True, "observation_steps": [0]}
        self.go, self.asked = threading.Semaphore(0), []

    def infer(self, observation, prefix=None, **extras):
        self.asked.append((observation["step"], 0 if prefix is None else len(prefix)))
        assert self.go.acquire(timeout=20)
        rows = np.arange(8, dtype=np.float32)[:, None] + observation["step"] + len(self.asked) / 100
        rows[: self.asked[-1][1]] = prefix if prefix is not None else 0
        return {"actions": rows}


def test_an_actor_asks_in_time_and_executes_what_it_promised():
    """Answers take two control steps: predicted once one was counted, so nothing starves and no promise is broken."""
    slow = Slow()
    actor = Actor(slow, replan=4)
    slow.go.release()
    rows = []
    for step in range(32):
        rows.append(actor.act({"step": step})[0])
        if actor._waiting and actor.queue.executed - actor._waiting[0].step == 2:
            slow.go.release()
            actor._waiting[2].result(20)
    assert actor.queue.commit_error == 0 and actor.queue.starved == 0 and actor.queue.executed == 32
    assert [int(row) for row in rows] == list(range(32)) and set(list(actor.queue.delays)[1:]) == {2}
    assert [step for step, _ in slow.asked[3:]] == list(range(slow.asked[3][0], 32, 4))
    assert [count for _, count in slow.asked[:2]] == [0, 4] and {count for _, count in slow.asked[3:]} == {2}


def test_a_policy_that_executes_its_whole_chunk_is_asked_before_its_end():
    """As LeRobot's SmolVLA, pi0 and ACT are by default: the robot stood still at the end of every chunk."""
    slow = Slow()
    actor, age = Actor(slow, replan=8), 0
    slow.go.release()
    for step in range(60):
        actor.act({"step": step})
        age = age + 1 if actor._waiting else 0
        if age >= (2 if step < 30 else 5):  # it gets slower than it has ever been
            slow.go.release()
            actor._waiting[2].result(20)
        if step == 29:
            assert actor.queue.starved == 0 and actor.queue.commit_error == 0 and set(actor.queue.delays) == {2}
    assert max(actor.queue.delays) == 5 and 0 < actor.queue.starved <= 3


@pytest.mark.parametrize(("relative", "value"), [((), 7.01), ((True,), 0.0)])
def test_an_actor_without_an_answer_in_time(relative, value):
    slow = Slow()
    actor = Actor(slow, relative=relative, deadline=0.05)
    slow.go.release()
    rows = [float(actor.act({"step": step})[0]) for step in range(12)]
    assert rows[8:] == pytest.approx([value] * 4) and actor.queue.starved == 4
    time.sleep(0.06)
    slow.go.release()
    actor._waiting[2].result(20)
    assert actor.act({"step": 12})[0] == pytest.approx(value) and actor.late == 1
    slow.go.release()
    actor._waiting[2].result(20)
    assert actor.act({"step": 13})[0] == pytest.approx(12.03)  # asked for at step 12, the robot stood still
    actor.reset()
    slow.go.release()
    assert actor.act({"step": 0})[0] == pytest.approx(0.04)
    with pytest.raises(BurnishError, match="9 rows"):
        Actor(slow, replan=9)


def test_an_actor_tells_a_server_that_goes_on_where_it_is():
    """The call whose chunk it executes, the rows of it that are done, and those that will be: not the actions."""
    slow = Slow()
    slow.metadata["async"], told, infer = "guided", [], slow.infer

    def noted(observation, prefix=None, **extras):
        told.append((prefix, extras.get("chunk"), extras.get("executed"), extras.get("delay")))
        return infer(observation) | {"call": 10 + len(told)}

    slow.infer = noted
    actor = Actor(slow, replan=4)
    for _ in range(20):
        slow.go.release()
    for step in range(17):
        actor.act({"step": step})
        if actor._waiting and actor.queue.executed - actor._waiting[0].step == 2:
            actor._waiting[2].result(20)
    assert told[0] == (None, None, None, None)
    assert all(prefix is None and executed == 4 for prefix, _, executed, _ in told[1:])
    assert [chunk for _, chunk, _, _ in told[1:]] == list(range(11, 11 + len(told) - 1))


def test_what_the_server_took_up_too_late_counts_as_late_and_an_episode_is_a_session():
    slow, told = Slow(), []
    infer = slow.infer

    def busy(observation, **extras):
        told.append((extras.get("session"), extras.get("reset")))
        if len(told) == 2:
            raise Late("the deadline has passed")
        return infer(observation)

    slow.infer = busy
    actor = Actor(slow, replan=2)
    for _ in range(9):
        slow.go.release()
    for step in range(5):
        actor.act({"step": step})
        if actor._waiting:
            actor._waiting[2].exception(20)
    assert actor.late == 1 and actor.queue.starved == 0 and len(told) == 3
    actor.reset()
    for step in range(3):
        actor.act({"step": step})
    actor._waiting[2].result(20)
    assert told[:3] == [(None, None)] * 3 and told[3:5] == [("slow/1", True), ("slow/1", False)]
