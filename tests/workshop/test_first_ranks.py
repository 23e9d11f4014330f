"""Ranks, chance and controls of retrieval, each against a count by hand."""

from itertools import permutations

import numpy as np
import pytest

from burnish.core.errors import BurnishError
from burnish.evaluate.retrieval import figures, over_episodes
from workshop.ranks import by_chance, find, first_right, ranks_row, shuffled, text, time_errors


def test_the_first_right_key_has_the_rank_of_a_sort():
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(40, 5)), rng.normal(size=(30, 5))
    right, barred = rng.random((40, 30)) < 0.1, rng.random((40, 30)) < 0.2
    ranks = first_right(queries, keys, right, barred)
    for q in range(40):
        order = [k for k in np.argsort(-(keys @ queries[q])) if not barred[q, k]]
        expected = next((place for place, k in enumerate(order, 1) if right[q, k]), 0)
        assert ranks[q] == expected


def test_vectors_that_are_all_alike_find_nothing():
    right = np.eye(4, dtype=bool)
    assert first_right(np.ones((4, 2)), np.ones((4, 2)), right, ~right & False).tolist() == [4] * 4


def test_chance_is_the_share_of_all_orders():
    right, barred = np.array([[1, 0, 0, 1, 0]], bool), np.array([[0, 0, 1, 0, 0]], bool)
    orders = list(permutations([0, 1, 3, 4]))
    for k, chance in zip((1, 2, 3), by_chance(right, barred, (1, 2, 3))[0], strict=True):
        assert chance == pytest.approx(sum(bool({0, 3} & set(order[:k])) for order in orders) / len(orders))
    assert by_chance(np.zeros((1, 5), bool), barred).tolist() == [[0, 0, 0]]


def test_shuffled_labels_come_out_at_chance_and_keep_episodes_whole():
    rng = np.random.default_rng(0)
    episodes = np.repeat(np.arange(60), 5)
    tasks = np.array([f"t{e % 3}" for e in episodes])
    vectors = np.eye(3)[episodes % 3] + 0.1 * rng.normal(size=(300, 3))
    mixed = shuffled(tasks, episodes, rng)
    assert all(len(set(mixed[episodes == e])) == 1 for e in range(60)) and sorted(mixed) == sorted(tasks)
    same, own = mixed[:, None] == mixed[None], episodes[:, None] == episodes[None]
    found = find(vectors, vectors, same, own, episodes)
    assert abs((found.ranks == 1).mean() - found.chance[:, 0].mean()) < 0.15
    true = tasks[:, None] == tasks[None]
    assert (find(vectors, vectors, true, own, episodes).ranks == 1).mean() > 0.95


def test_a_row_keeps_every_rank_and_its_interval_is_over_episodes():
    rng = np.random.default_rng(0)
    hits = np.repeat(rng.random(20) < 0.5, 8)  # all frames of an episode agree: 20 outcomes, not 160
    low, high = over_episodes([hits], [np.repeat(np.arange(20), 8)])
    assert high - low > 0.3
    low, high = over_episodes([np.ones(16)], [np.repeat(np.arange(4), 4)])
    assert low < 0.6 and high == 1
    right = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0]], bool)
    found = find(np.eye(3), np.eye(3), right, np.zeros((3, 3), bool), np.array([7, 9, 9]))
    made = ranks_row("a", "b", {0: found, 2: found})
    assert made["outcomes"] == {"0": "7: 1; 9: 3", "2": "7: 1; 9: 3"} and made["n"] == 4
    assert (made["rate"], made["recall@5_rate"], made["median_rank"]) == (0.5, 1.0, 2.0)
    assert figures(made["outcomes"]).items() <= made.items()
    assert made["chance_rate"] == pytest.approx(1 / 3) and text(found) == "7: 1; 9: 3"
    with pytest.raises(BurnishError, match="nothing|anything right"):
        find(np.eye(2), np.eye(2), np.zeros((2, 2), bool), np.zeros((2, 2), bool), np.arange(2))


def test_errors_in_time_are_of_the_nearest_frame_of_another_episode():
    share = np.array([0.0, 0.5, 1.0] * 2)
    vectors = np.array([[1, 0], [0, 1], [-1, 0]] * 2, float)
    errors, chance, episodes = time_errors(vectors, share, np.array(["t"] * 6), np.repeat([3, 4], 3))
    assert errors.tolist() == [0] * 6 and episodes.tolist() == [3] * 3 + [4] * 3
    assert chance == pytest.approx([0.5, 1 / 3, 0.5] * 2)
    assert len(time_errors(vectors, share, np.array(["t"] * 3 + ["u"] * 3), np.repeat([3, 4], 3))[0]) == 0
