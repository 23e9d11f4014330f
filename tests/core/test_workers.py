"""Worker processes: results, order, errors in one piece, deaths that are noticed and named, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from burnish.core.errors import BurnishError
from burnish.core.workers import WorkerPool, count_workers


def powers(tasks, exponent):
    """The worker of these tests; some tasks are faults."""
    for task in tasks:
        if task == "refuse":
            raise BurnishError("no such task", "a number")
        if task == "fail":
            raise ValueError(f"cannot do {task}")
        if task == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "unpicklable":
            yield (x for x in ())
        if task == "pid":
            yield os.getpid()
        else:
            yield task**exponent


def remembers(tasks, folder):
    """Answers how many tasks it has had; notes that it came to its end."""
    count = 0
    try:
        for _ in tasks:
            count += 1
            yield count
    finally:
        (Path(folder) / str(os.getpid())).touch()


def sleeps(tasks):
    for seconds in tasks:
        time.sleep(seconds)
        yield seconds


def test_every_task_has_its_result_and_a_list_needs_no_process():
    with WorkerPool(powers, 3, count=3) as pool:
        found = dict(pool.run(range(20)))
    assert found == {n: n**3 for n in range(20)}
    assert list(powers([1, 2, 3], 3)) == [1, 8, 27]


def test_answers_of_one_process_come_in_the_order_of_its_tasks():
    with WorkerPool(powers, 2, count=2) as pool:
        for number in range(10):
            pool.send(number % 2, number)
        seen: dict[int, list] = {0: [], 1: []}
        while len(pool.idle()) < 2:
            for worker, task, result in pool.receive():
                assert result == task**2
                seen[worker].append(task)
    assert seen == {0: [0, 2, 4, 6, 8], 1: [1, 3, 5, 7, 9]}


def test_no_task_is_no_work():
    with WorkerPool(powers, 2, count=2) as pool:
        assert list(pool.run([])) == [] and pool.idle() == [0, 1]


def test_a_worker_keeps_its_state_and_comes_to_its_end(tmp_path):
    with WorkerPool(remembers, str(tmp_path), count=1) as pool:
        assert [result for _, result in pool.run("abc")] == [1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_refusal_arrives_word_for_word():
    with WorkerPool(powers, 2, count=2) as pool, pytest.raises(BurnishError) as error:
        list(pool.run([1, "refuse"]))
    assert str(error.value) == "no such task; expected a number"


def test_a_bug_arrives_with_its_traceback():
    with WorkerPool(powers, 2, count=1, name="squarer") as pool, pytest.raises(RuntimeError) as error:
        list(pool.run(["fail"], label=lambda task: f"the task {task}"))
    assert str(error.value) == "squarer 0 failed while it held the task fail: ValueError: cannot do fail"
    (trace,) = error.value.__notes__
    assert trace.startswith("Traceback") and "in powers" in trace and trace.endswith("ValueError: cannot do fail")


def test_a_result_that_cannot_travel_is_told():
    with WorkerPool(powers, 2, count=1) as pool, pytest.raises(RuntimeError, match="held unpicklable: .*generator"):
        list(pool.run(["unpicklable"]))


def test_a_death_is_noticed_and_named():
    with WorkerPool(powers, 2, count=2, name="squarer", fix="less at once") as pool:
        pool.send(1, "die", "the last straw")
        with pytest.raises(BurnishError) as error:
            while True:
                pool.receive()
    found, fix = "squarer 1 ended with exit code -9 while it held the last straw", "fewer --workers if memory ran out"
    assert str(error.value) == f"{found}; try: less at once; {fix}"


def test_the_death_of_an_idle_process_is_noticed_when_it_is_needed():
    with WorkerPool(powers, 2, count=1) as pool:
        ((_, pid),) = pool.run(["pid"])
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(BurnishError, match="process 0 ended with exit code -9 while it held"):
            list(pool.run([1]))


def test_closing_stops_whoever_is_busy_and_leaves_nobody(monkeypatch):
    monkeypatch.setattr("burnish.core.workers.GRACE", 0.1)
    pool = WorkerPool(sleeps, count=2)
    pool.send(0, 600.0)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 30
    assert not any(process.is_alive() for process in pool._crew.processes)
    pool.close()


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_workers import powers, sleeps
from burnish.core.workers import WorkerPool
if __name__ == "__main__":
    with WorkerPool(powers, 1, count=2) as pool, WorkerPool(sleeps, count=1) as busy:
        list(pool.run([1, 2])), list(busy.run([0.0]))
        busy.send(0, 0.3)
        print(*(process.pid for process in pool._crew.processes + busy._crew.processes), flush=True)
        while True:
            pool.receive()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(how):
    """A kill ends the parent alone; Ctrl-C reaches the whole group, and the parent ends it without a word from them."""
    command = [sys.executable, "-c", PARENT, str(Path(__file__).parent)]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )  # fmt: skip
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    if how == signal.SIGKILL:
        parent.send_signal(how)
    else:
        os.killpg(parent.pid, how)
    _, said = parent.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    if how == signal.SIGINT:
        assert said.count("Traceback") == 1 and said.rstrip().endswith("KeyboardInterrupt")


def test_as_many_workers_as_cores():
    assert count_workers(3) == 3 and count_workers() == len(os.sched_getaffinity(0))
    for wrong in (-1, 10**6):
        with pytest.raises(BurnishError, match=f"{wrong} workers"):
            count_workers(wrong)
