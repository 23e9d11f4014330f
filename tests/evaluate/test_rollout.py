"""Evaluation on a hand-made simulator: independence, continuation, swap, experts, videos, refusals."""

import json
from dataclasses import replace
from unittest import mock

import evaluation_fakes as fakes
import numpy as np
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.outputs import MARK
from burnish.core.seeding import generator
from burnish.evaluate.results import read_results
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
    assert first.failures == {"out of time": 18 - first.overall.successes}
    assert f"failed: out of time {18 - first.overall.successes}" in str(first)
    assert json.loads((tmp_path / "1/summary.json").read_text())["failures"] == first.failures
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


def test_one_that_is_extended_and_killed_has_not_ended(tmp_path, monkeypatch):
    arguments = {"output": tmp_path, "workers": 1, **QUIET}
    policy, summary = fakes.make_policy(), tmp_path / "summary.json"
    evaluate(policy, "line:a", episodes=3, **arguments)
    monkeypatch.setattr("burnish.evaluate.scheduler.Measurement.run", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate(policy, "line:a", episodes=5, **arguments)
    assert not summary.exists()
    monkeypatch.undo()
    evaluate(policy, "line:a", episodes=3, **arguments)
    assert json.loads(summary.read_text())["overall"]["n"] == 3


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
        ({"episodes": 0}, "episodes is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"max_steps": -1}, "max_steps is -1; expected at least 0"),
        ({"first_state": -1}, "first_state is -1"),
        ({"batch_size": 10**9}, "batch_size is 1000000000"),
        ({"episodes": 10**9}, "episodes is 1000000000"),
        ({"n_action_steps": 0}, "0 action steps"),
        ({"image_size": 0}, "images of 0x0; expected sides of 8 to 4096"),
        ({"image_size": 10**6}, "images of 1000000x1000000"),
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


def test_views_have_the_height_and_width_of_the_policy(tmp_path):
    policy = fakes.make_policy(size=(12, 20))
    arguments = {"episodes": 2, "workers": 1, **QUIET}
    result = evaluate(policy, "line:a", output=tmp_path / "1", **arguments)
    assert policy.shapes == {(3, 12, 20)} and result.settings["image_size"] == [12, 20]
    again = evaluate(policy, "line:a", output=tmp_path / "1", **arguments)
    assert again.new_episodes == 0
    square = evaluate(policy, "line:a", output=tmp_path / "2", image_size=16, **arguments)
    assert square.settings["image_size"] == 16 and policy.shapes == {(3, 12, 20), (3, 16, 16)}


def test_an_environment_of_squares_and_a_size_beyond_all_are_refused_before_any_process(tmp_path, monkeypatch):
    monkeypatch.setattr("burnish.evaluate.rollout.SimulatorPool", None)
    for size, env, message in (
        ((12, 20), "squares:a", "images of 12x20 from squares, which draws one square size; .*--image-size 20"),
        ((12, 20000), "line:a", "images of 12x20000; expected sides of 8 to 4096 pixels"),
    ):
        with pytest.raises(BurnishError, match=message):
            evaluate(fakes.make_policy(size=size), env, output=tmp_path / "x", **QUIET)
    assert not (tmp_path / "x").exists()


def test_sizes_by_camera():
    from burnish.evaluate.batching import view_sizes

    policy = fakes.make_policy()
    type(policy).cameras, type(policy).view_sizes = ("front", "side"), {"front": (8, 12), "side": (16, 16)}
    assert view_sizes(policy, None) == {"front": [8, 12], "side": [16, 16]}
    assert view_sizes(policy, ["top", "wrist"]) == {"top": [8, 12], "wrist": [16, 16]}
    with pytest.raises(BurnishError, match="camera top for views of .8, 12. and .16, 16. pixels"):
        view_sizes(policy, ["top", "top"])


def test_films_of_large_views_are_thinned_and_padded():
    from burnish.evaluate.simulators import _side_by_side

    large, small = np.full((480, 640, 3), 7, np.uint8), np.full((96, 128, 3), 9, np.uint8)
    frame = _side_by_side([large, small])
    assert (
        frame.shape == (240, 320 + 128, 3)
        and frame[0, 0, 0] == 7
        and frame[95, 320, 0] == 9
        and not frame[96:, 320:].any()
    )


def test_an_expert_leaves_out_what_it_cannot_do(tmp_path, caplog):
    found = evaluate_expert("line:mixed", episodes=3, output=tmp_path / "1", workers=1, **QUIET)
    assert {r.task for r in found.records} == {"line:a"} and len(found.records) == 3
    assert "no scripted expert for line:dull" in caplog.text and "line:dull" in str(found)
    summary = json.loads((tmp_path / "1/summary.json").read_text())
    assert summary["left_out"] == {"line:dull": "no scripted expert for line:dull"}
    with pytest.raises(BurnishError, match="no scripted expert for line:dull"):
        evaluate_expert("line:dull", episodes=3, output=tmp_path / "2", workers=1, **QUIET)
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize("files", [
    {"summary.json": "mine"}, {"episodes.jsonl": '{"task": "a", "cut of'}, {"meta/info.json": "{}"}, {"notes.txt": ""},
    {"settings.json": '{"theme": "dark"}', "episodes.jsonl": "x"},
])  # fmt: skip
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for call in (lambda: evaluate(fakes.make_policy(), "line:a", output=tmp_path, **QUIET),
                 lambda: evaluate_expert("line:a", output=tmp_path, **QUIET)):  # fmt: skip
        with pytest.raises(BurnishError, match="which this would overwrite"):
            call()
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_an_evaluation_without_our_marker_goes_on(tmp_path):
    arguments = {"output": tmp_path, "workers": 1, **QUIET}
    evaluate(fakes.make_policy(), "line:a", episodes=2, **arguments)
    (tmp_path / MARK).unlink()
    assert evaluate(fakes.make_policy(), "line:a", episodes=3, **arguments).new_episodes == 1
    (tmp_path / "settings.json").write_text((tmp_path / "settings.json").read_text()[:40])
    with pytest.raises(BurnishError, match="settings.json is not JSON"):
        evaluate(fakes.make_policy(), "line:a", episodes=3, **arguments)


def test_a_full_disk_is_one_line_and_the_evaluation_goes_on(tmp_path, monkeypatch):
    import os

    wrote, room = os.fsync, [2]

    def full(handle):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        wrote(handle)

    arguments = {"episodes": 4, "output": tmp_path, "workers": 1, **QUIET}
    evaluate(fakes.make_policy(), "line:a", **{**arguments, "episodes": 1})
    monkeypatch.setattr("burnish.evaluate.records.os.fsync", full)
    with pytest.raises(BurnishError, match="no room left while writing .*episodes.jsonl"):
        evaluate(fakes.make_policy(), "line:a", **arguments)
    monkeypatch.undo()
    assert len(evaluate(fakes.make_policy(), "line:a", **arguments).records) == 4
