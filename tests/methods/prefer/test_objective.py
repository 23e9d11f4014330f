"""The objective in real runs of a fake policy: learning, caching, resuming, two ranks, and what it refuses."""

import json
import shutil

import fake
import numpy as np
import pytest
import torch
from ranks import train_and_keep, two_ranks
from safetensors.torch import load_file

from burnish import train
from burnish.core.errors import BurnishError
from burnish.data.pairs import Pair, PairData, write_index
from burnish.methods.prefer.draws import ScoreConfig
from burnish.methods.prefer.scoring import pair_draws, policy_seeds, reference_scores
from burnish.train import checkpoint
from workshop.tiny import make_tiny

FLOW = ScoreConfig(draws=2, times="policy", weight="uniform", stratified=False)


@pytest.fixture
def pairs(dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "pairs")
    places = [Pair((0, i), (2, i)) for i in range(5)] + [Pair((2, 8 - i), (0, 7 - i)) for i in range(3)]
    write_index(root, places, {"source": "test"}, 1e9)
    return root


@pytest.fixture(autouse=True)
def fake_policy(monkeypatch):
    fake.register(monkeypatch.setattr)


def recipe(dataset, output, pairs, *more, **options):
    entry = {"name": "prefer", "pairs": str(pairs), "batch_size": 6, "pool": 2, "score": {"draws": 2}} | options
    return fake.recipe(dataset, output, f"--objectives={json.dumps([entry])}", "--train.imitation_weight=0", *more)


def rows(output):
    return fake.figures(output / "metrics.jsonl")


def test_training_widens_the_margin_and_starts_at_ln_2(dataset, pairs, tmp_path):
    result = train(recipe(dataset, tmp_path / "run", pairs, "--train.steps=60", "--train.log_every=1"), progress=False)
    found = rows(result.output)
    assert found[0]["loss_prefer"] == pytest.approx(np.log(2), abs=1e-6)
    assert found[0]["prefer_margin"] == 0 and found[0]["loss_policy"] == 0
    assert found[-1]["prefer_margin"] > 0.1 and found[-1]["prefer_accuracy"] > 0.9


def test_independent_draws_do_not_start_at_ln_2(dataset, pairs, tmp_path):
    run = recipe(dataset, tmp_path / "run", pairs, "--train.steps=1", preset="released_code")
    assert abs(rows(train(run, progress=False).output)[0]["prefer_margin"]) > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"loss": "clone"}, {"loss": "ipo", "beta": 1.0}, {"reference": "none"}, {"preset": "diffusion_dpo"},
     {"sft_weight": 1.0, "proximal_weight": 0.1, "label_smoothing": 0.1}],
    ids=lambda o: next(iter(o.values())),
)  # fmt: skip
def test_every_kind_of_loss_trains(dataset, pairs, tmp_path, options):
    before = fake.FakePolicy().head.weight
    result = train(recipe(dataset, tmp_path / "run", pairs, **options), progress=False)
    last = rows(result.output)[-1]
    assert np.isfinite(last["loss"]) and ("prefer_margin" in last) == (options.get("loss") != "clone")
    assert not torch.equal(load_file(result.policy / "model.safetensors")["head.weight"], before)


def test_cloning_leaves_the_held_out_pairs_alone_and_is_measured_on_them(dataset, pairs, tmp_path, monkeypatch):
    for name in ("pairs.jsonl", "burnish_pairs.json"):
        (pairs / name).unlink()
    proposal = ((0.0, 0.0, 0.0),)
    write_index(pairs, [Pair((i, 1), (i, 1), proposal) for i in (0, 2)], {"source": "test"}, 1e9)
    result = train(recipe(dataset, tmp_path / "run", pairs, loss="clone", held_out=0.5), progress=False)
    assert np.isfinite(rows(result.output)[-1]["prefer_held_out_margin"])
    seen, honest = [], PairData.demonstrations

    def noted(self, frames):
        seen.extend(frames)
        return honest(self, frames)

    monkeypatch.setattr(PairData, "demonstrations", noted)
    train(recipe(dataset, tmp_path / "again", pairs, loss="clone", held_out=0.5), progress=False)
    assert {*PairData(pairs, ("front",), 4, progress=False).robot.episode_index[seen].tolist()} in ({0}, {2})


def test_cached_scores_are_those_of_the_start_and_are_used_again(dataset, pairs, tmp_path):
    train(recipe(dataset, tmp_path / "one", pairs, "--train.steps=1"), progress=False)
    (file,) = (pairs / ".scores").glob("*.safetensors")
    stored = load_file(file)["scores"]
    data = PairData(pairs, ("front",), 4, progress=False)
    policy = fake.FakePolicy()
    policy.eval()
    torch.testing.assert_close(stored, reference_scores(policy, data, FLOW, 2, 0, progress=False))
    batch, candidates = data.batch([3])
    drawn = pair_draws(policy, FLOW, policy_seeds(0, [3], [1]))
    torch.testing.assert_close(policy.scores(batch, candidates, drawn.draws)[0], stored[3, 1])
    changed = file.stat().st_mtime_ns
    train(recipe(dataset, tmp_path / "two", pairs, "--train.steps=1"), progress=False)
    assert [p.stat().st_mtime_ns for p in (pairs / ".scores").iterdir()] == [changed]


def test_a_stale_or_damaged_cache_is_refused(dataset, pairs, tmp_path):
    cache = tmp_path / "scores.safetensors"
    train(recipe(dataset, tmp_path / "one", pairs, "--train.steps=1", reference_cache=str(cache)), progress=False)
    places = [Pair((0, i), (2, i)) for i in range(4)]
    write_index(pairs, places, {"source": "test"}, 1e9)
    with pytest.raises(BurnishError, match=r"stale: made for other data .*; expected the same; try: rm"):
        train(recipe(dataset, tmp_path / "two", pairs, reference_cache=str(cache)), progress=False)
    cache.write_bytes(b"damaged")
    with pytest.raises(BurnishError, match="cannot be read"):
        train(recipe(dataset, tmp_path / "three", pairs, reference_cache=str(cache)), progress=False)


def test_scores_that_are_not_finite_stop_the_run_before_it_starts(dataset, pairs, tmp_path):
    policy = fake.FakePolicy()
    with torch.no_grad():
        policy.head.bias.fill_(float("inf"))
    policy.save(tmp_path / "broken")
    with pytest.raises(BurnishError, match="64 of 64 scores of the reference on the pairs of .* are not finite"):
        train(recipe(dataset, tmp_path / "run", pairs, f"--policy.path={tmp_path / 'broken'}"), progress=False)
    assert not list((pairs / ".scores").glob("*")) if (pairs / ".scores").exists() else True


def test_pairs_in_other_units_stop_the_run(dataset, pairs, tmp_path):
    other = fake.make_dataset(tmp_path / "other")
    stats = json.loads((other / "meta/stats.json").read_text())
    stats["action"]["std"] = [s * 1e4 for s in stats["action"]["std"]]
    (other / "meta/stats.json").write_text(json.dumps(stats))
    with pytest.raises(BurnishError, match="do not fit the policy's statistics"):
        train(recipe(other, tmp_path / "run", pairs), progress=False)


def test_what_is_held_out_is_also_measured_where_the_time_is_over(dataset, pairs, tmp_path):
    write_index(pairs, [Pair((i, 1), (i, 1), ((0.0,) * 3,)) for i in (0, 2)], {"source": "test"}, 1e9)
    result = train(recipe(dataset, tmp_path / "run", pairs, "--train.max_minutes=0.000001", held_out=0.5),
                   progress=False)  # fmt: skip
    assert result.steps == 1 and rows(result.output)[-1]["prefer_held_out_margin"] != 0


def test_a_resumed_run_logs_what_an_unbroken_one_does(dataset, pairs, tmp_path, monkeypatch):
    """Also the steps since the last row, and what was held out at last."""
    write_index(pairs, [Pair((i, 1), (i, 1), ((0.0,) * 3,)) for i in (0, 2)], {"source": "test"}, 1e9)

    def trained(name):
        return rows(train(recipe(dataset, tmp_path / name, pairs, held_out=0.5), progress=False).output)

    whole, save = trained("whole"), checkpoint.save

    def killed(run, *rest):
        save(run, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "save", killed)
        trained("cut")
    assert trained("cut") == whole


@pytest.mark.parametrize("kind", ["diffusion", "vqbet"])
def test_cloning_gives_a_policy_the_moments_that_it_sees(dataset, pairs, tmp_path, monkeypatch, kind):
    monkeypatch.undo()  # a policy of LeRobot
    shutil.rmtree(pairs / ".frames", ignore_errors=True)
    make_tiny(kind, tmp_path / "policy", cameras=("front",), state_dim=4, action_dim=3)
    more = [f"--policy.path={tmp_path / 'policy'}", "--train.steps=1", "--data.image_size=16", "--data.cache_gb=0"]
    done = train(recipe(dataset, tmp_path / "run", pairs, *more, loss="clone", batch_size=2), progress=False)
    assert np.isfinite(done.final["loss"]) and not (pairs / ".frames").exists()


def rank_main(rank, dataset, pairs, output):
    fake.register()
    _, weights = train_and_keep(recipe(dataset, output, pairs))
    with open(f"{output}.{rank}.json", "w") as file:
        json.dump(weights, file)


def test_two_ranks_end_with_equal_weights(dataset, pairs, tmp_path):
    two_ranks(rank_main, dataset, pairs, tmp_path / "run")
    one, two = (json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in range(2))
    start = {n: p.detach().flatten().tolist() for n, p in fake.FakePolicy().named_parameters()}
    assert one == two and one["head.weight"] != start["head.weight"]
