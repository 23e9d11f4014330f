"""Log-probability of a flow by its own ODE: the reference that surrogates are held against.

dx/dt = v(x, t) carries data (t = 0) to noise (t = 1), and d log p / dt = - div v along the way
(Chen et al. 2018, arXiv:1806.07366), so log p(x_0) = log N(x_1) + the integral of div v.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(points [B, R, D], time [B, R]) -> [B, R, D]; rows of one B share a condition and do not see each other."""


def log_prob(velocity: Velocity, x: Tensor, probes: Tensor, steps: int = 64, exact: bool = True) -> Tensor:
    """[B, C] log-probability of `x` under the flow.

    Args:
        velocity: the field, noise minus data.
        x: [B, C, D] data points, C for each condition.
        probes: [P, D] cotangents: `torch.eye(D)` with `exact`, rows of random signs (see `signs`) without, which
            is Hutchinson's unbiased estimate.
        steps: of the midpoint rule.

    The divergence takes P rows of one forward and one backward: row i of the batch gets cotangent i, so that its
    gradient is that row of the Jacobian.
    """
    total = x.new_zeros(x.shape[:2])
    h = 1 / steps
    for i in range(steps):
        half = x + h / 2 * _field(velocity, x, i * h)
        value, divergence = _field_and_divergence(velocity, half, (i + 0.5) * h, probes, exact)
        x, total = x + h * value, total + h * divergence
    D = x.shape[-1]
    return total - x.square().sum(-1) / 2 - D / 2 * math.log(2 * math.pi)


def signs(count: int, dimension: int, generator: torch.Generator) -> Tensor:
    """[count, dimension] random signs, for Hutchinson's estimate."""
    bits = torch.randint(0, 2, (count, dimension), generator=generator, device=generator.device)
    return bits.float() * 2 - 1


@torch.no_grad()
def _field(velocity: Velocity, x: Tensor, t: float) -> Tensor:
    return velocity(x, x.new_full(x.shape[:2], t))


def _field_and_divergence(
    velocity: Velocity, x: Tensor, t: float, probes: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    B, C, D = x.shape
    P = len(probes)
    points = x.detach()[:, :, None].expand(B, C, P, D).reshape(B, C * P, D).requires_grad_(True)
    with torch.enable_grad():
        value = velocity(points, points.new_full((B, C * P), t))
        cotangent = probes.to(value).expand(B, C, P, D).reshape(B, C * P, D)
        (rows,) = torch.autograd.grad(value, points, cotangent)
    along = (rows * cotangent).sum(-1).view(B, C, P)
    return value.detach().view(B, C, P, D)[:, :, 0], along.sum(-1) if exact else along.mean(-1)
