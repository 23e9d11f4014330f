"""Widths in whole numbers, prefixes, and who shares what (specification 4.1, numbers 3 to 5 and 10)."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.seeding import generator
from burnish.methods.align.aligner import Projectors, prefix_widths


def make(sharing="shared", widths=(4, 7, 12), teacher=(6, 6, 6), norm=True):
    return Projectors(8, teacher, 12, widths, sharing, norm, generator("projector test")).double()


def states(seed=0, tokens=5):
    return torch.randn(2, tokens, 8, generator=generator(seed), dtype=torch.float64)


def test_widths_of_the_paper_and_of_the_released_code():
    paper = [410, 592, 774, 956, 1138, 1320, 1502, 1684, 1866, 2048]
    released = [409, 591, 773, 955, 1137, 1319, 1501, 1683, 1865, 2048]
    assert prefix_widths(10, 2048) == paper
    assert prefix_widths(10, 2048, truncate=True) == released
    assert prefix_widths(10, 2048, reverse=True) == paper[::-1]


def test_widths_where_floats_go_wrong():
    assert max(prefix_widths(4, 2048)) == 2048  # floats give 2049
    assert prefix_widths(5, 100)[2] == 60  # floats give 61
    assert prefix_widths(1, 2048) == [2048]  # the formula gives 410
    assert prefix_widths(1, 2048, truncate=True) == [409]  # and so does the code


@given(st.integers(1, 40), st.integers(1, 4096), st.integers(1, 100))
def test_widths_rise_from_the_low_share_to_all(count, hidden, low):
    widths = prefix_widths(count, hidden, low / 100)
    assert len(widths) == count and widths == sorted(widths) and widths[-1] == hidden and widths[0] >= 1
    for i, width in enumerate(widths[:-1]):
        share = Fraction(low, 100) + (1 - Fraction(low, 100)) * Fraction(i, count - 1)
        assert width == min(hidden, max(1, ceil(share * hidden)))


def test_a_prefix_is_the_whole_network_with_the_other_units_silenced():
    projectors = make()
    member = projectors.members[0][0]
    for pair, width in enumerate(projectors.widths):
        cut = projectors(pair, states())
        with torch.no_grad():
            silenced = member.fc2.weight.clone()
            silenced[:, width:] = 0
        normed = torch.nn.functional.layer_norm(states(), (8,))
        inner = torch.nn.functional.gelu(normed @ member.fc1.weight.T + member.fc1.bias)
        torch.testing.assert_close(cut, inner @ silenced.T + member.fc2.bias, atol=1e-12, rtol=0)


def test_gradient_reaches_the_prefix_and_unit_j_from_as_many_pairs_as_use_it():
    projectors = make()
    member = projectors.members[0][0]
    reached = torch.zeros(12)
    for pair, width in enumerate(projectors.widths):
        projectors.zero_grad()
        projectors(pair, states()).square().sum().backward()
        for grad in (member.fc1.weight.grad, member.fc1.bias.grad, member.fc2.weight.grad.T):
            assert (grad[width:] == 0).all() and (grad[:width] != 0).any()
        assert (member.fc2.bias.grad != 0).all() and (member.norm.weight.grad != 0).all()
        reached += (member.fc1.bias.grad != 0).float()
    expected = torch.tensor([sum(width > j for width in projectors.widths) for j in range(12)])
    assert torch.equal(reached, expected.float())


@pytest.mark.parametrize(("sharing", "times"), [("shared", 1), ("independent", 3), ("same_start", 3)])
def test_how_many_parameters_there_are(sharing, times):
    one = 8 * 2 + 8 * 12 + 12 + 12 * 6 + 6
    assert sum(p.numel() for p in make(sharing).parameters()) == times * one


def test_a_shared_trunk_has_output_layers_of_its_own():
    projectors = make("trunk", teacher=(6, 5, 4))
    assert sum(p.numel() for p in projectors.parameters()) == 8 * 2 + 8 * 12 + 12 + sum(12 * d + d for d in (6, 5, 4))
    assert [projectors(pair, states()).shape[-1] for pair in range(3)] == [6, 5, 4]


def test_same_start_and_independent():
    same, apart = make("same_start", widths=(12,) * 3), make("independent", widths=(12,) * 3)
    assert torch.equal(same(0, states()), same(2, states())) and same.similarity() == pytest.approx(1)
    assert not torch.equal(apart(0, states()), apart(2, states())) and abs(apart.similarity()) < 0.3


def test_invariant_to_shift_and_scale_of_the_student_behind_a_norm():
    projectors = make()
    torch.testing.assert_close(projectors(1, 3 * states() + 0.7), projectors(1, states()), atol=1e-4, rtol=1e-4)
