"""Pairs: who is compared with whom, where, and what is refused."""

import numpy as np
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.data.pairs import Outcome, Pair, PairData, divergence, make_pairs, read_labels, write_index


def rollout(*actions, start=0.0):
    """States add up the actions, so equal actions lead to equal states."""
    a = np.array(actions, np.float32)[:, None]
    return {
        "action": a,
        "state": np.float32(start) + np.concatenate([[[0.0]], np.cumsum(a, 0)[:-1]]).astype(np.float32),
    }


def test_divergence_is_the_first_frame_in_which_actions_differ():
    assert divergence(rollout(1, 2, 3, 4), rollout(1, 2, 5, 4, 6)) == 2
    assert divergence(rollout(1, 2), rollout(1, 2, 3)) is None
    assert divergence(rollout(1, 2), rollout(2, 2)) == 0


def test_rollouts_of_unequal_starts_are_never_paired():
    assert divergence(rollout(1, 2), rollout(1, 3, start=0.1)) is None
    assert make_pairs([True, False], [2, 2], [rollout(1, 2), rollout(1, 3, start=0.1)]) == []


def test_equal_outcomes_are_paired_only_when_asked():
    rollouts = [rollout(1, 1), rollout(1, 2, 2), rollout(1, 3)]
    outcomes, lengths = [True, True, False], [2, 3, 2]
    assert make_pairs(outcomes, lengths, rollouts) == [Pair((0, 1), (2, 1)), Pair((1, 1), (2, 1))]
    faster = make_pairs(outcomes, lengths, rollouts, ties="faster")
    assert Pair((0, 1), (1, 1)) in faster and len(faster) == 3
    assert make_pairs([False, False, False], lengths, rollouts, ties="faster") == []
    with pytest.raises(BurnishError, match="ties 'smoother'; expected skip or faster"):
        make_pairs(outcomes, lengths, rollouts, ties="smoother")


def test_offsets_start_before_the_branch_point_and_limit_counts():
    pair = [rollout(1, 2, 3), rollout(1, 2, 4)]
    assert make_pairs([True, False], [3, 3], pair, offsets=(0, 1, 5)) == [Pair((0, 2), (1, 2)), Pair((0, 1), (1, 1))]
    assert len(make_pairs([True, False], [3, 3], pair, offsets=(0, 1), limit=1)) == 1


@pytest.fixture
def root(dataset, tmp_path):
    """A copy of the fake data set: three episodes of 9, 10, 11 frames, tasks 0, 1, 0; no two states are equal."""
    import shutil

    return shutil.copytree(dataset, tmp_path / "pairs")


def index(root, *pairs, tolerance=1e9):
    write_index(root, [Pair(*p) for p in pairs], {"source": "test"}, tolerance)
    return PairData(root, ("front",), 4, progress=False)


def test_chunks_of_both_sides_on_the_chosen_observation(root):
    data = index(root, ((0, 1), (2, 3)), ((2, 0), (0, 0)))
    batch, candidates = data.batch([0, 1])
    first = {e: int(np.flatnonzero(data.robot.episode_index == e)[0]) for e in (0, 2)}
    torch.testing.assert_close(candidates[0, 0], torch.from_numpy(data.robot.actions[first[0] + 1 : first[0] + 5]))
    torch.testing.assert_close(candidates[0, 1], torch.from_numpy(data.robot.actions[first[2] + 3 : first[2] + 7]))
    assert batch["observation.state"][0].tolist() == data.robot.states[first[0] + 1].tolist()
    assert batch["observation.images.front"].shape == (2, 3, 32, 32) and batch["task"] == ["task 0", "task 0"]
    assert not batch["action_is_pad"].any()
    assert set(data.robot.episode_index[data.successes]) == {0, 2}


def test_a_step_that_one_side_lacks_counts_for_neither(root):
    batch, _ = index(root, ((0, 7), (2, 7))).batch([0])  # episode 0 ends after frame 8
    assert batch["action_is_pad"].tolist() == [[[False, False, True, True]] * 2]
    short = PairData(root, ("front",), 4, steps=1, progress=False)
    assert short.batch([0])[0]["action_is_pad"][0, 0].tolist() == [False, True, True, True]


def test_hash_changes_with_the_index(root):
    one = index(root, ((0, 1), (2, 3))).hash
    assert one != index(root, ((0, 1), (2, 4))).hash and one == index(root, ((0, 1), (2, 3))).hash


@pytest.mark.parametrize(
    ("pairs", "tolerance", "words"),
    [
        ([((0, 0), (1, 0))], 1e9, "compares 'task 0' with 'task 1'; expected one task in a pair"),
        ([((0, 0), (2, 0))], 0.0, "pair 0 .* starts from states that differ by .*; expected the same start"),
        ([((0, 0), (0, 2))], 1e9, "pairs episode 0 with itself; expected two episodes"),
        ([((0, 0), (9, 0))], 1e9, "names episode 9; expected 0 to 2"),
        ([((0, 0), (2, 90))], 1e9, "names frame 90 of episode 2; expected 0 to 10"),
        ([], 0.0, "no pairs; expected at least one success and one failure"),
        ([((0, 0), (2, 0))] * 2, 1e9, "occurs twice"),
    ],
)
def test_refused_pairs(root, pairs, tolerance, words):
    with pytest.raises(BurnishError, match=words) as error:
        index(root, *pairs, tolerance=tolerance)
    assert "\n" not in str(error.value)


def test_actions_in_other_units_are_refused(root):
    data = index(root, ((0, 1), (2, 3)))
    own = data.robot.meta.stats["action"]
    data.check_units(own)
    for factor in (1e-3, 1e4):
        with pytest.raises(BurnishError, match="do not fit the policy's statistics .* do not normalise"):
            data.check_units({"mean": own["mean"] * factor, "std": own["std"] * factor})
    with pytest.raises(BurnishError, match="actions of 3 dimensions; expected 2"):
        data.check_units({"mean": np.zeros(2), "std": np.ones(2)})


def test_not_a_pair_folder(dataset):
    with pytest.raises(BurnishError, match=r"no pairs in .*; expected a pair folder; try: burnish data pairs --help"):
        PairData(dataset, ("front",), 4, progress=False)


def test_labels_come_in_three_spellings(tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text('{"chosen": 1, "rejected": [2, 3]}\n\n{"chosen": {"episode": 0, "frame": 4}, "rejected": 1}\n')
    assert read_labels(file) == [Pair((1, 0), (2, 3)), Pair((0, 4), (1, 0))]
    file.write_text('{"episode": 3, "success": false}\n{"chosen": 1, "rejected": {"action": [[1, 2.5]]}}\n')
    assert read_labels(file) == [Outcome(3, False), Pair((1, 0), (1, 0), ((1.0, 2.5),))]
    file.write_text('{"chosen": 1}\n')
    with pytest.raises(BurnishError, match="labels.jsonl:1 is no pair"):
        read_labels(file)
    with pytest.raises(BurnishError, match="no file"):
        read_labels(tmp_path / "none.jsonl")
