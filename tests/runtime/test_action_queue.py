"""The queue that counts: every step executes one row, in order, of a chunk conditioned on what was executed before."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.runtime.realtime.queue import ActionQueue

STEPS = st.lists(st.sampled_from(["pop", "ask", "answer", "clear"]), min_size=1, max_size=60)


def chunk(base, length, version):
    """Rows that say for which step they are, and of which chunk."""
    return np.stack([np.arange(base, base + length), np.full(length, version)], 1).astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(1, 6))
def test_every_executed_row_is_the_row_of_its_step(steps, length):
    """Whatever the order of control steps, requests and answers: rows come in order, each from the latest chunk."""
    queue, asked, version, latest, executed = ActionQueue(), None, 0, None, 0
    for step in steps:
        if step == "ask" and asked is None:
            asked = queue.ask()
            assert asked.step == executed and asked.delay <= len(asked.rows)
            assert all(row[0] == executed + i for i, row in enumerate(asked.rows))
        elif step == "answer" and asked is not None:
            version += 1
            queue.splice(chunk(asked.step, length, version), asked)
            latest, asked = version, None
        elif step == "clear":
            queue.clear()
            asked = latest = None
        elif step == "pop":
            left, row = queue.left, queue.pop()
            assert (row is None) == (left == 0)
            if row is not None:
                assert row.tolist() == [executed, latest]
                executed += 1
    assert queue.executed == executed


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.integers(6, 9))
def test_committed_rows_leave_no_error(delays, length):
    """Chunks that begin with what was promised: none is executed that its successor was not conditioned on."""
    queue = ActionQueue()
    queue.splice(np.zeros((length, 1)), queue.ask())
    for number, delay in enumerate(delays, 1):
        asked = queue.ask(lambda delay=delay: delay)
        assert asked.delay == min(delay, len(asked.rows))
        for _ in range(asked.delay):
            queue.pop()
        answer = np.full((length, 1), float(number))
        answer[: asked.delay] = asked.rows[: asked.delay]
        assert queue.splice(answer, asked) == 0
        assert queue.pop() == number
    assert queue.commit_error == 0


def test_more_executed_than_promised_is_an_error_that_is_told():
    queue = ActionQueue()
    queue.splice(np.zeros((6, 2)), queue.ask())
    asked = queue.ask(lambda: 1)
    for _ in range(3):
        queue.pop()
    assert queue.splice(np.array([[0, 0], [0, 0.5], [2, 0], [3, 3]], float), asked) == 2
    assert queue.pop().tolist() == [3, 3] and queue.pop() is None and queue.starved == 1 and queue.commit_error == 2


def test_a_cold_start_begins_with_row_0_and_an_answer_of_an_earlier_episode_is_nothing():
    """A clock would have dropped the rows of the time that the robot stood still."""
    queue = ActionQueue()
    asked = queue.ask()
    assert [queue.pop() for _ in range(5)] == [None] * 5 and queue.executed == 0
    queue.splice(chunk(0, 3, 1), asked)
    assert [queue.pop()[0] for _ in range(3)] == [0, 1, 2] and not queue.delays
    old = queue.ask()
    queue.clear()
    assert queue.splice(chunk(3, 3, 2), old) == 0 and queue.pop() is None


def test_delays_are_predicted_from_the_last_fifty():
    queue = ActionQueue()
    assert queue.predict() == 0
    queue.delays.extend([30] * 3 + [2] * 50)
    assert queue.predict() == 2
    queue.delays.extend([9] * 4)
    assert queue.predict() == 9
