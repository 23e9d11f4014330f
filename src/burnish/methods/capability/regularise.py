"""Penalties that keep a merged task vector gamma while the policy is fine-tuned. Pure: tensors in, tensors out.

D is how far each parameter has moved from the merged model. The paper asks for <gamma, D> = 0 in a matrix (eq. 6) but
adds the weighted L1 (eq. 7), which is another thing: it pins every coordinate whose loss gradient is below
weight * |gamma|, whatever its direction, and only bounds the inner product from above.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PENALTIES = ("l1", "projection", "cosine", "ewc", "l2")
_TINY = 1e-12


def penalty(kind: str, gammas: Sequence[Tensor], moved: Sequence[Tensor]) -> Tensor:
    """The penalty of D = `moved` (parameters or products) as a scalar with gradient, summed over matrices p.

    l1          sum |gamma_ij D_ij|            (CapVector, arXiv:2605.10903, eq. 7)
    projection  sum_p <gamma_p / |gamma_p|, D_p>^2        (eq. 6, squared)
    cosine      sum_p |<gamma_p, D_p>| / (|gamma_p| |D_p|)
    ewc         sum |gamma_ij| D_ij^2
    l2          sum D_ij^2                     (gamma plays no part: the control)

    Value and gradient are computed together, all matrices in one call of each kernel; sums are in float32.

    Args:
        kind: one of PENALTIES.
        gammas: the vector, a float32 tensor for each of `moved`.
        moved: D, in the shapes of `gammas`.
    """
    return _Penalty.apply(kind, list(gammas), *moved)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind: str, gammas: list[Tensor], *moved: Tensor) -> Tensor:
        moved = [d.detach().float() for d in moved]
        value, grads = _VALUE_AND_GRADIENT[kind](gammas, moved)
        ctx.grads = grads
        return value

    @staticmethod
    def backward(ctx, up: Tensor) -> tuple:
        return None, None, *torch._foreach_mul(ctx.grads, up)


def _l1(gammas: list[Tensor], moved: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    size = torch._foreach_abs(gammas)
    products = torch._foreach_mul(gammas, moved)
    torch._foreach_mul_(size, torch._foreach_sign(moved))
    return torch.stack(torch._foreach_norm(products, 1)).sum(), size


def _projection(gammas: list[Tensor], moved: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    square = torch._foreach_pow(torch._foreach_norm(gammas), 2)
    square = [s.masked_fill(s == 0, 1.0) for s in square]  # a matrix of zeros has no direction
    along = inner_products(gammas, moved)
    grads = [g * (2 * a / s) for g, a, s in zip(gammas, along, square, strict=True)]
    return (along.square() / torch.stack(square)).sum(), grads


def _cosine(gammas: list[Tensor], moved: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    # At D = 0 the cosine has no value; it counts as 0 there, with gradient 0.
    along = inner_products(gammas, moved)
    length = torch.stack(torch._foreach_norm(moved))
    both = torch.stack(torch._foreach_norm(gammas)) * length
    safe = both.clamp_min(_TINY)
    alive = (both > _TINY).float()
    value = (along.abs() / safe * alive).sum()
    a = along.sign() / safe * alive
    b = along.abs() / (safe * length.square().clamp_min(_TINY)) * alive
    grads = [g * a[k] - d * b[k] for k, (g, d) in enumerate(zip(gammas, moved, strict=True))]
    return value, grads


def _ewc(gammas: list[Tensor], moved: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    grads = torch._foreach_mul(torch._foreach_abs(gammas), moved)
    value = inner_products(grads, moved).sum()
    return value, torch._foreach_mul(grads, 2.0)


def _l2(gammas: list[Tensor], moved: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    squares = torch._foreach_pow(torch._foreach_norm(moved), 2)
    return torch.stack(squares).sum(), torch._foreach_mul(moved, 2.0)


_VALUE_AND_GRADIENT = {"l1": _l1, "projection": _projection, "cosine": _cosine, "ewc": _ewc, "l2": _l2}


def inner_products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a_p, b_p> of each pair, [P]."""
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)])


def project_out(grads: Sequence[Tensor], gammas: Sequence[Tensor]) -> list[Tensor]:
    """Gradients without their part along gamma, matrix by matrix: g - <g, gamma> gamma / |gamma|^2.

    A plain SGD step then leaves <gamma, D> as it is. Adam rescales coordinates one by one, so under it this holds only
    roughly.
    """
    square = torch.stack(torch._foreach_norm(list(gammas))).square()
    square = square.masked_fill(square == 0, 1.0)
    share = inner_products(grads, gammas) / square
    return [g - gamma * share[k] for k, (g, gamma) in enumerate(zip(grads, gammas, strict=True))]


def pinned(grads: Sequence[Tensor], gammas: Sequence[Tensor], moved: Sequence[Tensor], weight: float) -> Tensor:
    """Share of coordinates that the L1 penalty holds fast: |loss gradient| below weight * |gamma| (scalar).

    Args:
        grads: gradients of loss and penalty together.
        gammas, moved: as for `penalty`.
        weight: of the penalty.
    """
    held, total = [], 0
    for g, gamma, d in zip(grads, gammas, moved, strict=True):
        force = weight * gamma.abs()
        held.append(((g - force * d.sign()).abs() < force).sum())
        total += g.numel()
    return torch.stack(held).sum() / max(1, total)
