"""Which layers are paired: the released lists, the rule behind them, CKA in closed form, and wrong indices."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.core.seeding import generator
from burnish.methods.align.layers import (
    StreamingCka,
    by_depth,
    check_pairs,
    choose_pairs,
    early_to_middle_and_last,
    match_by_cka,
    similar_layers,
    thirds,
    uniform,
)  # fmt: skip
from burnish.teachers.placing import Placement


def test_early_to_middle_and_last_gives_the_released_lists():
    openvla = early_to_middle_and_last(10, 32, 24)
    assert [s + 1 for s, _ in openvla] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 32]
    assert [t for _, t in openvla] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 23]
    pi0 = early_to_middle_and_last(10, 18, 24)
    assert [s + 1 for s, _ in pi0] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 18]
    released = early_to_middle_and_last(10, 32, 24, released=True)
    assert released[-1] == (30, 23)  # hidden_states[31] is the output of block 31, counted from 1


def test_uniform_gives_the_released_lists():
    assert [i + 1 for i in uniform(8, 32)] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert uniform(8, 24) == [2, 5, 8, 11, 14, 17, 20, 23]
    assert uniform(16, 24) == [1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16, 17, 19, 20, 22, 23]
    assert [i + 1 for i in uniform(16, 32)] == list(range(2, 33, 2))
    assert uniform(30, 24) == list(range(24))


@given(st.integers(1, 60), st.integers(1, 60))
def test_uniform_is_ascending_unique_and_ends_at_the_last(count, layers):
    chosen = uniform(count, layers)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, layers)
    assert chosen[0] >= 0 and chosen[-1] == layers - 1


@given(st.integers(1, 40), st.integers(1, 30), st.sampled_from(["depth", "single", "e2m_last1", "deep", "uniform-5"]))
def test_every_strategy_names_layers_that_exist(students, teachers, select):
    pairs = choose_pairs(select, 10, students, teachers)
    assert check_pairs(pairs, students, teachers) == pairs


def test_thirds_and_depth():
    assert [thirds(name, 9) for name in ("shallow", "middle", "deep")] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert by_depth([0, 1, 2, 3], 4, 8) == [(0, 1), (1, 3), (2, 5), (3, 7)]
    assert choose_pairs("depth", 0, 4, 8) == [(0, 2), (1, 4), (2, 7)]
    # Of 17 layers that the actions read ten, evenly spread up to the last.
    assert [s for s, _ in choose_pairs("depth", 10, 18, 24)] == [1, 2, 4, 6, 8, 9, 11, 13, 14, 16]
    assert choose_pairs("single", 0, 18, 24) == [(11, 23)]  # the paper's 12 of 18 on pi, counted from 1
    assert choose_pairs("single", 0, 32, 24) == [(23, 23)] and choose_pairs("single", 0, 4, 8) == [(2, 7)]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([[4, 0]], "student layer 4.*0 to 3"),
        ([[0, 8]], "teacher layer 8.*0 to 7"),
        ([[-1, 3]], "student layer -1.*0 to 3"),
        ([[2, 1], [1, 2]], "ascending"),
        ([[1]], r"\[1\] among the pairs"),
        ([], "no pairs"),
        ([[0.5, 1]], "whole numbers"),
    ],
)
def test_wrong_pairs_are_named(pairs, words):
    with pytest.raises(BurnishError, match=words) as error:
        check_pairs(pairs, 4, 8)
    assert "\n" not in str(error.value)


def test_unknown_strategy():
    with pytest.raises(BurnishError, match="select is 'best'.*e2m_last1"):
        choose_pairs("best", 3, 4, 8)


def test_cka_from_batches_is_the_closed_form():
    draws = generator("cka")
    students = [torch.randn(60, d, generator=draws) + 3 for d in (4, 6)]
    teachers = [students[0] @ torch.randn(4, 5, generator=draws), torch.randn(60, 7, generator=draws)]
    streaming = StreamingCka([4, 6], [5, 7])
    for rows in torch.arange(60).split(17):
        streaming.add([s[rows] for s in students], [t[rows] for t in teachers])

    def cka(x, y):
        x, y = (z.double().numpy() - z.double().numpy().mean(0) for z in (x, y))
        gram = [z @ z.T for z in (x, y)]
        return (gram[0] * gram[1]).sum() / np.sqrt((gram[0] ** 2).sum() * (gram[1] ** 2).sum())

    expected = [[cka(s, t) for t in teachers] for s in students]
    np.testing.assert_allclose(streaming.matrix(), expected, rtol=1e-6)


def test_matching_beats_every_other_assignment():
    matrix = np.random.default_rng(0).random((4, 5))
    pairs = match_by_cka(matrix, 4)
    best = max(sum(matrix[r, c] for r, c in enumerate(p)) for p in itertools.permutations(range(5), 4))
    assert sum(matrix[p] for p in pairs) == pytest.approx(best)
    assert match_by_cka(matrix, 2) == sorted(sorted(pairs, key=lambda p: -matrix[p])[:2])


def test_similar_layers():
    assert similar_layers([0.9, 0.5, 0.7, 0.95], 2, top=True) == [0, 3]
    assert similar_layers([0.9, 0.5, 0.7, 0.95], 2, top=False) == [1, 2]


def test_views_without_one_grid_are_refused():
    from burnish.core.errors import BurnishError
    from burnish.methods.align.aligner import token_grid
    from burnish.policies.base import Captured

    captured = Captured()
    captured.cameras = {"front": slice(0, 16), "wrist": slice(16, 32), "wide": slice(32, 40), "small": slice(40, 44)}
    assert token_grid(captured, ["front", "wrist"]) == (4, 4)
    with pytest.raises(BurnishError, match="'wide': 8.*one grid for all views"):
        token_grid(captured, ["wide"])
    with pytest.raises(BurnishError, match="'small': 4.*one grid for all views"):
        token_grid(captured, ["front", "small"])
    assert token_grid(captured, ["wide"], [Placement.whole((32, 64))]) == (2, 4)
    with pytest.raises(BurnishError, match="one grid for all views"):
        token_grid(captured, ["wide"], [Placement.whole((64, 64))])
