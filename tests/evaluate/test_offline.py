"""Offline evaluation: figures against closed forms and a loop, a policy that knows what was recorded, two compared."""

import json

import dataset_fakes as fakes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from burnish.cli.main import main
from burnish.core.config import DataConfig
from burnish.core.errors import BurnishError
from burnish.core.recipe import load_recipe
from burnish.core.types import Chunk, Draws
from burnish.data.inspect import gripper_dimensions
from burnish.data.mix import open_sources
from burnish.evaluate import offline_scores as scores
from burnish.evaluate.compare import compare
from burnish.evaluate.offline import evaluate_offline
from burnish.policies.base import Policy
from burnish.report.comparison import write_comparison
from burnish.report.page import write_report

SCALE = scores.Scale(np.array([1.0, 2.0, np.nan]), np.array([0.5, 1, 0]), np.array([0.0, 0, 0]), np.ones(3), (), 10)


def along(recorded, starts, length):
    """Chunks that repeat what was recorded, the last action beyond the end."""
    return np.stack([recorded[np.minimum(np.arange(s, s + length), len(recorded) - 1)] for s in starts])


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 9), every=st.integers(1, 5), frames=st.integers(1, 23), seed=st.integers(0, 99))
def test_figures_are_what_a_loop_finds(length, every, frames, seed):
    every, rng = min(every, length), np.random.default_rng(seed)
    recorded, starts = rng.normal(size=(frames, 3)), np.arange(0, frames, every)
    chunks = rng.normal(size=(len(starts), length, 3))
    found = scores.score(chunks, starts, recorded, SCALE)
    errors, pairs = [], []
    for c, start in enumerate(starts):
        for k in range(length):
            if start + k < frames:
                errors += [abs(chunks[c, k, d] - recorded[start + k, d]) / SCALE.unit[d] for d in (0, 1)]
                if c + 1 < len(starts) and k >= every:
                    pairs += [abs(chunks[c, k, d] - chunks[c + 1, k - every, d]) / SCALE.unit[d] for d in (0, 1)]
    assert found["figures"]["error"] == pytest.approx(np.mean(errors))
    assert found["figures"].get("consistency") == (pytest.approx(np.mean(pairs)) if pairs else None)
    seams = [abs(chunks[c + 1, 0, d] - chunks[c, every - 1, d]) / SCALE.unit[d]
             for c in range(len(starts) - 1) for d in (0, 1)]  # fmt: skip
    assert found["figures"].get("seam") == (pytest.approx(np.mean(seams)) if seams else None)
    assert (found["frames"], found["calls"]) == (frames, len(starts))


def test_a_perfect_policy_and_one_that_is_off_by_a_constant():
    recorded, starts = np.random.default_rng(0).normal(size=(20, 3)), np.arange(0, 20, 4)
    perfect = scores.score(along(recorded, starts, 8), starts, recorded, SCALE)["figures"]
    assert perfect["error"] == perfect["consistency"] == 0 and perfect["seam"] == perfect["seam_recorded"] > 0
    off = scores.score(along(recorded, starts, 8) + [0.5, -3.0, 7.0], starts, recorded, SCALE)
    assert off["figures"]["error"] == pytest.approx((0.5 + 3 / 2) / 2) and off["figures"]["consistency"] == 0
    np.testing.assert_allclose(off["by_dimension"], [0.5, 3, 7])
    np.testing.assert_allclose(off["by_horizon"], 1.0)
    assert scores.score(along(recorded, starts, 30), starts, recorded, SCALE)["by_horizon"][20:] == [None] * 10


def test_the_gripper_is_late_early_or_restless():
    scale = scores.Scale(np.ones(1), np.zeros(1), np.array([-1.0]), np.ones(1), (0,), 10)
    frames = np.arange(60)
    recorded = np.where((frames >= 20) & (frames < 40), 1.0, -1.0)[:, None]

    def of(values):
        found = scores.score(values[None, :, None], np.array([0]), recorded, scale)["figures"]
        return [found.get(f"gripper_{name}") for name in ("found", "extra", "late")]

    assert of(np.roll(recorded[:, 0], 3)) == [1, 0, pytest.approx(0.3)]
    assert of(np.roll(recorded[:, 0], -2)) == [1, 0, pytest.approx(-0.2)]
    assert of(np.roll(recorded[:, 0], 15)) == [0, 2, None]
    assert of(np.full(60, -1.0)) == [0, 0, None]
    restless = recorded[:, 0].copy()
    restless[50:52] = 1
    assert of(restless) == [1, 2, 0]
    assert scores.changes(np.array([-1, 0.1, -0.1, 1, 0.05, -1]), -1, 1) == [(3, 1), (5, -1)]
    assert gripper_dimensions(["x", "left_gripper", "jaw"], np.zeros((4, 3))) == [1, 2]
    assert gripper_dimensions(["0", "1"], np.array([[0, 0.3], [1, 0.4], [0, 0.9], [1, 0.2]])) == [0]


def test_an_interval_is_students_over_episodes():
    values = [0.2, 0.5, 0.3, 0.9]
    half = student.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    np.testing.assert_allclose(scores.over_episodes([*values, None]), [0.475, 0.475 - half, 0.475 + half])
    assert scores.over_episodes([0.5]) == [0.5, None, None] and scores.over_episodes([None]) is None


class Knowing(Policy):
    """Reads episode and frame off the state of `dataset_fakes`, and so knows the actions; `shift` is what it adds.

    It adds one more to the first dimension under a sentence that is not the episode's, `noise` times its draws, and
    `drift` more at every step of its chunk.
    """

    cameras, image_size, action_dim, state_dim = ("front",), 32, 3, 4
    name = "knowing"

    def __init__(self, shift=0.0, noise=0.0, steps=4, drift=0.0):
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift))
        self.chunk_size = self.n_action_steps = steps
        self.noise, self.drift, self.acted, self.stop_after = noise, drift * torch.arange(steps)[:, None], 0, 10**9

    def act(self, batch, draws=None, prefix=None):
        self.acted += 1
        if self.acted > self.stop_after:
            raise KeyboardInterrupt
        rows = []
        for (e, k), image, text in zip(
            batch["observation.state"][:, :2].int().tolist(), batch[fakes.FRONT], batch["task"], strict=True
        ):
            assert abs(255 * float(image.mean()) - fakes.level(e, k)) < 4
            steps = [fakes.action(e, k + step) for step in range(self.chunk_size)]
            rows.append(torch.tensor(steps) + self.shift + self.drift)
            rows[-1][:, 0] += float(text != fakes.TASKS[e % 2])
        return Chunk(torch.stack(rows) + self.noise * draws.noise)

    def draw(self, batch_size, generator):
        return Draws(torch.randn(batch_size, self.chunk_size, 3, generator=generator), torch.ones(batch_size))

    def loss(self, batch, draws=None): ...
    def save(self, folder, **_): ...


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fakes.write_v3(tmp_path_factory.mktemp("offline") / "data")


def measure(policy, root, output, held_out=(1, 2), **more):
    more = {"video": False, "progress": False, **more}
    return evaluate_offline(policy, DataConfig(root=str(root), held_out=list(held_out)), output=output, **more)


def test_the_recorded_actions_are_met_whatever_the_batch(root, tmp_path):
    found = measure(Knowing(), root, tmp_path / "a", every=2).to_dict()["offline"]
    actions = np.array([fakes.action(*at) for at in fakes.FRAMES])
    assert found["figures"]["error"][0] < 1e-6 and found["episodes"] == 2 and found["calls"] == 3 + 4
    assert found["figures"]["mean"][0] > 0.5 and found["figures"]["hold"][0] > 0.1
    change = found["figures"]["language_change"][0]
    assert change == pytest.approx(1 / actions[:, 0].std() / 3, rel=1e-5) and found["figures"]["language_noise"][0] == 0
    assert found["figures"]["language_rise"][0] == pytest.approx(change, rel=1e-4)
    noisy = [measure(Knowing(noise=0.5), root, tmp_path / f"b{size}", batch_size=size) for size in (1, 5)]
    lines = [[json.loads(r.to_line()) | {"latency_ms": 0} for r in one.records] for one in noisy]
    assert lines[0] == lines[1] and noisy[0].to_dict()["offline"]["figures"]["language_noise"][0] > 0


def test_a_stopped_evaluation_goes_on(root, tmp_path):
    whole = measure(Knowing(noise=0.1), root, tmp_path / "whole")
    measure(Knowing(noise=0.1), root, tmp_path / "cut", episodes=1)
    policy = Knowing(noise=0.1)
    policy.stop_after = 0
    with pytest.raises(KeyboardInterrupt):
        measure(policy, root, tmp_path / "cut")
    assert not (tmp_path / "cut/summary.json").exists()  # it has not ended
    assert len((tmp_path / "cut/episodes.jsonl").read_text().splitlines()) == 1
    again = measure(Knowing(noise=0.1), root, tmp_path / "cut")
    assert again.new_episodes == 1
    assert [r.figures for r in again.records] == [r.figures for r in whole.records]
    with pytest.raises(BurnishError, match="other weights"):
        measure(Knowing(shift=1.0), root, tmp_path / "cut")


def test_cameras_of_other_names_are_asked_for(root, tmp_path):
    class Elsewhere(Knowing):
        cameras = ("eye",)

    with pytest.raises(BurnishError, match="front for a policy that sees eye.*try: --cameras front$"):
        measure(Elsewhere(), root, tmp_path / "out")
    with pytest.raises(BurnishError, match="cameras front, front for a policy that sees front.*--cameras front$"):
        measure(Knowing(), root, tmp_path / "out", cameras=["front", "front"])


def test_two_are_compared_on_their_episodes(root, tmp_path, capsys):
    for name, policy in (("a", Knowing(shift=0.3)), ("b", Knowing(shift=0.1))):
        measure(policy, root, tmp_path / name, held_out=(0, 1, 2) if name == "a" else (1, 2))
    found = compare(tmp_path / "a", tmp_path / "b")
    unit = np.array([fakes.action(*at) for at in fakes.FRAMES]).std(0)
    assert found.differences["error"].mean == pytest.approx(-0.2 * np.mean(1 / unit), rel=1e-4)
    assert found.differences["a1"].mean == pytest.approx(-0.2, rel=1e-4)
    assert found.verdict == "better" and found.episodes == 2 and found.left_out == [0]
    assert compare(tmp_path / "b", tmp_path / "a", margin=5.0).verdict == "equivalent"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "better"
    measure(Knowing(), root, tmp_path / "c", every=1)
    (tmp_path / "d.jsonl").write_text('{"task": "t", "seed": 0, "success": true}\n')
    for other, why in ((tmp_path / "c", "1 and not 2.*--every 2"), (tmp_path / "d.jsonl", "both of one kind"),
                       (tmp_path / "no", "no is not there")):  # fmt: skip
        with pytest.raises(BurnishError, match=why):
            compare(tmp_path / "a", other)
    with pytest.raises(BurnishError, match="--sequential"):
        compare(tmp_path / "a", tmp_path / "b", sequential=True)


def test_of_chunks_of_two_lengths_the_steps_that_both_have_are_compared(root, tmp_path):
    """Over whole chunks the one that looks less far ahead would win, though it is worse at every step."""
    long = measure(Knowing(steps=4, drift=0.1), root, tmp_path / "long/eval/offline")
    short = measure(Knowing(steps=2, drift=0.12), root, tmp_path / "short/eval/offline")
    errors = [one.to_dict()["offline"]["figures"]["error"][0] for one in (long, short)]
    assert errors[0] > 2 * errors[1] and long.settings["every"] == short.settings["every"] == 2  # of 10 fps
    found = compare(long.output, short.output)
    unit = np.array([fakes.action(*at) for at in fakes.FRAMES]).std(0)
    assert found.differences["error"].mean == pytest.approx(0.01 * np.mean(1 / unit), rel=1e-4)
    assert found.verdict == "worse" and "the first 2," in str(found) and found.to_dict()["steps"] == [2, 4]
    assert "error" in found.differences and not {"consistency", "language_change", "a1"} & found.differences.keys()
    page = write_comparison(tmp_path / "long", tmp_path / "short", tmp_path / "both.html").read_text()
    assert "chunks of 2 and 4 steps" in page


def test_the_page_shows_them_and_refuses_what_is_malformed(root, tmp_path):
    measure(Knowing(shift=0.3), root, tmp_path / "run/eval/offline", video=True)
    measure(Knowing(shift=0.9), root, tmp_path / "run/eval/offline_base")
    text = write_report(tmp_path / "run").read_text()
    assert "Held-out episodes" in text and "Base, held-out episodes" in text and text.count("data:image/png") == 2
    file = tmp_path / "run/eval/offline/summary.json"
    whole = json.loads(file.read_text())
    for change in ({"figures": [1]}, {"figures": {}}, {"figures": {"error": "x"}}, {"by_horizon": {}},
                   {"by_dimension": {"a0": [1]}}, {"episodes": None}):  # fmt: skip
        file.write_text(json.dumps(whole | {"offline": whole["offline"] | change}))
        with pytest.raises(BurnishError, match=r"summary\.json"):
            write_report(tmp_path / "run")
    with pytest.raises(BurnishError, match="no episode of an offline evaluation"):
        scores.parse_offline({"task": "t"}, "here")


def test_held_out_episodes_are_not_trained_on(root):
    def episodes(*more):
        recipe = load_recipe(None, [f"--data.root={root}", *more])
        return open_sources(recipe)[0].episodes

    assert episodes() == [] and episodes("--data.held_out=[1]") == [0, 2]
    assert episodes("--data.held_out=[1]", "--data.episodes=[2]") == [2]
    for held_out, chosen in (([0, 1, 2], []), ([7], []), ([1], [1, 2])):
        with pytest.raises(BurnishError, match="held_out"):
            episodes(f"--data.held_out={held_out}", f"--data.episodes={chosen}")
    with pytest.raises(BurnishError, match="again"):
        load_recipe(None, [f"--data.root={root}", "--data.episodes=[0]", "--data.held_out=[1]",
                           f"--data.mix=[{{root: {root}, episodes: [1, 2]}}]"])  # fmt: skip


def test_what_does_not_go_together_is_refused(root, tmp_path, capsys):
    with pytest.raises(BurnishError, match="held_out names episode 9"):
        measure(Knowing(), root, tmp_path / "x", held_out=(9,))
    with pytest.raises(BurnishError, match="every is 5"):
        measure(Knowing(), root, tmp_path / "x", every=5)
    for words, why in ((["small"], "neither of"), (["small", "tabletop:lift", "--data", str(root)], "both"),
                       (["small", "--data", str(root), "--workers", "2"], "--workers"),
                       (["small", "tabletop:lift", "--every", "2"], "--every")):  # fmt: skip
        assert main(["eval", *words, "--output", str(tmp_path / "x")]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
