"""The action queue: each control step executes one row, in order, of a chunk that goes on from what was done."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.runtime.realtime.queue import RECENT, ActionQueue

H = 12


def chunk(name, at, rows=H):
    """Row i of chunk `name` that begins at step `at` says so."""
    return np.array([[name, at + i] for i in range(rows)], np.float32)


class Clocked(ActionQueue):
    """The mutant: row n by the clock, whatever was executed."""

    clock = 0

    def splice(self, new, asked):
        super().splice(new, asked)
        self._base = self.executed - self.clock
        return 0.0


class Filled(ActionQueue):
    """The mutant: the old chunk's rest filled up with zeros."""

    def ask(self, predict=None):
        asked = super().ask(predict)
        rows = np.zeros((H, 2), np.float32)
        rows[: len(asked.rows)] = asked.rows.reshape(-1, 2)
        return type(asked)(asked.step, rows, asked.delay)


def drive(queue, events):
    """Ask, let `wait` moments pass, splice, execute `run` more; yields what was executed, row by row."""
    done, idle = [], 0

    def moment():
        nonlocal idle
        row = queue.pop()
        if row is None:
            idle += 1
        else:
            done.append(tuple(row))

    for name, (wait, run) in enumerate(events):
        asked = queue.ask()
        assert len(asked.rows) == queue.left <= H  # never filled up
        assert asked.delay <= len(asked.rows) and asked.step == queue.executed
        for _ in range(wait):
            moment()
        new = chunk(name, asked.step)
        n = queue.executed - asked.step
        new[:n] = np.array(done, np.float32).reshape(-1, 2)[asked.step :][:n][:H]  # conditioned on what was done
        error = queue.splice(new, asked)
        assert error == 0 and queue.commit_error == 0
        for _ in range(run):
            moment()
    return done, idle


EVENTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 16)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_every_step_executes_one_row_in_order(events):
    queue = ActionQueue()
    done, idle = drive(queue, events)
    assert [step for _, step in done] == list(range(len(done))) == list(range(queue.executed))
    names = [name for name, _ in done]
    assert names == sorted(names) and idle == queue.starved
    assert all(0 <= delay <= 8 for delay in queue.delays)


def test_a_clock_would_drop_rows_of_a_robot_that_stood_still():
    """The mutant executes another row than the one that follows: at the start it skips those of the clock."""
    queue, mutant = ActionQueue(), Clocked()
    for one in (queue, mutant):
        asked = one.ask()
        mutant.clock = 3
        for _ in range(3):
            one.pop()
        one.splice(chunk(0, 0), asked)
    assert queue.pop().tolist() == [0, 0] and mutant.pop().tolist() == [0, 3]


def test_rest_of_a_chunk_is_never_filled_up():
    with pytest.raises(AssertionError):
        drive(Filled(), [(0, 3), (2, 2)])


def test_executed_rows_that_the_chunk_was_not_conditioned_on_are_told():
    queue = ActionQueue()
    queue.splice(chunk(0, 0), queue.ask())
    queue.pop()
    asked = queue.ask()
    for _ in range(3):
        queue.pop()
    new = chunk(1, 1)
    new[0] = [0, 1]  # one row was foreseen, three were executed: two of chunk 1 differ by 1 in their name
    assert queue.splice(new, asked) == 1 == queue.commit_error
    assert queue.pop().tolist() == [1, 4]


def test_predicted_delay_is_the_95th_percentile_and_forgets():
    queue = ActionQueue()
    queue.splice(chunk(0, 0), queue.ask())
    assert queue.predict() == 0 and not queue.delays  # the first chunk bridges nothing

    def cycle(delay):
        asked = queue.ask()
        for _ in range(delay):
            queue.pop()
        queue.splice(chunk(1, asked.step), asked)

    for delay in [2] * 30 + [9] + [2] * 19:
        cycle(delay)
    assert len(queue.delays) == RECENT and queue.predict() == 2  # one spike in fifty is above the percentile
    for delay in [5] * 4:
        cycle(delay)
    assert queue.predict() == 5
    for delay in [1] * RECENT:
        cycle(delay)
    assert set(queue.delays) == {1} and queue.predict() == 1
    assert queue.ask(lambda: 99).delay == queue.left and queue.ask(lambda: -2).delay == 0


def test_starved_queue_stands_still():
    queue = ActionQueue(relative=(True, False))
    with pytest.raises(BurnishError, match="before the first row"):
        queue.idle()
    queue.splice(chunk(7, 0, rows=1), queue.ask())
    queue.pop()
    assert queue.pop() is None and queue.starved == 1
    assert queue.idle().tolist() == [0, 0] and queue.executed == 1
    absolute = ActionQueue()
    absolute.splice(chunk(7, 5, rows=1), absolute.ask())
    absolute.pop()
    assert absolute.idle().tolist() == [7, 5]


def test_answers_of_an_earlier_episode_are_not_taken():
    queue = ActionQueue()
    old = queue.ask()
    queue.clear()
    assert queue.splice(chunk(0, 0), old) is None and queue.left == 0
    first, second = queue.ask(), queue.ask()
    assert queue.splice(chunk(0, 0), first) is None and queue.splice(chunk(1, 0), second) == 0
    assert queue.pop().tolist() == [1, 0]


def test_flags_of_another_width_are_refused_with_the_first_chunk():
    """One was taken for all, and others ended the robot's loop where it first ran out of rows."""
    for flags in ([True], [True, False, True]):
        queue = ActionQueue(relative=flags)
        with pytest.raises(BurnishError, match=f"relative with {len(flags)} flags; expected 2"):
            queue.splice(chunk(0, 0), queue.ask())
