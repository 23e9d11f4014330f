"""Several data sets in one training: order, shares, features, statistics, and what is refused."""

import json
import shutil
from multiprocessing.reduction import ForkingPickler

import dataset_fakes as fakes
import fake
import numpy as np
import pytest
import torch
import yaml
from fake import CAMERA, make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.core.recipe import load_recipe
from burnish.core.types import Window
from burnish.data.loader import BatchSampler, RobotData
from burnish.data.mix import BLOCK, as_first, open_sources, quotas, stored_statistics, together, use_statistics
from burnish.data.mixed import MixSampler, training_data
from burnish.data.streamed import JoinedFrames, fitted
from burnish.train import loop

WRIST = "observation.images.wrist"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Another data set of the robot of the fixture `dataset`: other numbers, longer episodes."""
    return make_dataset(tmp_path_factory.mktemp("old") / "old", episodes=2, frames=14, seed=7)


def mixed(root, *entries, statistics="joint", policy=None, rank=0, world=1, more=()):
    """The batches of a recipe with `data.mix`."""
    text = yaml.safe_dump(list(entries), default_flow_style=True, width=9999)
    recipe = load_recipe(None, [
        f"--data.root={root}", f"--data.mix={text}", f"--data.statistics={statistics}",
        "--train.batch_size=6", "--data.augment=false", *more,
    ])  # fmt: skip
    sources = open_sources(recipe)
    for source in sources:
        source.require([CAMERA])
    use_statistics(sources, statistics)
    return training_data(recipe, sources, policy or fake.FakePolicy(), False, rank, world)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 50), min_size=1, max_size=4), batch=st.integers(1, 7), k=st.integers(0, 30_000),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
)  # fmt: skip
def test_one_order_for_any_number_of_ranks_from_any_step(counts, batch, k, weights):
    def ranks(world):
        return [MixSampler(counts, weights[: len(counts)], batch * 4 // world, 3, rank, world) for rank in range(world)]

    whole = ranks(1)[0].indices(k)
    for world in (2, 4):
        assert np.concatenate([sampler.indices(k) for sampler in ranks(world)]).tolist() == whole.tolist()
    assert whole.min() >= 0 and whole.max() < sum(counts)


def test_every_data_set_has_its_share_and_its_own_epochs():
    counts, weights = [300, 40, 7], [1.0, 0.25, 0.05]
    sampler = MixSampler(counts, weights, 10, 5)
    drawn = sampler.at(np.arange(2 * BLOCK))
    which = np.searchsorted(np.cumsum(counts), drawn, side="right")
    shares = np.array(weights) / sum(weights)
    for block in (which[:BLOCK], which[BLOCK:]):
        assert np.abs(np.bincount(block) - shares * BLOCK).max() < 1
    for window in (32, 1000):  # evenly spread: never more than two off, wherever one looks
        seen = np.stack([np.convolve(which == d, np.ones(window), "valid") for d in range(3)], 1)
        assert np.abs(seen - shares * window).max() <= 3
    for d, (count, first) in enumerate(zip(counts, [0, 300, 340], strict=True)):
        mine = drawn[which == d] - first
        for epoch in mine[: len(mine) // count * count].reshape(-1, count)[:50]:
            assert sorted(epoch) == list(range(count))
    alone = BatchSampler(300, 10, (5, "robot"))
    assert drawn[which == 0][:500].tolist() == np.concatenate([alone.indices(k) for k in range(50)]).tolist()


def test_quotas():
    assert quotas([1, 1, 1]).sum() == BLOCK and np.ptp(quotas([1, 1, 1])) == 1
    with pytest.raises(BurnishError, match="at least one sample in 65,536"):
        quotas([1, 1e-6])


def test_every_sample_is_that_of_its_own_data_set(dataset, old):
    both = mixed(dataset, {"root": str(old), "weight": 2.0})
    parts = [RobotData(root, ["front"], 4, 6, 0, progress=False) for root in (dataset, old)]
    seen = set()
    for k in range(20):
        batch = both.raw(k)
        for b, which in enumerate(batch["dataset_index"].tolist()):
            row = int(batch["index"][b]) - [0, len(parts[0].actions)][which]
            own = parts[which].observations(np.array([row]))
            assert torch.equal(batch[CAMERA][b], own[CAMERA][0]) and batch["task"][b] == own["task"][0]
            assert torch.equal(batch["observation.state"][b], own["observation.state"][0])
            chunk, pad = parts[which].chunks(np.array([row]))
            assert (batch["action"][b].numpy() == chunk[0]).all() and (
                batch["action_is_pad"][b].numpy() == pad[0]
            ).all()
            assert batch["episode_index"][b] == parts[which].episode_index[row]
            seen.add((which, row))
    assert {which for which, _ in seen} == {0, 1} and both.hash not in {part.hash for part in parts}
    only = mixed(dataset, {"root": str(old), "episodes": [1]})
    own = np.concatenate([only.raw(k)["episode_index"][only.raw(k)["dataset_index"] == 1] for k in range(5)])
    assert set(own.tolist()) == {1}


def test_joint_statistics_are_those_of_all_that_is_drawn(dataset, old):
    parts = [RobotData(root, ["front"], 4, 6, 0, progress=False) for root in (dataset, old)]
    rows = [part.actions for part in parts]  # weights by frames: the mixture is then the two behind one another
    both = mixed(dataset, {"root": str(old), "weight": len(rows[1]) / len(rows[0])})
    found, joined = both.meta.stats["action"], np.concatenate(rows).astype(np.float64)
    for figure in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(found[figure], getattr(np, figure)(joined, 0), rtol=2e-4, atol=1e-4)
    for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        beside = [np.quantile(joined, min(1, max(0, q + d)), axis=0, method="inverted_cdf") for d in (-0.01, 0.01)]
        assert (beside[0] <= found[name]).all() and (found[name] <= beside[1]).all()
    first = mixed(dataset, {"root": str(old)}, statistics="first").meta.stats["action"]
    np.testing.assert_allclose(first["mean"], parts[0].meta.stats["action"]["mean"])


@pytest.mark.parametrize(("mode", "low", "high"), [("MEAN_STD", "mean", "std"), ("MIN_MAX", "min", "max")])
def test_own_statistics_normalise_each_data_set_by_itself(dataset, old, mode, low, high):
    policy = fake.FakePolicy()
    policy.normalization = lambda kind: mode
    both = mixed(dataset, {"root": str(old)}, statistics="own", policy=policy)
    parts = [RobotData(root, ["front"], 4, 6, 0, progress=False) for root in (dataset, old)]
    own, first = (part.meta.stats["action"] for part in reversed(parts))

    def normalised(values, stats):
        scale = stats[high] if mode == "MEAN_STD" else stats[high] - stats[low]
        return (values - stats[low]) / scale

    mapped = both.actions[len(parts[0].actions) :]
    np.testing.assert_allclose(normalised(mapped, first), normalised(parts[1].actions, own), rtol=1e-4, atol=1e-4)
    assert as_first(mapped, own, first, "IDENTITY") is mapped


def test_what_was_trained_on_stands_beside_the_policy(dataset, old, tmp_path, monkeypatch):
    fake.register(monkeypatch.setattr)
    options = [f"--data.mix={json.dumps([{'root': str(old), 'weight': 0.5}])}", "--train.steps=2"]
    loop.train(fake.recipe(dataset, tmp_path / "run", *options), progress=False)
    told = json.loads((tmp_path / "run/policy/data_sets.json").read_text())
    assert [round(one["share"], 3) for one in told["data_sets"]] == [0.667, 0.333]
    stats = stored_statistics(tmp_path / "run/policy", "old")["action"]
    own = RobotData(old, ["front"], 4, 6, 0, progress=False).actions
    np.testing.assert_allclose(stats["mean"], own.mean(0), rtol=1e-3, atol=1e-3)
    with pytest.raises(BurnishError, match="knows no data set 'new'; expected one of"):
        stored_statistics(tmp_path / "run/policy", "new")


def test_resumed_equals_uninterrupted_and_other_data_is_refused(dataset, old, tmp_path, monkeypatch):
    fake.register(monkeypatch.setattr)
    mine = shutil.copytree(old, tmp_path / "old", ignore=shutil.ignore_patterns(".frames"))
    more = [f"--data.mix={json.dumps([{'root': str(mine), 'weight': 0.7}])}", "--train.grad_accumulation=2"]
    loop.train(fake.recipe(dataset, tmp_path / "whole", *more), progress=False)
    step = loop.train_step

    def dying(run, *args, **options):
        edits = step(run, *args, **options)
        if run.step == 7:
            raise InterruptedError
        return edits

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(loop, "train_step", dying)
        loop.train(fake.recipe(dataset, tmp_path / "cut", *more), progress=False)
    loop.train(fake.recipe(dataset, tmp_path / "cut", *more), progress=False)
    fake.assert_same_weights(tmp_path / "whole/policy", tmp_path / "cut/policy")
    assert fake.figures(tmp_path / "whole/metrics.jsonl") == fake.figures(tmp_path / "cut/metrics.jsonl")
    with open(mine / "meta/info.json", "a") as file:
        file.write(" ")
    with pytest.raises(BurnishError, match="was trained on other data"):
        loop.train(fake.recipe(dataset, tmp_path / "cut", *more), progress=False)


@pytest.mark.parametrize(("weight", "words"), [(0, "above 0"), (-1, "above 0"), (float("nan"), "weight is nan"),
                                                ("much", "weight is 'much'"), (1e9, "at most 1e")])  # fmt: skip
def test_impossible_weights(dataset, old, weight, words):
    with pytest.raises(BurnishError, match=words):
        mixed(dataset, {"root": str(old), "weight": weight})


def test_what_does_not_go_together_is_refused_with_a_remedy(dataset, old, tmp_path):
    for entry, words in [
        ({}, "has no root"), ({"root": str(dataset)}, "names .* again"), ({"root": str(old), "wait": 1}, "'wait'"),
        ({"root": str(tmp_path / "none")}, "no data set at"),
        ({"root": str(old), "episodes": [9]}, "in data.mix names"),
        ({"root": str(old), "episodes": ["x"]}, "whole numbers"),
        ({"root": str(old), "columns": {"action": None}}, "null for cameras alone"),
    ]:  # fmt: skip
        with pytest.raises(BurnishError, match=words):
            mixed(dataset, entry)
    with pytest.raises(BurnishError, match="names .*old again"):
        mixed(dataset, {"root": str(old)}, {"root": str(old / ".." / "old")})
    apart = ({"root": str(old), "episodes": [0]}, {"root": str(old), "episodes": [1], "weight": 3.0})
    assert len(mixed(dataset, *apart).sources) == 3

    def edited(name, change):
        root = shutil.copytree(old, tmp_path / name, ignore=shutil.ignore_patterns(".frames"))
        fakes.edit_json(root / "meta/info.json", change)
        return {"root": str(root)}

    def names(*wanted):
        return lambda info: info["features"]["action"].update(names=list(wanted))

    slow = edited("slow", lambda info: info.update(fps=5))
    with pytest.raises(BurnishError, match="5 frames a second; expected 10 as in"):
        mixed(dataset, slow)
    other = edited("other", names("x", "a1", "a2"))
    with pytest.raises(BurnishError, match=r"calls a dimension of 'action' x; expected a0, a1, a2.*columns: {act"):
        mixed(dataset, other)
    assert mixed(dataset, {**other, "columns": {"action": "action"}}).actions.shape[1] == 3  # the map says they agree
    wide = make_dataset(tmp_path / "wide", episodes=1, frames=4, action_dim=4)
    with pytest.raises(BurnishError, match="'action' of 4 dimensions; expected 3"):
        mixed(dataset, {"root": str(wide)})
    turned = mixed(dataset, edited("turned", names("a2", "a0", "a1")))
    plain = RobotData(old, ["front"], 4, 6, 0, progress=False).actions
    np.testing.assert_array_equal(turned.actions[-len(plain) :], plain[:, [1, 2, 0]])
    assert [p.kind for p in together([RobotData(r, [], 4, 6, 0, progress=False).meta for r in (dataset, wide)])] == [
        "error"
    ]


def test_absent_cameras_are_black_and_masked(dataset, old, tmp_path, monkeypatch):
    fake.register(monkeypatch.setattr)
    two = make_dataset(tmp_path / "two", episodes=2, frames=6, cameras=("front", "wrist"))
    recipe = fake.recipe(two, tmp_path / "run", f"--data.mix={json.dumps([{'root': str(old)}])}")
    with pytest.raises(BurnishError, match=rf"no camera '{WRIST}' \(it has {CAMERA}\).*--data.mix=.*wrist: null"):
        loop.train(recipe, progress=False)
    policy = fake.FakePolicy()
    policy.cameras = ("front", "wrist")
    data = mixed(two, {"root": str(old), "columns": {WRIST: None}}, policy=policy)
    batch = data.raw(0)
    lacks = batch["dataset_index"] == 1
    assert lacks.any() and not lacks.all()
    assert torch.equal(batch[f"{WRIST}_padding_mask"], ~lacks)
    assert not batch[WRIST][lacks].any() and batch[WRIST][~lacks].flatten(1).any(1).all()


def test_smolvla_ignores_what_a_masked_camera_shows(tiny_smolvla):
    from burnish.policies import load_policy

    policy = load_policy(tiny_smolvla).eval()
    draws, numbers = policy.draw(2, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    batch = {f"observation.images.{c}": torch.rand(2, 3, 32, 32, generator=numbers) for c in ("top", "wrist")}
    batch |= {"observation.state": torch.randn(2, 7, generator=numbers), "task": ["lift the cube"] * 2,
              "action": torch.randn(2, 8, 7, generator=numbers)}  # fmt: skip
    masked = {**batch, f"{WRIST}_padding_mask": torch.tensor([True, False])}
    black = {**masked, WRIST: batch[WRIST] * torch.tensor([1.0, 0.0])[:, None, None, None]}
    with torch.no_grad():
        plain, hidden, dark = (policy.loss(one, draws).per_sample for one in (batch, masked, black))
    assert torch.equal(hidden, dark) and hidden[0] == plain[0] and hidden[1] != plain[1]


def test_frames_of_another_form_are_fitted_and_travel_without_their_pictures(dataset, tmp_path):
    wide = make_dataset(tmp_path / "wide", episodes=1, frames=5, size=(16, 32))
    arrays = [RobotData(root, [], 4, 6, 0, progress=False).frames.arrays[CAMERA] for root in (dataset, wide)]
    joined = JoinedFrames([arrays[0], arrays[1], 3], (32, 32))
    assert joined.shape == (len(arrays[0]) + 5 + 3, 32, 32, 3)
    first = len(arrays[0])
    assert (joined[first - 1] == arrays[0][-1]).all() and not joined[-1].any()
    assert (joined[first][8:24] == arrays[1][0]).all() and not joined[first][:8].any() and not joined[first][24:].any()
    packed = ForkingPickler.dumps(joined)
    assert len(packed) < 5000
    chosen = np.array([[0, first], [first + 2, first + 6]])
    assert (ForkingPickler.loads(packed)[chosen] == joined[chosen]).all() and joined[chosen].shape == (2, 2, 32, 32, 3)
    grey = np.full((1, 10, 20, 3), 77, np.uint8)
    assert set(fitted(grey, (30, 20)).ravel().tolist()) == {0, 77}


def test_history_and_chunks_that_begin_in_the_past(dataset):
    data = RobotData(dataset, ["front"], 5, 6, 0, progress=False, window=Window((-1, 0), -1, 3))
    for k in range(4):
        raw = data.raw(k)
        assert raw[CAMERA].shape == (6, 2, 32, 32, 3) and raw["observation.state"].shape == (6, 2, 4)
        for b, row in enumerate(raw["index"].tolist()):
            start, end = data.meta.rows.span(int(raw["episode_index"][b]))
            wanted = [max(start, row - 1), row]
            assert torch.equal(raw[CAMERA][b], torch.from_numpy(data.frames.arrays[CAMERA][wanted]))
            assert torch.equal(raw["observation.state"][b], torch.from_numpy(data.states[wanted]))
            steps = np.arange(row - 1, row + 4)
            np.testing.assert_array_equal(raw["action"][b], data.actions[np.clip(steps, start, end - 1)])
            assert raw["action_is_pad"][b].tolist() == [not start <= step < end for step in steps]
    assert len(data.indices) == len(data.actions) - 3 * 3 and (data.ends - np.arange(30) > 3)[data.indices].all()
    batch = data.finish(data.raw(0), 0)
    assert batch[CAMERA].shape == (6, 2, 3, 32, 32) and batch["shift.front"].shape == (6, 2)
    still = [b for b, row in enumerate(batch["index"].tolist()) if row == data.starts[row]]
    rows = torch.from_numpy(data.frames.arrays[CAMERA][[0, 0]])[None].expand(3, -1, -1, -1, -1)
    from burnish.data.augment import augment

    same = augment(rows.clone(), torch.Generator().manual_seed(0))[0]
    assert torch.equal(same[:, 0], same[:, 1]) and not torch.equal(same[0], same[1])  # one draw for each sample
    assert all(torch.equal(batch[CAMERA][b, 0], batch[CAMERA][b, 1]) for b in still)


@pytest.mark.parametrize(
    ("cameras", "size", "action_dim"), [(("a", "b", "c", "d"), (24, 40), 32), (("only",), (40, 16), 1)]
)
def test_any_number_of_cameras_of_any_form_and_of_actions(nano_vlm, tmp_path, cameras, size, action_dim):
    root = make_dataset(tmp_path / "set", 2, 4, size, cameras=cameras, action_dim=action_dim)
    small = make_dataset(tmp_path / "small", 1, 4, 16, cameras=cameras[:1], action_dim=action_dim)
    lacking = {f"observation.images.{camera}": None for camera in cameras[1:]}
    mix = [{"root": str(small), "columns": lacking}]
    recipe = load_recipe(None, [
        f"--data.root={root}", f"--policy.overrides.vlm_model_name={nano_vlm}", f"--output={tmp_path / 'run'}",
        "--train.steps=2",
        "--train.batch_size=3", "--train.self_check=false", f"--data.mix={json.dumps(mix)}", "--data.cache_gb=0",
    ])  # fmt: skip
    done = loop.train(recipe, progress=False)
    assert np.isfinite(done.final["loss"]) and not (root / ".frames").exists()
