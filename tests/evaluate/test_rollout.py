"""Evaluation on a hand-made simulator: independence, continuation, swap, experts, videos, refusals."""

import json
from dataclasses import replace

import evaluation_fakes as fakes
import numpy as np
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.seeding import generator
from burnish.evaluate.records import read_results
from burnish.evaluate.rollout import evaluate, evaluate_expert

fakes.register()
QUIET = {"progress": False, "video": False, "make": fakes.make_env}


def bare(records):
    return [replace(r, latency_ms=()) for r in records]


def by_hand(task: str, state: int, seed: int = 0) -> tuple[bool, int]:
    """The episode of the fake policy, written out without any of the machinery."""
    env = fakes.make_env(task, 8)
    env.reset(state)
    steps, replan = 0, 0
    while True:
        level = int(np.clip(20 * env.x + 128, 0, 255)) / 255
        noise = torch.randn(1, 4, 1, generator=generator(seed, task, state, replan))
        chunk = (0.35 if env.right else -0.35) + 0.7 * noise[0, :, 0] + 0.01 * 192 * 1e-3 * level
        replan += 1
        for action in chunk[:2]:
            steps += 1
            if env.step(np.array([float(action)])):
                return True, steps
            if steps == 12:
                return False, steps


def test_episodes_are_those_of_a_plain_loop_for_any_workers_and_batch(tmp_path):
    policy = fakes.make_policy()
    first = evaluate(policy, "line", episodes=9, output=tmp_path / "1", workers=2, batch_size=6, **QUIET)
    expected = [by_hand(t, 1_000_000 + i) for t in ("line:a", "line:b") for i in range(9)]
    assert [(r.success, r.steps) for r in first.records] == expected
    assert 0 < first.overall.successes < 18
    assert set(policy.widths) == {4}  # half of the episodes in flight, and the ruler
    second = evaluate(policy, "line", episodes=9, output=tmp_path / "2", workers=1, batch_size=2, **QUIET)
    assert bare(second.records) == bare(first.records)
    assert all(len(r.latency_ms) == -(-r.steps // 2) for r in first.records)


def test_continues_and_refuses_other_settings(tmp_path):
    policy = fakes.make_policy()
    arguments = {"output": tmp_path, "workers": 1, "batch_size": 4, **QUIET}
    evaluate(policy, "line:a", episodes=3, **arguments)
    before = (tmp_path / "episodes.jsonl").read_bytes()
    both = evaluate(policy, "line:a", episodes=6, **arguments)
    assert (tmp_path / "episodes.jsonl").read_bytes().startswith(before)
    assert (len(both.records), both.new_episodes) == (6, 3)
    again = evaluate(policy, "line:a", episodes=6, **arguments)
    assert again.new_episodes == 0 and again.records == both.records
    with pytest.raises(BurnishError, match="other weights"):
        evaluate(fakes.make_policy(listens=False), "line:a", episodes=6, **arguments)
    with pytest.raises(BurnishError, match="other seed"):
        evaluate(policy, "line:a", episodes=6, seed=1, **arguments)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["overall"]["n"] == 6 and summary["latency_ms"]["n"] > 6


def test_limited_initial_states_are_not_repeated(tmp_path):
    result = evaluate(fakes.make_policy(), "line:limited", episodes=50, output=tmp_path, workers=1, **QUIET)
    assert [r.initial_state for r in result.records] == list(range(6))


def test_swap_tells_a_listening_policy_from_a_deaf_one(tmp_path):
    arguments = {"episodes": 20, "workers": 1, "instruction_swap": True, **QUIET}
    listening = evaluate(fakes.make_policy(), "line:a", output=tmp_path / "1", **arguments)
    deaf = evaluate(fakes.make_policy(listens=False), "line:a", output=tmp_path / "2", **arguments)
    assert listening.other.rate > 0.5 > listening.overall.rate
    assert all(r.variant == "instruction_swap" for r in listening.records)
    assert {r.instruction for r in listening.records} == {"go left", "go right"}
    right = {r.initial_state for r in deaf.records if r.instruction == "go left"}
    assert sum(r.success for r in deaf.records if r.initial_state in right) > 0.5 * len(right)


def test_experts_write_the_same_records(tmp_path):
    expert = evaluate_expert("line:a", episodes=20, output=tmp_path / "1", workers=1, **QUIET)
    assert expert.overall.rate == 1 and expert.records[0].weights == "expert" and not expert.latency_ms
    chance = evaluate_expert("line:a", episodes=20, output=tmp_path / "2", which="random_object", workers=1, **QUIET)
    assert 0.2 < chance.overall.rate < 0.8
    assert len(read_results(tmp_path / "2")) == 20
    with pytest.raises(BurnishError, match="unknown expert"):
        evaluate_expert("line:a", output=tmp_path / "3", which="good", **QUIET)


def test_videos_and_film_strips(tmp_path):
    import av
    from PIL import Image

    result = evaluate(
        fakes.make_policy(), "line:a", episodes=4, output=tmp_path, workers=1, progress=False, make=fakes.make_env
    )
    videos = result.to_dict()["videos"]
    assert len(videos) == 2 and len(list(tmp_path.glob("videos/*"))) == 4
    with av.open(str(tmp_path / videos[0]["video"])) as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert frames == result.records[0].steps + 1
    assert Image.open(tmp_path / videos[0]["film_strip"]).size == (6 * 8, 8)
    plain = evaluate(fakes.make_policy(), "line:a", episodes=4, output=tmp_path / "plain", workers=1, **QUIET)
    assert bare(plain.records) == bare(result.records)


def test_a_dead_simulator_is_named_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_TEST_CRASH", "1")
    arguments = {"episodes": 4, "first_state": 10, "output": tmp_path, "workers": 1, "batch_size": 1, **QUIET}
    with pytest.raises(BurnishError, match=r"exit code -9 while it held line:a, initial state 13"):
        evaluate(fakes.make_policy(), "line:a", **arguments)
    assert [r.initial_state for r in read_results(tmp_path)] == [10, 11, 12]
    monkeypatch.delenv("BURNISH_TEST_CRASH")
    assert len(evaluate(fakes.make_policy(), "line:a", **arguments).records) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": "line:missing"}, "unknown line task"),
        ({"cameras": ["top"]}, "cameras top for a policy that sees front"),
        ({"cameras": ["front", "side"]}, "cameras front, side"),
        ({"n_action_steps": 5}, "5 action steps; expected 1 to 4"),
        ({"episodes": 0}, "0 episodes"),
        ({"workers": -1}, "-1 workers"),
    ],
)
def test_refusals(tmp_path, change, message):
    arguments = {"env": "line:a", "episodes": 2, "workers": 1, "output": tmp_path / "x", **QUIET, **change}
    with pytest.raises(BurnishError, match=message):
        evaluate(fakes.make_policy(), **arguments)
    assert not (tmp_path / "x").exists()


def test_cameras_by_order(tmp_path):
    result = evaluate(fakes.make_policy(), "line:a", episodes=1, output=tmp_path, workers=1, cameras=["side"], **QUIET)
    assert result.settings["cameras"] == ["side"]


def test_command_on_the_tabletop(tmp_path, capsys):
    from burnish.cli.main import main

    arguments = ["eval", "expert", "--env", "tabletop:reach", "--episodes", "3", "--workers", "1", "--no-video"]
    assert main([*arguments, "--output", str(tmp_path / "x")]) == 0
    assert "(n=3)" in capsys.readouterr().out
    assert main(["eval", str(tmp_path), "--env", "tabletop:reach", "--output", str(tmp_path / "y")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.json" in error and not (tmp_path / "y").exists()
