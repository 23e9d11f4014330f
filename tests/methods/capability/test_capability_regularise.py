"""Penalties against formulas written out, and their gradients against autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.methods.capability.regularise import PENALTIES, inner_products, penalty, pinned, project_out


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


def tensors(seed, spread=1.0):
    draws = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(shape, generator=draws) for shape in ((3, 4), (5,), (2, 3, 2))]


@pytest.mark.parametrize("kind", PENALTIES)
def test_value_and_gradient(kind):
    gammas, start = tensors(0), tensors(1)
    for weight in (1.0, 0.3):
        a, b = ([t.clone().requires_grad_() for t in start] for _ in range(2))
        (weight * penalty(kind, gammas, a)).backward()
        (weight * by_hand(kind, gammas, b)).backward()
        torch.testing.assert_close(penalty(kind, gammas, a), by_hand(kind, gammas, b))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x.grad, y.grad)


def test_eq_7_on_two_by_two():
    gamma, moved = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([[0.5, 1.0], [7.0, -1.0]])
    d = moved.clone().requires_grad_()
    value = penalty("l1", [gamma], [d])
    value.backward()
    assert value.item() == 0.5 + 2.0 + 0.0 + 3.0
    assert d.grad.tolist() == [[1.0, 2.0], [0.0, -3.0]]


@pytest.mark.parametrize("kind", PENALTIES)
def test_nothing_moved_costs_nothing_and_pulls_nowhere(kind):
    moved = [torch.zeros_like(g).requires_grad_() for g in tensors(0)]
    value = penalty(kind, tensors(0), moved)
    value.backward()
    assert value.item() == 0 and all((m.grad == 0).all() for m in moved)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_eq_7_bounds_the_inner_product_and_scales(seed, factor):
    gammas, moved = tensors(seed), tensors(seed + 1)
    value = penalty("l1", gammas, moved)
    assert value >= inner_products(gammas, moved).abs().sum() - 1e-4
    torch.testing.assert_close(penalty("l1", [factor * g for g in gammas], moved), factor * value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(penalty("l1", gammas, [factor * m for m in moved]), factor * value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(penalty("l1", gammas, [-m for m in moved]), value)
    torch.testing.assert_close(penalty("l1", gammas[::-1], moved[::-1]), value)
    same_sign = [m.abs() * g.sign() for g, m in zip(gammas, moved, strict=True)]
    torch.testing.assert_close(penalty("l1", gammas, same_sign), inner_products(gammas, same_sign).abs().sum())


def test_projection_sees_only_what_lies_along_gamma():
    gammas, moved = tensors(0), tensors(1)
    across = project_out(moved, gammas)
    torch.testing.assert_close(inner_products(across, gammas), torch.zeros(3), atol=1e-5, rtol=0)
    assert penalty("projection", gammas, across) < 1e-9
    d = [m.clone().requires_grad_() for m in moved]
    penalty("projection", gammas, d).backward()
    for g, x in zip(gammas, d, strict=True):
        cosine = (g * x.grad).sum() / g.norm() / x.grad.norm()
        assert abs(cosine) == pytest.approx(1.0, abs=1e-5)


def test_sgd_on_projected_gradients_leaves_the_inner_product():
    gammas = tensors(0)
    parameters = tensors(1)
    before = inner_products(gammas, parameters)
    moved = [p - 0.1 * g for p, g in zip(parameters, project_out(tensors(2), gammas), strict=True)]
    torch.testing.assert_close(inner_products(gammas, moved), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(project_out(tensors(2), [torch.zeros_like(g) for g in gammas]), tensors(2))


def test_half_precision_is_summed_in_float32():
    gammas = [torch.full((10_000,), 1.0)]
    moved = torch.full((10_000,), 1.0, dtype=torch.bfloat16).requires_grad_()
    value = penalty("l1", gammas, [moved])
    value.backward()
    assert value.item() == 10_000 and moved.grad.dtype == torch.bfloat16


def test_pinned_share():
    """Loss gradients 0.05, 0.5 and 0; forces 0.1, 0.1 and 0: one of three is held."""
    gamma, moved = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([2.0, 3.0, 4.0])
    grads = torch.tensor([0.05, 0.5, 0.0]) + 0.1 * gamma.abs() * moved.sign()
    assert pinned([grads], [gamma], [moved], 0.1).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("spread", [1e-3, 1e-7, 1e-9])
def test_a_small_vector_has_a_direction_too(spread):
    gammas, moved = tensors(0, spread), tensors(1)
    torch.testing.assert_close(penalty("projection", gammas, moved), by_hand("projection", gammas, moved))
    left = project_out(moved, gammas)
    for g, d, rest in zip(gammas, moved, left, strict=True):
        assert abs((g * rest).sum()) < 1e-5 * g.norm() * d.norm()
    zeros = [torch.zeros_like(g) for g in gammas]
    assert penalty("projection", zeros, moved) == 0
    assert all(torch.equal(a, b) for a, b in zip(project_out(moved, zeros), moved, strict=True))
