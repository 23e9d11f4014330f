"""How far the gradients of several alignment losses pull one way."""

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
