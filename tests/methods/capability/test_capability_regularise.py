"""Penalties against formulas written out, and their gradients against autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.methods.capability.parts import ELEMENTWISE, PENALTIES, coefficients, elementwise, pinned, products


def by_hand(kind, gammas, moved):
    """The same sums with plain autograd operations, matrix by matrix."""
    total = 0.0
    for g, d in zip(gammas, moved, strict=True):
        if kind == "l1":
            total = total + (g * d).abs().sum()
        elif kind == "projection":
            total = total + ((g / g.norm()) * d).sum() ** 2
        elif kind == "cosine":
            total = total + (g * d).sum().abs() / (g.norm() * d.norm())
        elif kind == "ewc":
            total = total + (g.abs() * d**2).sum()
        else:
            total = total + (d**2).sum()
    return total


def penalty(kind, gammas, moved, cut=2):
    """(value, gradients) over matrices, each taken in blocks of `cut` rows."""
    value, grads = 0.0, []
    for g, d in zip(gammas, moved, strict=True):
        blocks = list(zip(g.split(cut), d.split(cut), strict=True))
        if kind in ELEMENTWISE:
            found = [elementwise(kind, *block) for block in blocks]
            value += float(sum(one for one, _ in found))
            grads.append(torch.cat([pull for _, pull in found]))
        else:
            one, a, b = coefficients(kind, sum(products(*block) for block in blocks))
            value += float(one)
            grads.append(g * a + d * b)
    return value, grads


def tensors(seed, spread=1.0):
    draws = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(shape, generator=draws) for shape in ((3, 4), (5,), (2, 3, 2))]


@pytest.mark.parametrize("kind", PENALTIES)
def test_value_and_gradient(kind):
    gammas, moved = tensors(0), [t.requires_grad_() for t in tensors(1)]
    expected = by_hand(kind, gammas, moved)
    expected.backward()
    value, grads = penalty(kind, gammas, [t.detach() for t in moved])
    assert value == pytest.approx(float(expected), rel=1e-5)
    for x, y in zip(moved, grads, strict=True):
        torch.testing.assert_close(x.grad, y)


def test_eq_7_on_two_by_two():
    gamma, moved = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([[0.5, 1.0], [7.0, -1.0]])
    value, pull = elementwise("l1", gamma, moved)
    assert value.item() == 0.5 + 2.0 + 0.0 + 3.0
    assert pull.tolist() == [[1.0, 2.0], [0.0, -3.0]]


@pytest.mark.parametrize("kind", PENALTIES)
def test_nothing_moved_costs_nothing_and_pulls_nowhere(kind):
    value, grads = penalty(kind, tensors(0), [torch.zeros_like(g) for g in tensors(0)])
    assert value == 0 and all((grad == 0).all() for grad in grads)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_eq_7_bounds_the_inner_product_and_scales(seed, factor):
    gammas, moved = tensors(seed), tensors(seed + 1)

    def l1(g, m):
        return penalty("l1", g, m)[0]

    def along(m):
        return sum(abs(float((g * d).sum())) for g, d in zip(gammas, m, strict=True))

    value = l1(gammas, moved)
    assert value >= along(moved) - 1e-4
    close = {"rel": 1e-4, "abs": 1e-5}
    assert l1([factor * g for g in gammas], moved) == pytest.approx(factor * value, **close)
    assert l1(gammas, [factor * m for m in moved]) == pytest.approx(factor * value, **close)
    assert l1(gammas, [-m for m in moved]) == pytest.approx(value, **close)
    assert l1(gammas[::-1], moved[::-1]) == pytest.approx(value, **close)
    same_sign = [m.abs() * g.sign() for g, m in zip(gammas, moved, strict=True)]
    assert l1(gammas, same_sign) == pytest.approx(along(same_sign), **close)


def test_projection_pulls_along_gamma_alone():
    gammas, moved = tensors(0), tensors(1)
    for g, grad in zip(gammas, penalty("projection", gammas, moved)[1], strict=True):
        cosine = (g * grad).sum() / g.norm() / grad.norm()
        assert abs(cosine) == pytest.approx(1.0, abs=1e-5)


def test_pinned_coordinates():
    """Loss gradients 0.05, 0.5 and 0; forces 0.1, 0.1 and 0: one of three is held."""
    gamma, grad = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.05, 0.5, 0.0])
    assert pinned(grad, gamma, 0.1).item() == 1


@pytest.mark.parametrize("spread", [1e-3, 1e-7, 1e-9])
def test_a_small_vector_has_a_direction_too(spread):
    gammas, moved = tensors(0, spread), tensors(1)
    assert penalty("projection", gammas, moved)[0] == pytest.approx(
        float(by_hand("projection", gammas, moved)), rel=1e-5
    )
    zeros = [torch.zeros_like(g) for g in gammas]
    assert penalty("projection", zeros, moved)[0] == 0
