"""The choice of a sampler: what a closed form says is what is chosen; and choices belong to weights."""

import json
import shutil

import fake
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.provenance import weights_hash
from burnish.policies import load_policy
from burnish.runtime.caches import measured_spread
from burnish.runtime.choose import REFERENCE, compare_samplers, find_sampler, judge, save_choice, two_valued
from burnish.sampling.solvers import make_solver
from workshop.tiny import make_tiny

SIGMA = 0.2


def pull(time):
    """d v / d x of the exact field of normal(0, SIGMA^2)."""
    return (time - (1 - time) * SIGMA**2) / ((1 - time) ** 2 * SIGMA**2 + time**2)


def field(points, time):
    return pull(time) * points


def euler_gain(steps):
    """What `steps` Euler steps make of a noise of 1."""
    gain = 1.0
    for k in range(steps):
        gain *= 1 - pull(1 - k / steps) / steps
    return gain


def ab2_gain(steps):
    """The same by the two-term recursion x_(k+1) = x_k - h (3 v_k - v_(k-1)) / 2."""
    x, old = 1.0, None
    for k in range(steps):
        v = pull(1 - k / steps) * x
        x, old = x - (v if old is None else (3 * v - old) / 2) / steps, v
    return x


def noise(n=40, noises=4):
    return torch.randn(n * noises, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def drawn(samplers):
    return {name: make_solver(name)(field, noise()).unflatten(0, (40, 4)) for name in (*samplers, REFERENCE)}


@pytest.mark.parametrize(("name", "gain"), [("euler", euler_gain), ("ab2", ab2_gain)])
def test_auto_picks_the_number_of_passes_that_the_closed_form_says(name, gain):
    """The field is linear, so a sampler multiplies noise: e / s = |1 - gain / true| and kept = gain / true, exactly."""
    true = euler_gain(100)
    found = judge(drawn(f"{name}:{n}" for n in range(1, 41)))
    for row in found["rows"]:
        share = gain(row["passes"]) / true
        # s is over noises at one observation, e over everything: they differ by the sample's own means.
        assert row["kept"] == pytest.approx(abs(share), rel=1e-9)
        assert row["error"] == pytest.approx(abs(1 - share), rel=0.05)
    first = next(n for n in range(1, 41) if abs(1 - gain(n) / true) <= 0.1)
    assert found["sampler"] == f"{name}:{first}" and first > 2


def test_of_all_kinds_the_fewest_passes_win():
    found = judge(drawn(["euler:40", "ab2:20", "ab2:16", "midpoint:16"]))
    at_16 = [row for row in found["rows"] if row["passes"] == 16]
    assert found["sampler"] == min(at_16, key=lambda row: row["error"])["sampler"]


def test_nothing_that_keeps_to_the_rule_leaves_the_reference():
    assert judge(drawn(["euler:1", "euler:2"]))["sampler"] == REFERENCE


def test_one_bad_dimension_is_enough_to_refuse():
    reference = drawn([])[REFERENCE]
    moved = reference.clone()
    moved[..., 2] += 0.6 * reference[..., 2].var(1).mean().sqrt()
    fine = reference + 0.1 * reference.var(1).mean().sqrt()
    rows = judge({"euler:1": moved, "euler:2": fine, REFERENCE: reference})["rows"]
    assert [row["ok"] for row in rows] == [False, True] and rows[0]["worst"] == pytest.approx(1.2, rel=0.05)


def test_a_gripper_counts_by_its_side():
    reference = drawn([])[REFERENCE].clone()
    side = torch.randn(40, 1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sign()
    reference[..., 2] = side + 0.01 * reference[..., 2]
    assert two_valued(reference.flatten(0, 2)).tolist() == [False, False, True]
    near, far = reference.clone(), reference.clone()
    near[..., 2] *= 0.94  # further than the floor, and on the right side throughout
    far[..., 2] = torch.where(torch.arange(40)[:, None, None] == 0, -far[..., 2], far[..., 2])
    found = judge({"euler:2": near, "euler:1": far, REFERENCE: reference})
    assert found["binary"] == [2] and [row["sides"] for row in found["rows"]] == pytest.approx([0.975, 1.0])
    assert found["sampler"] == "euler:2"


def test_a_policy_that_hardly_samples_is_judged_by_the_floor_alone():
    means = torch.randn(40, 1, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    reference = means + 1e-4 * drawn([])[REFERENCE]
    width = (reference.amax((0, 1, 2)) - reference.amin((0, 1, 2))).max()
    found = judge({"euler:1": reference + 0.01 * width, REFERENCE: reference})
    assert found["decided"] and found["sampler"] == "euler:1" and found["rows"][0]["error"] > 100


def test_a_dimension_that_never_moves_decides_nothing():
    reference = drawn([])[REFERENCE].clone()
    reference[..., 0] = 0.5
    moved = reference + 1e-7
    found = judge({"euler:1": moved, REFERENCE: reference})
    assert found["sampler"] == "euler:1"
    still = judge({"euler:1": torch.zeros(40, 4, 5, 3), REFERENCE: torch.zeros(40, 4, 5, 3)})
    assert still["rows"][0]["error"] == 0 and still["rows"][0]["worst"] == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("samplers") / "data"
    fake.make_dataset(root, cameras=("top", "wrist"), action_dim=7, episodes=4)
    return root


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    return make_tiny("smolvla", tmp_path_factory.mktemp("samplers") / "policy", cameras=("top", "wrist"), state_dim=4)


def test_a_choice_is_made_kept_and_found_again(data, policy_folder, tmp_path, monkeypatch, capsys):
    from burnish.cli.main import main

    folder = tmp_path / "run" / "policy"
    shutil.copytree(policy_folder, folder)
    kept = folder.parent / "runtime.json"
    words = ["policy", "verify", "runtime", str(folder), str(data), "--count", "32", "--noises", "2"]
    words += ["--sampler", "euler:20", "--sampler", "euler:1", "--output", str(kept)]
    before = weights_hash(folder)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "chosen" in shown and "tier exact    equal bits" in shown and "pictures 8 steps old" in shown
    found = json.loads(kept.read_text())
    assert found["tiers"]["exact"]["bitwise"] and found["tiers"].keys() == {"exact", "fused", "bf16"}
    assert found["caches"] == dict.fromkeys(("same", "state", "picture", "again"), True)
    assert [row["age"] for row in found["old_pictures"]] == [1, 2, 4, 8]
    assert all(row["images"] > 0 and row["prefix"] > 0 for row in found["old_pictures"])
    assert measured_spread(str(kept), load_policy(folder)) == (found["spread"], found["binary"])
    assert found["sampler"] in ("euler:1", "euler:20") and found["weights"] == before == weights_hash(folder)
    assert find_sampler("auto", folder) == find_sampler(str(kept), folder) == found["sampler"]
    again = compare_samplers(load_policy(folder), data, count=32, noises=2, samplers=("euler:20", "euler:1"))
    assert again["rows"] == found["rows"] and again["observations_hash"] == found["observations_hash"]
    other = tmp_path / "other" / "policy"
    shutil.copytree(folder, other)
    load = load_policy(other)
    load.set_steps(7)
    load.save(tmp_path / "changed" / "policy")
    with pytest.raises(BurnishError, match=f"other weights.*--output {tmp_path / 'changed' / 'runtime.json'}"):
        find_sampler(str(kept), tmp_path / "changed" / "policy")
    with pytest.raises(BurnishError, match="there is no .*runtime.json.*verify runtime"):
        find_sampler("auto", other)
    with pytest.raises(BurnishError, match="in memory"):
        find_sampler("auto", load)


def test_no_choice_is_kept_where_none_was_made(tmp_path):
    with pytest.raises(BurnishError, match="no sampler keeps to the rule"):
        save_choice({"sampler": REFERENCE}, tmp_path, tmp_path / "runtime.json")
    (tmp_path / "notes.json").write_text("mine")
    with pytest.raises(BurnishError, match="holds something else"):
        save_choice({"sampler": "ab2:4"}, tmp_path, tmp_path / "notes.json")


def test_too_few_observations_are_refused(policy_folder, data):
    with pytest.raises(BurnishError, match="at least 32"):
        compare_samplers(load_policy(policy_folder), data, count=31)
