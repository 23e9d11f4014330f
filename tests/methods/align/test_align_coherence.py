"""Coherence of alignment gradients at initialisation (specification 4.2) and Proposition 1."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.seeding import generator
from burnish.methods.align.aligner import (
    Projectors,
    alignment_loss,
    coherence,
    cosine,
    pairwise_cosine,
    prefix_widths,
    scale_gradient,
)

PAIRS, TOKENS, STUDENT, TEACHER, HIDDEN = 10, 64, 128, 96, 96


def streams(rho_student, rho_teacher, seed):
    """Residual streams that keep a share rho from layer to layer."""
    draws = generator("streams", seed)
    h, t = torch.randn(1, TOKENS, STUDENT, generator=draws), torch.randn(1, TOKENS, TEACHER, generator=draws)
    students, teachers = [], []
    for _ in range(PAIRS):
        h = rho_student * h + math.sqrt(1 - rho_student**2) * torch.randn(h.shape, generator=draws)
        t = rho_teacher * t + math.sqrt(1 - rho_teacher**2) * torch.randn(t.shape, generator=draws)
        students.append(h)
        teachers.append(t)
    return students, teachers


def measure(rho_student, rho_teacher, sharing, nested=False, repeats=4):
    """Mean cosine between two pairs' gradients, and their coherence."""
    cosines, coherences = [], []
    for seed in range(repeats):
        widths = prefix_widths(PAIRS, HIDDEN) if nested else [HIDDEN] * PAIRS
        projectors = Projectors(STUDENT, [TEACHER] * PAIRS, HIDDEN, widths, sharing, False, generator("toy", seed))
        students, teachers = streams(rho_student, rho_teacher, seed)
        mask, gradients = torch.ones(1, TOKENS, dtype=torch.bool), []
        for pair, (h, t) in enumerate(zip(students, teachers, strict=True)):
            h = h.requires_grad_()
            gradients += torch.autograd.grad(alignment_loss(projectors(pair, h), t, mask), h)
        matrix = pairwise_cosine(gradients)
        cosines.append((matrix.sum() - PAIRS) / (PAIRS * (PAIRS - 1)))
        coherences.append(coherence(gradients))
    return float(torch.stack(cosines).mean()), float(torch.stack(coherences).mean())


@pytest.mark.parametrize(
    ("rho_student", "rho_teacher", "shared", "nested"),
    [(0.98, 0.98, 0.944, 0.822), (0.9, 0.9, 0.786, 0.702), (0.98, 0.5, 0.506, 0.485), (0.0, 0.0, 0.317, 0.315)],
)
def test_the_toy_of_the_specification(rho_student, rho_teacher, shared, nested):
    apart = measure(rho_student, rho_teacher, "independent")
    assert apart[1] == pytest.approx(1 / math.sqrt(PAIRS), abs=0.02) and abs(apart[0]) < 0.02
    one, cut = (measure(rho_student, rho_teacher, "shared", nested=n)[1] for n in (False, True))
    assert one == pytest.approx(shared, abs=0.03) and cut == pytest.approx(nested, abs=0.03)
    if rho_student > 0.8 and rho_teacher > 0.8:
        assert one - apart[1] > 0.3 and cut < one
    if rho_teacher == 0:
        assert abs(one - apart[1]) < 0.02


def test_inner_products_of_linear_projectors_follow_proposition_1():
    """<v_a, v_b> = g_a' W_a W_b' g_b; with one shared W the Gram matrix is positive semidefinite."""
    draws = generator("linear")
    weights = [torch.randn(5, 9, generator=draws).double() for _ in range(3)]
    errors = [torch.randn(5, generator=draws).double() for _ in range(3)]
    pulled = []
    for w, g in zip(weights, errors, strict=True):
        h = torch.zeros(9, dtype=torch.float64, requires_grad=True)
        pulled += torch.autograd.grad((w @ h) @ g, h)
    for a in range(3):
        for b in range(3):
            assert float(pulled[a] @ pulled[b]) == pytest.approx(
                float(errors[a] @ weights[a] @ weights[b].T @ errors[b])
            )
    shared = torch.stack([weights[0].T @ g for g in errors])
    assert torch.linalg.eigvalsh(shared @ shared.T).min() > -1e-12


@given(st.integers(1, 8), st.integers(0, 999))
def test_coherence_lies_between_conflict_and_agreement(count, seed):
    gradients = list(torch.randn(count, 7, generator=generator("range", seed)))
    assert 0 <= float(coherence(gradients)) <= 1 + 1e-6
    assert float(coherence([gradients[0]] * count)) == pytest.approx(1, abs=1e-6)


def test_known_cases():
    e = torch.eye(4)
    assert float(coherence(list(e))) == pytest.approx(0.5) and float(coherence([e[0], -e[0]])) == 0
    assert float(cosine(e[0], e[0] + e[1])) == pytest.approx(math.sqrt(0.5))
    assert float(cosine(torch.zeros(4), e[0])) == 0


def test_scaling_a_gradient_leaves_the_value_and_scales_only_what_flows_back():
    x, w = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    y = scale_gradient(x, torch.tensor(0.25)) * w
    y.backward()
    assert y.item() == 6 and x.grad.item() == pytest.approx(0.75) and w.grad.item() == 2
