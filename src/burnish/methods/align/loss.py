"""The alignment loss, and how a grid of teacher tokens follows the student's moved image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment_loss(predicted_BTD: Tensor, target_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """1 minus the mean cosine over valid tokens, in float32; zero where no token is valid.

    Args:
        predicted_BTD: projected student states [B, T, D].
        target_BTD: teacher features [B, T, D].
        mask_BT: bool [B, T], False on tokens of absent cameras.
    """
    # A masked target may be NaN, and NaN times a zero gradient is NaN: it must not enter the cosine at all.
    target_BTD = target_BTD.float().masked_fill(~mask_BT[..., None], 0.0)
    cosine_BT = F.cosine_similarity(predicted_BTD.float(), target_BTD, dim=-1)
    return ((1 - cosine_BT) * mask_BT).sum() / mask_BT.sum().clamp_min(1)


def shift_grid(features_BHWD: Tensor, offsets_B2: Tensor, bounds: tuple[int, int, int, int] | None = None) -> Tensor:
    """Move token grids as the student's images were moved: place (r, c) reads place (r + rows, c + columns).

    Between tokens it is linear, at the border the outermost token is repeated.

    Args:
        features_BHWD: [B, H, W, D].
        offsets_B2: rows and columns in units of tokens, float [B, 2].
        bounds: first and last row, first and last column of the view, where it is padded; the padding does not move.
    """

    def weights(size: int, offset_B: Tensor, first: int, last: int) -> Tensor:
        """[B, size, size]: row r holds the two weights that read position r + offset."""
        place = torch.arange(size, device=offset_B.device)
        wanted = (place + offset_B[:, None]).clamp(first, last)
        return (1 - (wanted[:, :, None] - place).abs()).clamp_min(0)

    height, width = features_BHWD.shape[1:3]
    top, bottom, left, right = bounds or (0, height - 1, 0, width - 1)
    offsets = offsets_B2.to(features_BHWD)
    moved = torch.einsum("brh,bhwd->brwd", weights(height, offsets[:, 0], top, bottom), features_BHWD)
    return torch.einsum("bcw,brwd->brcd", weights(width, offsets[:, 1], left, right), moved)


def pairwise_cosine(gradients: list[Tensor]) -> Tensor:
    """[N, N] cosines of N gradients of equal shape; a zero gradient has cosine 0 with everything."""
    flat = torch.stack([g.detach().flatten().float() for g in gradients])
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return unit @ unit.T


def coherence(gradients: list[Tensor]) -> Tensor:
    """|sum of g| / sum of |g|: 1 all one way, 1 / sqrt(N) orthogonal, below that in conflict."""
    flat = torch.stack([g.detach().flatten().float() for g in gradients])
    return flat.sum(0).norm() / flat.norm(dim=1).sum().clamp_min(torch.finfo(flat.dtype).tiny)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two gradients of equal shape, 0 where one is zero."""
    return pairwise_cosine([a, b])[0, 1]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor  # not saved: it may still be set before the gradient comes
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor.to(grad), None


def scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """`value` itself, whose gradient is multiplied by what `factor`, a scalar tensor, holds when the gradient comes."""
    return _Scale.apply(value, factor)
