"""Distance to the training set: what it is of, what it predicts, and where it is written."""

import json
from dataclasses import replace

import numpy as np
import pytest
from dataset_fakes import write_v3
from evaluation_fakes import make_env, make_policy, register
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from burnish.core.errors import BurnishError
from burnish.data.frames import open_frames
from burnish.data.search import Index, build
from burnish.data.vectors import encode_dataset, make_encoder
from burnish.data.watchdog import Watchdog
from burnish.evaluate.records import Record, parse_row
from burnish.evaluate.results import read_results
from burnish.evaluate.rollout import evaluate
from burnish.evaluate.watchdog import Watched, auc, failure_auc, figures, watched
from burnish.experiments.recompute import differing, renew
from burnish.methods.retrieve.ask import make_index, watch
from workshop.watchdog import text

register()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(0, 99), st.booleans())
def test_auc_is_the_share_of_pairs_in_order_with_half_of_the_ties(n, seed, ties):
    rng = np.random.default_rng(seed)
    scores, failed = rng.normal(size=n).round(0 if ties else 9), rng.random(n) < 0.5
    failed[:2] = True, False
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[failed] for b in scores[~failed]]
    assert auc(scores, failed)[0] == pytest.approx(np.mean(pairs))
    assert auc(-scores, failed)[0] == pytest.approx(1 - np.mean(pairs)) and auc(0 * scores, failed)[0] == 0.5
    often = rng.integers(0, 3, (1, n))
    again = auc(*(np.repeat(one, often[0]) for one in (scores, failed)))[0]  # each episode so often
    assert auc(scores, failed, often)[0] == pytest.approx(again)


def delong(scores, failed):
    """The standard error of an AUC by DeLong's placements (1988)."""
    kernel = np.array([[float(a > b) + 0.5 * (a == b) for b in scores[~failed]] for a in scores[failed]])
    bad, good = kernel.shape
    return np.sqrt(kernel.mean(1).var(ddof=1) / bad + kernel.mean(0).var(ddof=1) / good)


def test_the_interval_is_that_of_delong_and_grows_where_policies_share_their_trials():
    rng = np.random.default_rng(1)
    failed = rng.random(300) < 0.4
    scores = rng.normal(size=300) + failed
    one = Watched(range(300), failed, scores)
    value, low, high = failure_auc([one])
    width = 2 * norm.isf(0.025) * delong(scores, failed)
    assert value == pytest.approx(auc(scores, failed)[0]) and high - low == pytest.approx(width, rel=0.15)
    again = failure_auc([one, Watched(one.trials, failed, 3 * scores + 7)])  # two policies that do the same
    assert again == pytest.approx((value, low, high))
    other = failure_auc([one, Watched(range(300, 600), failed, scores)])  # on trials of their own
    assert other[2] - other[1] == pytest.approx((high - low) / np.sqrt(2), rel=0.1)
    assert failure_auc([Watched(range(3), np.zeros(3, bool), np.ones(3))]) is None


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A data set whose pictures are grey, and its index of pixels."""
    root = write_v3(tmp_path_factory.mktemp("watchdog") / "data", pictures=True)
    camera = encode_dataset(root, make_encoder("pixels"), progress=False).about["cameras"][0]
    make_index(root, "pixels", root.parent / "index", progress=False)
    return root, root.parent / "index", camera


def test_what_was_trained_on_is_near_and_each_view_counts(pictured):
    root, folder, camera = pictured
    index, encoder = Index.open(folder), make_encoder("pixels")
    pictures = np.array(open_frames(root, [f"observation.images.{camera}"]).arrays[f"observation.images.{camera}"][:3])
    dog = Watchdog(index, encoder, [camera])
    assert dog({camera: pictures}).max() < 1e-4 and dog.asked == 3 and dog.seconds > 0
    strange = np.random.default_rng(0).integers(0, 256, (1, 200, 120, 3), np.uint8)  # larger than the encoder looks at
    strange[:, :100] = 0
    assert dog({camera: strange})[0] > 0.1
    small = encoder(_shrunk(strange))[0]
    cosine = max(float(small @ key) for key in index.vectors.values[:, 0]) / np.linalg.norm(small)
    assert dog({camera: strange})[0] == pytest.approx(1 - cosine, abs=1e-3)
    with pytest.raises(BurnishError, match="sees elsewhere"):
        Watchdog(index, encoder, [camera, "elsewhere"])


def _shrunk(pictures):
    import torch

    first = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    found = torch.nn.functional.interpolate(first, (64, 38), mode="bilinear")
    return found.round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def test_an_index_of_another_network_is_refused_and_the_policys_own_is_not(pictured, tiny_smolvla, tmp_path):
    from burnish.policies.load import policy_and_hash

    root, _, camera = pictured
    policy, weights = policy_and_hash(tiny_smolvla)
    encoder = make_encoder(f"tower:{tiny_smolvla}")
    features = encode_dataset(root, encoder, progress=False)
    features.about["cameras"] = [policy.cameras[0]]
    build(features).save(tmp_path / "own")
    views = np.array(open_frames(root, [f"observation.images.{camera}"], seen=encoder.side).arrays[
        f"observation.images.{camera}"][:2])  # fmt: skip
    policy.cameras = policy.cameras[:1]
    assert watch(tmp_path / "own", policy, weights)({policy.cameras[0]: views}).max() < 1e-3
    with pytest.raises(BurnishError, match="watchdog of encoder kind tower.* for a policy with kind tower, weights ab"):
        watch(tmp_path / "own", policy, "ab")


def test_records_hold_the_distance_of_every_replan(pictured, tmp_path):
    root, _, camera = pictured
    features = encode_dataset(root, make_encoder("pixels"), progress=False)
    features.about["cameras"] = ["front"]
    build(replace(features, values=features.values * np.linspace(0, 1, 768, dtype=np.float16))).save(tmp_path / "index")
    options = {"episodes": 4, "first_state": 0, "workers": 1, "batch_size": 4, "image_size": 8, "video": False,
               "progress": False, "make": make_env}  # fmt: skip
    found = evaluate(make_policy(), "line:a", output=tmp_path / "eval", watchdog=tmp_path / "index", **options)
    assert all(len(r.distances) == len(r.latency_ms) > 0 for r in found.records)
    assert min(min(r.distances) for r in found.records) > 0.01
    assert {r.key: r.distances for r in read_results(tmp_path / "eval")} == {r.key: r.distances for r in found.records}
    plain = evaluate(make_policy(), "line:a", output=tmp_path / "plain", **options)
    assert [(r.success, r.steps) for r in plain.records] == [(r.success, r.steps) for r in found.records]
    assert "distances" not in (tmp_path / "plain/episodes.jsonl").read_text()
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert summary["watchdog"]["n"] == 4 and summary["watchdog"]["ms"] > 0 and summary["settings"]["watchdog"]
    assert summary["watchdog"]["largest"] == pytest.approx(np.mean([max(r.distances) for r in found.records]))
    with pytest.raises(BurnishError, match="other watchdog"):
        evaluate(make_policy(), "line:a", output=tmp_path / "plain", watchdog=tmp_path / "index", **options)


def test_a_line_of_distances_is_read_back_and_a_wrong_one_named():
    record = Record("t", 3, 0, False, 5, (1.0, 2.0), distances=(0.25, 0.5))
    assert parse_row(json.loads(record.to_line()), "f:1") == record
    assert watched([record]).scores.tolist() == [0.5] and watched([record]).failed.tolist() == [True]
    with pytest.raises(BurnishError, match="distances is"):
        parse_row({"task": "t", "trial": 1, "success": True, "distances": ["far"]}, "f:1")


def test_a_result_keeps_what_its_figures_follow_from():
    far = [(0.1 * i, 0.5 - 0.01 * i)[: 1 + i % 2] for i in range(12)]
    records = [Record(f"t:x{'+camera' * (i % 2)}", i // 2, 0, i % 3 > 0, 5, distances=far[i]) for i in range(12)]
    kept = {"0": text(records), "1": text(records[::-1])}
    assert kept["0"].startswith("plain.0=0 0 0; camera.0=1 0.49 0.1; ")
    found = figures(kept)
    assert found["n"] == 24 and found["success_rate"] == pytest.approx(8 / 12)
    assert found["mean"] == pytest.approx(*auc(*(np.array(v) for v in zip(*[
        (max(r.distances), not r.success) for r in records], strict=True))))  # fmt: skip
    row = {"label": "tower", "eval": "all", **found, "outcomes": kept}
    facts = {"recipe": "r", "command": "c", "commit": "", "date": "", "seeds": {}, "hardware": "", "minutes": 1.0}
    content = {**facts, "rows": [row], "metrics": {}}
    assert differing(content, renew(content)) == ""
    assert differing({**content, "rows": [{**row, "mean": 0.9}]}, renew(content)).startswith("rows[0].mean")
