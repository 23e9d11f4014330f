"""Penalties that keep a merged task vector gamma while the policy is fine-tuned. Pure: tensors in, tensors out.

D is how far each parameter has moved from the merged model. The paper asks for <gamma, D> = 0 in a matrix (eq. 6) but
adds the weighted L1 (eq. 7), which is another thing: it pins every coordinate whose loss gradient is below
weight * |gamma|, whatever its direction, and only bounds the inner product from above.

    l1          sum |gamma_ij D_ij|            (CapVector, arXiv:2605.10903, eq. 7)
    ewc         sum |gamma_ij| D_ij^2
    projection  sum_p <gamma_p / |gamma_p|, D_p>^2        (eq. 6, squared)
    cosine      sum_p |<gamma_p, D_p>| / (|gamma_p| |D_p|)
    l2          sum D_ij^2                     (gamma plays no part: the control)

The first two are sums over elements. The others follow from three scalar products of a matrix, and their gradient is
a gamma + b D; with D = s B A of an adapter neither needs the product itself.
"""

import torch
from torch import Tensor

ELEMENTWISE = ("l1", "ewc")
PENALTIES = (*ELEMENTWISE, "projection", "cosine", "l2")
_TINY = 1e-12


def products(gamma: Tensor, moved: Tensor) -> Tensor:
    """float64 [3]: <gamma, D>, |gamma|^2 and |D|^2 of a block; those of a matrix are the sums over its blocks."""
    g, d = gamma.reshape(-1), moved.reshape(-1)
    return torch.stack([torch.dot(g, d), torch.dot(g, g), torch.dot(d, d)]).double()


def elementwise(kind: str, gamma: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """(value, gradient by D) of a block under a penalty of ELEMENTWISE; the value is float64."""
    size = gamma.abs()
    if kind == "l1":
        return torch.dot(size.reshape(-1), moved.abs().reshape(-1)).double(), size.mul_(moved.sign())
    pull = size.mul_(moved)
    return torch.dot(pull.reshape(-1), moved.reshape(-1)).double(), pull.mul_(2.0)


def coefficients(kind: str, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(value, a, b) of a matrix under another penalty, float64: its gradient by D is a gamma + b D.

    Args:
        kind: projection, cosine or l2.
        sums: see `products`, of the whole matrix. A vector of zeros has no direction, and at D = 0 the cosine has no
            value: both count as 0, with gradient 0.
    """
    along, square, moved = sums
    nothing = torch.zeros_like(along)
    if kind == "l2":
        return moved, nothing, nothing + 2
    if kind == "projection":
        safe = square.masked_fill(square == 0, 1.0)
        return along.square() / safe, 2 * along / safe, nothing
    both = (square * moved).sqrt()
    alive = both > _TINY
    safe = both.clamp_min(_TINY)
    value, a = along.abs() / safe, along.sign() / safe
    b = -along.abs() / (safe * moved.clamp_min(_TINY))
    return value * alive, a * alive, b * alive


def pinned(grad: Tensor, gamma: Tensor, weight: Tensor | float) -> Tensor:
    """How many coordinates the L1 penalty holds fast: |loss gradient| below weight * |gamma| (scalar)."""
    return (grad.abs() < weight * gamma.abs()).sum()
