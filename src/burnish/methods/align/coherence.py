"""How far the gradients of several alignment losses pull one way."""

from typing import Any

import torch
from torch import Tensor


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
