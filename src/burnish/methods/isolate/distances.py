"""Distances of a batch's hidden states from an anchor. All are differentiable in the states and zero where they agree.

Rows are tokens: [N, D], padding already left out, so a masked token gets no gradient at all.
"""

import torch
from torch import Tensor

FLOOR = 1e-6
"""A standard deviation is sqrt(variance + FLOOR * mean anchor variance), on both sides: its gradient stays finite."""


def w2_diagonal(rows: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of two Gaussians with diagonal covariance (AEGIS's anchor penalty).

    |mu - mean|^2 + |sigma - std|^2, with the population statistics mu, sigma [D] of `rows`. On a fresh batch of N
    independent rows of the anchor's own distribution it is about 1.5 * sum(variance) / N, not 0.

    Args:
        rows: [N, D].
        mean, variance: [D] of the anchor.
    """
    own_mean = rows.mean(0)
    return w2_of_moments(own_mean, (rows - own_mean).square().mean(0), mean, variance)


def w2_of_moments(own_mean: Tensor, own_variance: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """`w2_diagonal` of rows with this mean and variance [D]."""
    shift, spread = _gaps(own_mean, own_variance, mean, variance)
    return shift.square().sum() + spread.square().sum()


def w2_normalised(rows: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """As `w2_diagonal` with every channel in units of its anchor deviation, averaged over channels.

    A few channels of huge activation carry most of the plain distance; here all channels count alike.
    """
    own_mean = rows.mean(0)
    shift, spread = _gaps(own_mean, (rows - own_mean).square().mean(0), mean, variance)
    scale = (variance + FLOOR * variance.mean()).to(rows)
    return ((shift.square() + spread.square()) / scale).mean()


def tokens(rows: Tensor, reference: Tensor) -> Tensor:
    """Squared distance of each state from the frozen model's state of the same token, relative to their variance.

    Args:
        rows, reference: [N, D].
    """
    reference = reference.to(rows)
    spread = (reference - reference.mean(0)).square().mean().clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows - reference).square().mean() / spread


def _gaps(own_mean: Tensor, own_variance: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    floor = FLOOR * variance.mean()
    own_deviation = (own_variance + floor.to(own_mean)).sqrt()
    return own_mean - mean.to(own_mean), own_deviation - (variance + floor).sqrt().to(own_mean)
