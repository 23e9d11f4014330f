"""Result files of other tools: lerobot-eval's, vla-eval's and openvla-oft's are read, anything else is named."""

import json

import pytest

from burnish.core.errors import BurnishError
from burnish.evaluate.compare import compare
from burnish.evaluate.results import read_results


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    return path


def lerobot(flags):
    """`flags` by (group, task): what lerobot-eval 0.4 and later writes."""
    return {
        "per_task": [
            {"task_group": group, "task_id": task,
             "metrics": {"sum_rewards": [float(f) for f in some], "successes": some, "video_paths": []}}
            for (group, task), some in flags.items()
        ],
        "overall": {"pc_success": 0.0},
    }  # fmt: skip


def vla_eval(**tasks):
    """Episodes by task, as allenai's vla-eval writes them."""
    return {
        "benchmark": "LIBERO", "config": {"params": {"seed": 7}},
        "tasks": [{"task": task, "num_episodes": len(some), "episodes": some} for task, some in tasks.items()],
    }  # fmt: skip


def openvla(outcomes, prefix=""):
    """The log of openvla-oft."""
    lines, number = [], {}
    for done, (task, success) in enumerate(outcomes, 1):
        number[task] = number.get(task, 0) + 1
        lines += ["", f"Task: {task}", f"Starting episode {number[task]}...", f"Success: {success}",
                  f"# episodes completed so far: {done}", f"# successes: {done} (1.0%)"]  # fmt: skip
    return "\n".join(prefix + line if line else line for line in lines + ["Current task success rate: 0.5", ""])


def told(records):
    return [(r.task, r.initial_state, r.success) for r in records]


def test_lerobot_eval(tmp_path):
    first = put(tmp_path / "a/eval_info.json", lerobot({("libero_goal", 0): [True, False], ("libero_goal", 3): [True]}))
    put(tmp_path / "b/eval_info.json", lerobot({("libero_goal", 0): [True, True], ("libero_goal", 3): [True]}))
    expected = [("libero_goal/0", 0, True), ("libero_goal/0", 1, False), ("libero_goal/3", 0, True)]
    assert told(read_results(first)) == told(read_results(tmp_path / "a")) == expected
    found = compare(tmp_path / "a", tmp_path / "b").overall
    assert (found.n, found.only_a, found.only_b) == (3, 0, 1)
    one_line = put(tmp_path / "c.json", json.dumps(lerobot({("g", 0): [True]})))
    assert told(read_results(one_line)) == [("g/0", 0, True)]


def test_lerobot_eval_before_0_4(tmp_path):
    episodes = [{"episode_ix": i, "sum_reward": 1.0, "success": i == 1, "seed": 1000 + i} for i in range(2)]
    file = put(tmp_path / "eval_info.json", {"per_episode": episodes, "aggregated": {}})
    assert told(read_results(file)) == [("", 0, False), ("", 1, True)]


def test_vla_eval(tmp_path, caplog):
    episodes = [
        {"episode_id": 4, "metrics": {"success": True}, "steps": 80},
        {"episode_id": 5, "metrics": {"success": 0.0}},
        {"episode_id": 6, "metrics": {}, "failure_reason": "timeout"},
    ]
    records = read_results(put(tmp_path / "r.json", vla_eval(lift=episodes, push=episodes[:1])))
    assert told(records) == [("lift", 4, True), ("lift", 5, False), ("push", 4, True)]
    assert [r.steps for r in records] == [80, -1, 80] and "1 episodes with a failure_reason" in caplog.text


@pytest.mark.parametrize("prefix", ["", "INFO:root:"])
def test_openvla_oft(tmp_path, prefix):
    outcomes = [("put the bowl on the plate", True), ("put the bowl on the plate", False), ("open it", True)]
    records = read_results(put(tmp_path / "EVAL-libero.txt", "Loaded model\n" + openvla(outcomes, prefix)))
    assert told(records) == [(outcomes[0][0], 0, True), (outcomes[0][0], 1, False), ("open it", 0, True)]


def test_rows_in_one_list(tmp_path):
    rows = [{"task": "t", "seed": seed, "success": seed == 1} for seed in range(3)]
    assert told(read_results(put(tmp_path / "r.json", rows))) == [("t", 0, False), ("t", 1, True), ("t", 2, False)]


@pytest.mark.parametrize("names", [("task_id", "episode"), ("task_description", "init_state_idx"), (None, "episode")])
def test_columns_under_other_names_are_named_with_the_edit_that_helps(tmp_path, names):
    import shlex
    import subprocess

    rows = [dict(zip(filter(None, names), (7, i) if names[0] else (i,), strict=True)) for i in range(2)]
    text = "".join(json.dumps(row | {"seed": 7, "success": True}) + "\n" for row in rows)
    file = put(tmp_path / "it's other.jsonl", text)
    with pytest.raises(BurnishError, match=names[1]) as error:
        read_results(file)
    command = str(error.value).partition("; try: ")[2]
    assert shlex.split(command)[0] == "sed"
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path)
    assert [r.initial_state for r in read_results(tmp_path / "renamed.jsonl")] == [0, 1]


def test_a_last_line_that_a_kill_cut_off_is_told(tmp_path, caplog):
    whole = '{"task": "t", "seed": 0, "success": true}\n'
    assert len(read_results(put(tmp_path / "r.jsonl", whole + '{"task": "t", "seed": 1, "succ'))) == 1
    assert "the last line of" in caplog.text
    with pytest.raises(BurnishError, match=":2 lacks success"):
        read_results(put(tmp_path / "r.jsonl", whole + '{"task": "t", "seed": 1}'))


def test_a_summary_points_to_its_folder(tmp_path):
    file = put(tmp_path / "eval/summary.json", {"overall": {"n": 1}, "per_task": {"t": {"n": 1}}})
    with pytest.raises(BurnishError, match=f"is a summary without episodes; expected the folder {file.parent}"):
        read_results(file)
