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
    shift, spread = _gaps(rows, mean, variance)
    return shift.square().sum() + spread.square().sum()


def w2_normalised(rows: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """As `w2_diagonal` with every channel in units of its anchor deviation, averaged over channels.

    A few channels of huge activation carry most of the plain distance; here all channels count alike.
    """
    shift, spread = _gaps(rows, mean, variance)
    scale = (variance + FLOOR * variance.mean()).to(rows)
    return ((shift.square() + spread.square()) / scale).mean()


def bures(rows: Tensor, mean: Tensor, covariance: Tensor, rank: int = 0) -> Tensor:
    """Squared 2-Wasserstein distance of two Gaussians with full covariance.

    |mu - mean|^2 + tr(S) + tr(S0) - 2 tr((S0^1/2 S S0^1/2)^1/2). Unlike the diagonal forms it sees rotations of the
    states that leave every channel's mean and variance as they are.

    Args:
        rows: [N, D]; N may be below D.
        mean: [D] of the anchor.
        covariance: [D, D] of the anchor.
        rank: keep only so many leading eigenvectors of the anchor; 0 keeps all. What lies outside of them is compared
            by its total variance alone.
    """
    anchor = covariance.to(rows.dtype)
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(anchor)
    kept = slice(-rank, None) if 0 < rank < len(values) else slice(None)
    root = vectors[:, kept] * values[kept].clamp_min(0).sqrt()  # [D, r], S0 restricted is root root^T
    # tr((S0^1/2 S S0^1/2)^1/2) is the sum of the singular values of X root / sqrt(N), for S = X^T X / N.
    product = centred @ root / len(rows) ** 0.5
    gram = product.mT @ product
    floor = FLOOR * anchor.diagonal().mean().square()
    squares = torch.linalg.eigvalsh(gram + floor * torch.eye(len(gram), device=rows.device, dtype=rows.dtype))
    overlap = squares.clamp_min(floor).sqrt()  # beside a large eigenvalue, rounding takes small ones below zero
    shift = (rows.mean(0) - mean.to(rows)).square().sum()
    total, total_anchor = centred.square().sum() / len(rows), anchor.diagonal().sum()
    inside, inside_anchor = (centred @ vectors[:, kept]).square().sum() / len(rows), values[kept].clamp_min(0).sum()
    rest = _root(total - inside, floor) - _root(total_anchor - inside_anchor, floor)
    return shift + inside + inside_anchor - 2 * overlap.sum() + rest.square()


def tokens(rows: Tensor, reference: Tensor) -> Tensor:
    """Squared distance of each state from the frozen model's state of the same token, relative to their variance.

    Args:
        rows, reference: [N, D].
    """
    reference = reference.to(rows)
    spread = (reference - reference.mean(0)).square().mean().clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows - reference).square().mean() / spread


def _gaps(rows: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    floor = FLOOR * variance.mean()
    own_mean = rows.mean(0)
    own_deviation = ((rows - own_mean).square().mean(0) + floor.to(rows)).sqrt()
    return own_mean - mean.to(rows), own_deviation - (variance + floor).sqrt().to(rows)


def _root(value: Tensor, floor: Tensor) -> Tensor:
    return (value.clamp_min(0) + floor.sqrt()).sqrt()
