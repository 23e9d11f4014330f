"""Evaluation under delay: which rows a robot executes, counted by hand on the fakes' line."""

import json

import numpy as np
import pytest
import torch
from evaluation_fakes import make_env, make_policy, register

from burnish.core.config import DelayConfig
from burnish.core.errors import BurnishError
from burnish.envs.base import EnvSpec, Observation
from burnish.evaluate.batching import Request
from burnish.evaluate.delay import (
    COMMITTING,
    Ahead,
    DelayedMeasurement,
    DelayedPolicy,
    Plan,
    measured_steps,
    motion,
)
from burnish.evaluate.rollout import evaluate
from burnish.evaluate.simulators import Episode
from burnish.policies import create_policy, load_policy

register()
H, S = 8, 3
SPEC = EnvSpec("line:a", ("front",), ("x",), ("dx", "grip"), np.array([-1.0, -0.5]), np.ones(2), 10, 99,
               relative=(True, False))  # fmt: skip


class Counter:
    """A policy whose chunk number r has the rows (r, 0), (r, 1), ...; with a prefix it returns those rows first."""

    act_steps, chunk_size, action_dim, name = H, H, 2, "counter"
    raw = False

    def supports(self, capability):
        return True

    def eval(self):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])


def late(mode, d, policy=None):
    return DelayedPolicy(policy or Counter(), {"front": "front"}, 0, 2, S, delay=DelayConfig(d, mode), spec=SPEC)


def chunk(r, done=()):
    rows = np.array([[r, i] for i in range(H)], np.float32)
    rows[: len(done)] = np.asarray(done).reshape(-1, 2)
    return Plan(rows)


def executed(mode, d, replans):
    policy = late(mode, d)
    measured = DelayedMeasurement.__new__(DelayedMeasurement)
    measured.policy = policy
    run = Ahead(Episode("line:a", 0, 99))
    for r in range(replans):
        known = () if run.rest is None or mode not in COMMITTING else run.rest.actions[:d]
        measured.planned(run, chunk(r, known), 1.0)
        assert len(run.rest.actions) == H - S  # never filled up
    return np.stack(run.executed).tolist(), run


@pytest.mark.parametrize("mode", ["naive", "guided"])
def test_rows_are_those_of_the_old_chunk_until_the_new_one_is_there(mode):
    rows, run = executed(mode, 2, 3)
    still, old = [[0, -0.5]] * 2, [[0, 0], [0, 1], [0, 2]]
    assert rows[:5] == still + old
    first = [0, 3], [0, 4]
    assert rows[5:8] == [*first, [1, 2]]  # two of chunk 0 go on, then row 2 of chunk 1
    if mode == "naive":
        assert rows[8:] == [[1, 3], [1, 4], [2, 2]] and run.commit_error == 0  # it promised nothing
    assert run.chunk == [-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 2] and run.commit_error == 0


def test_a_chunk_that_was_not_conditioned_is_told():
    measured = DelayedMeasurement.__new__(DelayedMeasurement)
    measured.policy = late("guided", 2)
    run = Ahead(Episode("line:a", 0, 99))
    measured.planned(run, chunk(0), 1.0)
    measured.planned(run, chunk(1), 1.0)  # its first rows are not those that are executed
    assert run.commit_error == 3  # (0, 3) was executed where it has (1, 0)


def test_a_robot_that_waits_repeats_its_gripper_and_does_not_move():
    rows, run = executed("sync", 2, 2)
    assert rows == [[0, -0.5], [0, -0.5], [0, 0], [0, 1], [0, 2], [0, 2], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert run.chunk == [-1, -1, 0, 0, 0, -1, -1, 1, 1, 1]


def test_no_delay_is_no_delay():
    rows, _ = executed("naive", 0, 3)
    assert rows == [[r, i] for r in range(3) for i in range(S)]


def test_motion_by_hand():
    actions, number = np.array([[0.0], [1], [3], [3], [0], [0]]), np.array([0, 0, 1, 1, -1, 2])
    found = motion(actions, number)
    assert found == {"border": 2.0, "inner": 0.5, "jerk": np.mean([1, 2, 3, 3]), "idle": 1.0}
    assert motion(actions[:1], number[:1]) == {"idle": 0.0}


@pytest.mark.parametrize(
    ("mode", "d", "said"),
    [
        ("naive", 4, "a delay of 4 steps with chunks of 8, 3"),
        ("guided", 1, "mode guided"),
        ("tokens", 1, "mode tokens"),
    ],
)
def test_refusals(mode, d, said):
    policy = Counter()
    policy.supports = lambda capability: False
    with pytest.raises(BurnishError, match=said):
        late(mode, d, policy)


def test_an_environment_must_say_how_it_stands_still(tmp_path):
    with pytest.raises(BurnishError, match="line:a does not say how its robot stands still"):
        evaluate(make_policy(), "line:a", episodes=2, output=tmp_path, workers=1, video=False, progress=False,
                 make=make_env, delay=DelayConfig(1))  # fmt: skip


def requests(policy, rests, replan=3):
    g = np.random.default_rng(0)
    rows = []
    for i, rest in enumerate(rests):
        images = {name: g.integers(0, 255, (32, 32, 3), dtype=np.uint8) for name in ("top", "wrist")}
        rows.append(Request(Observation(images, g.standard_normal(7).astype(np.float32), "open"), "t", i, replan, rest))
    return rows


@pytest.mark.parametrize("mode", ["guided", "inpaint", "tokens", "bid", "ensemble"])
def test_modes_on_a_flow_policy(tiny_smolvla, mode):
    """Rows with an old chunk go on from it; one without is the plain policy's, bit for bit, whoever is beside it."""
    policy = load_policy(tiny_smolvla)
    spec = EnvSpec("t", ("top", "wrist"), (), (), np.full(7, -1.0), np.ones(7), 10, 99, relative=(True,) * 7)
    cameras = {"top": "top", "wrist": "wrist"}

    def make(mode, d=2):
        return DelayedPolicy(policy, cameras, 5, 2, 4, delay=DelayConfig(d, mode), spec=spec)

    old = make("naive").plans(requests(policy, [None, None], 2))[0][0].after(4)
    plain = make("naive").plans(requests(policy, [None, None]))[0]
    first, second = make(mode).plans(requests(policy, [old, None]))[0]
    np.testing.assert_array_equal(second.actions, plain[1].actions)
    assert (first.actions != plain[0].actions).any() or mode == "bid"
    if mode in ("guided", "inpaint", "tokens"):
        np.testing.assert_array_equal(first.actions[:2], old.actions[:2])
    if mode == "ensemble":
        np.testing.assert_allclose(first.actions[:4], (plain[0].actions[:4] + old.actions) / 2, rtol=1e-6)
        np.testing.assert_array_equal(first.actions[4:], plain[0].actions[4:])
    if mode == "bid":
        near = np.linalg.norm(first.actions[:2] - old.actions[:2])
        assert near <= np.linalg.norm(plain[0].actions[:2] - old.actions[:2])
    calm = make(mode, 0).plans(requests(policy, [old, None]))[0]
    if mode in ("guided", "inpaint", "tokens"):  # nothing to bridge: the plain policy
        np.testing.assert_array_equal(calm[0].actions, plain[0].actions)


def test_tokens_stop_early_and_are_carried_for_as_long_as_is_said(tmp_path):
    """What is executed or committed next is final; tokens behind it go on, unless they are too old."""
    overrides = {"block_size": 7, "decoder": "together", "decoder_options": {"threshold": 0.02}, "chunk_size": 8}
    from workshop.tiny import make_tiny

    policy = load_policy(make_tiny("burnish_discrete", tmp_path / "p", overrides={**overrides, "n_action_steps": 3}))
    spec = EnvSpec("t", ("top", "wrist"), (), (), np.full(7, -1.0), np.ones(7), 10, 99, relative=(True,) * 7)

    def make(carry):
        delay = DelayConfig(2, "tokens", carry=carry)
        return DelayedPolicy(policy, {"top": "top", "wrist": "wrist"}, 5, 2, 3, delay=delay, spec=spec)

    late, calls = make(1), []
    act = policy.act
    policy.act = lambda *given, **more: calls.append(more) or act(*given, **more)
    (first,), _ = late.plans(requests(policy, [None], 0))
    mask = policy.token_model().mask_id
    assert calls[-1] == {"until": 5} and (first.tokens[:5] != mask).all() and not first.ages.any()
    rest = first.after(3)
    rest.tokens[2:4], rest.tokens[4] = 5, mask  # as if the early exit had left two steps; one is open
    (second,), _ = late.plans(requests(policy, [rest], 1))
    carried = rest.tokens != mask
    assert calls[-1]["until"] == 5 and calls[-1]["carry"][0].view(8, 7)[:5].equal(rest.tokens)
    assert second.tokens[:5][carried].equal(rest.tokens[carried]) and (second.ages[:5] == carried).all()
    np.testing.assert_array_equal(second.actions[:2], rest.actions[:2])
    third = second.after(3)
    ids, ages = late._carried(third)
    assert (ids[0] == mask).all() and not ages[0].any(), "a replan too old"
    assert ids[1].equal(second.tokens[4]) and (ages[1] == 1).all()
    make(0).plans(requests(policy, [rest], 1))
    assert "carry" not in calls[-1] and calls[-1]["until"] == 5


@pytest.mark.parametrize(
    ("found", "quantile", "steps"),
    [({"total": {"median": 90.0, "p95": 210.0, "p99": 301}}, "p95", 3), ({"p50_ms": 100.0, "p95_ms": 1.0}, "p50", 1),
     ({"total": {"median": 90.0}}, "p50", 1), ({"latency_ms": {"p99": 400.0}}, "p99", 4)],
)  # fmt: skip
def test_a_delay_comes_from_a_latency_that_was_measured(tmp_path, found, quantile, steps):
    (tmp_path / "found.json").write_text(json.dumps(found))
    assert measured_steps(f"{quantile}:{tmp_path / 'found.json'}", 10) == steps


@pytest.mark.parametrize("text", ["p95", "p90:found.json", "2.5", "p95:found.json", "p99:found.json", "p95:none.json"])
def test_other_delays_are_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "found.json").write_text('{"total": {"p95": "x"}, "p95_ms": -1, "p99_ms": 0.0}')
    with pytest.raises(BurnishError):
        measured_steps(text, 10)


def test_any_policy_that_acts_can_be_late():
    """An ACT knows nothing of old chunks; what needs that is refused."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    from workshop.tiny import default_statistics

    shapes = {"observation.images.top": (FeatureType.VISUAL, (3, 32, 32)), "action": (FeatureType.ACTION, (7,)),
              "observation.state": (FeatureType.STATE, (7,))}  # fmt: skip
    overrides = {"chunk_size": 8, "n_action_steps": 8, "dim_model": 32, "n_heads": 2, "dim_feedforward": 48,
                 "n_encoder_layers": 1, "latent_dim": 4, "n_vae_encoder_layers": 1}  # fmt: skip
    stats = default_statistics(7, 7)
    stats["observation.images.top"] = {k: torch.full((3, 1, 1), 0.3) for k in ("mean", "std", "min", "max")}
    policy = create_policy("", {k: PolicyFeature(*v) for k, v in shapes.items()}, stats, overrides, type="act")
    spec = EnvSpec("t", ("top",), (), (), np.full(7, -1.0), np.ones(7), 10, 99, relative=(True,) * 7)

    def plans(rests, mode):
        late = DelayedPolicy(policy, {"top": "top"}, 5, 2, 4, delay=DelayConfig(2, mode), spec=spec)
        return late.plans(requests(policy, rests))[0]

    with pytest.raises(BurnishError, match="no way to go on from an old chunk"):
        plans([None], "guided")
    plain = plans([None, None], "naive")
    old = Plan(plain[1].actions[4:] + 1)
    for mode in ("naive", "ensemble", "bid"):
        first, second = plans([old, None], mode)
        np.testing.assert_array_equal(second.actions, plain[1].actions)
        expected = (plain[0].actions[:4] + old.actions) / 2 if mode == "ensemble" else plain[0].actions[:4]
        np.testing.assert_allclose(first.actions[:4], expected, rtol=1e-5)  # it draws nothing: eight equal candidates


def test_closed_loop_under_delay(tmp_path, tiny_smolvla, monkeypatch):
    """On the tabletop's own simulator: outcomes and what was executed are recorded, and a second call continues."""
    from workshop.tiny import make_tiny

    folder = make_tiny("smolvla", tmp_path / "p", cameras=("front",), state_dim=4, action_dim=4)
    given = {"episodes": 2, "workers": 1, "max_steps": 9, "n_action_steps": 3, "video": False, "progress": False}
    found = evaluate(folder, "tabletop:reach+moving", output=tmp_path / "e", delay=DelayConfig(2, "guided"), **given)
    rows = [json.loads(line) for line in (tmp_path / "e/episodes.jsonl").read_text().splitlines()]
    assert all(row["motion"]["idle"] == 2 and row["motion"]["commit_error"] == 0 for row in rows)
    assert found.motion["commit_error"] == 0 and found.to_dict()["settings"]["delay"]["steps"] == 2
    again = evaluate(folder, "tabletop:reach+moving", output=tmp_path / "e", delay=DelayConfig(2, "guided"), **given)
    assert again.new_episodes == 0 and again.records == found.records
    with pytest.raises(BurnishError, match="other delay"):
        evaluate(folder, "tabletop:reach+moving", output=tmp_path / "e", delay=DelayConfig(1, "guided"), **given)


def test_the_command_lines_words():
    from burnish.core.config import CacheConfig

    assert DelayConfig.of("2", "naive") == DelayConfig(2, "naive") and CacheConfig.of("exact") == CacheConfig("exact")
    assert DelayConfig.of("p95:a.json", "tokens") == DelayConfig(0, "tokens", measured="p95:a.json")
    assert not DelayConfig.of("p95:a.json").plain and DelayConfig.of("") == DelayConfig.of("0") == DelayConfig()
    assert CacheConfig.of("") == CacheConfig()
    assert CacheConfig.of("runs/runtime.json") == CacheConfig("images", measured="runs/runtime.json")
