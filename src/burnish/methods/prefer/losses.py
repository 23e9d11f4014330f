"""Preference losses on scores [B]: pure functions of the margin, and the figures that say what a run is doing."""

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.errors import BurnishError

LOSSES = ("dpo", "ipo", "diffusion_dpo")
"""Of pairs."""


def margin(policy: Tensor, reference: Tensor | None) -> Tensor:
    """[B]: how much more the policy prefers chosen to rejected than the reference does.

    Args:
        policy: [B, 2] scores of chosen and rejected.
        reference: likewise; None for the reference-free form.
    """
    change = policy if reference is None else policy - reference
    return change[:, 0] - change[:, 1]


def dpo(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[B] DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    Args:
        margin: [B].
        label_smoothing: probability that a label is wrong; above 0 this is conservative DPO (cDPO).
    """
    z = beta * margin
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def diffusion_dpo(margin: Tensor, beta: float, horizon: float = 1000.0, label_smoothing: float = 0.0) -> Tensor:
    """[B] DPO with the scaling of Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908, eq. 14): beta * horizon.

    Their margins are means of squared errors, thousands of times smaller than a log-probability.
    """
    return dpo(margin, beta * horizon, label_smoothing)


def ipo(margin: Tensor, beta: float) -> Tensor:
    """[B] IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17): the unscaled margin is to be 1 / (2 beta)."""
    return (margin - 1 / (2 * beta)).square()


def kto(change: Tensor, desirable: Tensor, beta: float, drift: Tensor) -> Tensor:
    """[B] KTO (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 and 8), from single chunks and how they ended.

    Args:
        change: [B] how much likelier a chunk has become than it was for the reference.
        desirable: bool [B]; as many of either kind, so that both weigh alike.
        drift: scalar without gradient, how much likelier chunks from elsewhere have become: the reference point.
    """
    z = beta * (change - drift.clamp_min(0))
    return torch.sigmoid(torch.where(desirable, -z, z))


def preference(name: str, margin: Tensor, beta: float, label_smoothing: float, horizon: float) -> Tensor:
    """[B] loss called `name`, one of LOSSES."""
    if name == "dpo":
        return dpo(margin, beta, label_smoothing)
    if name == "ipo":
        return ipo(margin, beta)
    if name == "diffusion_dpo":
        return diffusion_dpo(margin, beta, horizon, label_smoothing)
    raise BurnishError(f"loss '{name}'", f"one of {', '.join(LOSSES)}")


def proximal(policy: Tensor, reference: Tensor) -> Tensor:
    """[B] half the squared change of both scores [B, 2]: keeps chosen and rejected from sinking together.

    DPO only sees the difference of the two, so both may fall without end (likelihood displacement).
    """
    return (policy - reference).square().sum(1) / 2


def diagnose(policy: Tensor, reference: Tensor | None, scale: float) -> dict[str, Tensor]:
    """Figures of one step, each a scalar tensor without gradient.

    Args:
        policy, reference: [B, 2] scores; reference None for the reference-free form.
        scale: beta, or beta times horizon: what the margin is multiplied by in the logit.

    Returns:
        margin, logit_scale: mean of the margin; root mean square of the logit.
        accuracy: share of pairs whose margin has the right sign.
        chosen_displacement, rejected_displacement: mean change of the scores against the reference.
        linear_share: share of pairs whose logit lies within one of zero, where the loss is nearly a straight line.
    """
    policy = policy.detach()
    change = policy if reference is None else policy - reference
    m = margin(policy, reference)
    z = scale * m
    return {
        "margin": m.mean(),
        "logit_scale": z.square().mean().sqrt(),
        "accuracy": (m > 0).float().mean() + 0.5 * (m == 0).float().mean(),
        "chosen_displacement": change[:, 0].mean(),
        "rejected_displacement": change[:, 1].mean(),
        "linear_share": (z.abs() < 1).float().mean(),
    }


def warning(figures: dict[str, float], standard_error: float, scale: float, referenced: bool = True) -> str:
    """One line when the figures of a stretch of training say that it is not what it looks like; "" otherwise."""
    logit = figures["logit_scale"]
    if scale * standard_error > max(1.0, logit):
        return (
            f"the margin scatters by {standard_error:.3g} over the draws, more than it says itself "
            f"(logit {logit:.3g} / {scale:.3g}): share the draws, or take more"
        )
    if figures["linear_share"] > 0.95 and logit < 0.1:
        return (
            f"{figures['linear_share']:.0%} of the pairs have a logit near 0 (root mean square {logit:.2g}): "
            "the reference hardly matters and this is 'raise chosen, lower rejected'; a larger beta would regularise"
        )
    if referenced and figures["chosen_displacement"] < 0 and figures["accuracy"] > 0.5:
        return (
            f"the chosen score has fallen by {-figures['chosen_displacement']:.3g} below the reference while the "
            "margin grows: the policy moves away from both; add sft_weight or proximal_weight"
        )
    return ""


def finite(scores: Tensor, what: str) -> None:
    """Raise BurnishError when a score is not a finite number."""
    if not bool(torch.isfinite(scores).all()):
        count = int((~torch.isfinite(scores)).sum())
        raise BurnishError(f"{count} of {scores.numel()} scores of the {what} are not finite",
                           "numbers", "check images, actions and statistics of the pairs")  # fmt: skip
