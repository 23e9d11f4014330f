"""The exact log-probability of chunks under a flow policy, and how well a surrogate orders them.

dx/dt = v(x, t) carries data (t = 0) to noise (t = 1), and d log p / dt = - div v along the way
(Chen et al. 2018, arXiv:1806.07366), so log p(x_0) = log N(x_1) + the integral of div v.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from burnish.core.types import Batch
from burnish.policies.base import Policy


def ode_scores(
    policy: Policy, batch: Batch, candidates: Tensor, *, steps: int = 32, probes: int = 0, seed: int = 0
) -> Tensor:
    """[B, C] log-probabilities of `candidates` [B, C, T, A] by the policy's own ODE.

    The density is that of the T x A normalised actions. Where the model is wider than A, its idle dimensions run on
    straight lines from one noise that all chunks share, as they do in training.

    Args:
        steps: of the midpoint rule.
        probes: 0 takes the exact divergence (T x A backward passes in one batch); otherwise that many random signs.
        seed: of probes and idle noise.
    """
    B, C, T, A = candidates.shape
    D = T * A
    generator = torch.Generator().manual_seed(seed)
    idle = policy.draw(1, generator).noise[0, :, A:].to(policy.device)  # [T, A_model - A]
    rows = {k: v if isinstance(v, list) else v.to(policy.device) for k, v in batch.items() if k != "action_is_pad"}
    clean = torch.stack([policy.to_model(rows, candidates[:, c])[..., :A] for c in range(C)], dim=1)
    repeated = {
        k: [item for item in v for _ in range(C)] if isinstance(v, list) else v.repeat_interleave(C, 0)
        for k, v in rows.items()
    }

    def velocity(points: Tensor, time: Tensor) -> Tensor:
        real = points.view(*points.shape[:2], T, A)
        beside = time[..., None, None] * idle
        return policy.velocity(repeated, torch.cat([real, beside], dim=-1), time)[..., :A].flatten(2)

    cotangents = signs(probes, D, generator) if probes else torch.eye(D)
    found = log_prob(velocity, clean.view(B * C, 1, D), cotangents.to(clean), steps, exact=not probes)
    return found.view(B, C)


def agreement(scores: Tensor, exact: Tensor) -> dict[str, float]:
    """How well `scores` order chunks [B, C] of one observation: rank correlation and share of right signs.

    Both are over differences of two chunks of one observation, which is all that a preference loss sees.
    """
    from scipy.stats import spearmanr

    C = scores.shape[1]
    i, j = torch.triu_indices(C, C, 1)
    ours, theirs = ((s[:, i] - s[:, j]).flatten().double().cpu() for s in (scores, exact))
    # An antisymmetric table: without both orders the correlation would depend on how candidates are numbered.
    both = torch.cat([ours, -ours]), torch.cat([theirs, -theirs])
    return {"rank_correlation": float(spearmanr(*(b.numpy() for b in both)).statistic),
            "sign_agreement": float((ours.sign() == theirs.sign()).double().mean())}  # fmt: skip


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
