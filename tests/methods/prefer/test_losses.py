"""Preference losses against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.methods.prefer import losses

numbers = st.floats(-20, 20, allow_nan=False)


def test_equal_policy_and_reference_give_ln_2_and_half_beta_gradients():
    scores = torch.tensor([[3.0, -7.0]], requires_grad=True)
    loss = losses.dpo(losses.margin(scores, scores.detach()), beta=0.3)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    torch.testing.assert_close(gradient, torch.tensor([[-0.15, 0.15]]))


@given(numbers, numbers, st.floats(0.01, 2), st.floats(0, 0.49))
def test_dpo_is_the_cross_entropy_of_the_label(chosen, rejected, beta, smoothing):
    m = losses.margin(torch.tensor([[chosen, rejected]], dtype=torch.float64), None)
    z = beta * (chosen - rejected)
    if abs(z) < 600:  # 1 / (1 + e^-z) has no digits left of 1 - p long before
        expected = (1 - smoothing) * math.log1p(math.exp(-z)) + smoothing * math.log1p(math.exp(z))
        assert losses.dpo(m, beta, smoothing).item() == pytest.approx(expected, abs=1e-6)


def test_conservative_dpo_is_least_where_the_odds_are_those_of_the_labels():
    m = torch.linspace(-50, 50, 20001, dtype=torch.float64)
    best = m[losses.dpo(m, 0.5, 0.2).argmin()]
    assert best.item() == pytest.approx(math.log(0.8 / 0.2) / 0.5, abs=0.01)


def test_ipo_wants_the_unscaled_margin_to_be_one_over_two_beta():
    m = torch.tensor([5.0, 4.0])
    assert losses.ipo(m, 0.1).tolist() == [0.0, 1.0]  # 1 / (2 * 0.1) = 5, not 50


def test_diffusion_dpo_multiplies_beta_by_the_horizon():
    m = torch.tensor([0.002, -0.001])
    torch.testing.assert_close(losses.diffusion_dpo(m, 5.0, 1000.0), losses.dpo(m * 1000, 5.0))


def test_proximal_is_half_the_squared_change_of_both():
    before, now = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert losses.proximal(now, before).tolist() == [12.5]


def test_diagnosis_of_a_small_batch():
    reference = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    policy = torch.tensor([[-1.0, -4.0], [-2.0, -1.0]])  # margins 3 and -1
    found = {k: v.item() for k, v in losses.diagnose(policy, reference, scale=0.5).items()}
    assert found["margin"] == 1.0 and found["accuracy"] == 0.5
    assert found["chosen_displacement"] == -1.5 and found["rejected_displacement"] == -2.5
    assert found["linear_share"] == 0.5  # logits 1.5 and -0.5
    assert found["logit_scale"] == pytest.approx(math.sqrt((1.5**2 + 0.5**2) / 2))


def figures(**changes):
    usual = {"logit_scale": 1.0, "linear_share": 0.5, "chosen_displacement": 1.0, "accuracy": 0.8}
    return usual | changes


def test_warnings_say_what_a_run_really_does():
    assert losses.warning(figures(), standard_error=0.1, scale=0.1) == ""
    assert "raise chosen, lower rejected" in losses.warning(
        figures(logit_scale=0.02, linear_share=1.0), standard_error=0.0, scale=0.1
    )
    assert "share the draws" in losses.warning(figures(logit_scale=0.5), standard_error=100.0, scale=0.1)
    assert "chosen score has fallen by 2" in losses.warning(
        figures(chosen_displacement=-2.0), standard_error=0.1, scale=0.1
    )


def test_scores_that_are_not_finite_are_named():
    with pytest.raises(BurnishError, match="1 of 2 scores of the reference are not finite"):
        losses.finite(torch.tensor([[0.0, float("nan")]]), "reference")


def test_unknown_loss():
    with pytest.raises(BurnishError, match="loss 'kto'; expected one of dpo, ipo, diffusion_dpo"):
        losses.preference("kto", torch.zeros(1), 0.1, 0.0, 1000.0)
