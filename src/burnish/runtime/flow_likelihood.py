"""The exact log-probability of chunks under a flow policy, and how well a surrogate orders them."""

import torch
from torch import Tensor

from burnish.core.types import Batch
from burnish.policies.base import Policy
from burnish.runtime.ode import log_prob, signs


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
