"""Draws and scores of batches of pairs, for any policy."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from burnish.core.progress import progress_bar
from burnish.core.seeding import generator
from burnish.core.types import Batch
from burnish.data.pairs import OutcomeData, PairData
from burnish.methods.prefer.draws import ScoreConfig, WeightedDraws, make_draws, weigh
from burnish.methods.prefer.losses import finite
from burnish.policies.base import Policy

ROWS_AT_ONCE = 256
"""Chunk steps behind one observation in a pass without gradient; the attention among them grows with the square."""


def pair_draws(policy: Policy, config: ScoreConfig, seeds: Sequence[tuple]) -> WeightedDraws:
    """The draws of a batch of pairs; `seeds` names those of each pair, equal seeds give equal draws.

    Returns:
        noise [B, K, ...]; or, where the config does not share draws, [B, 2, K, ...].
    """
    rows = [one_set(policy, config, *seed) for seed in seeds]
    return WeightedDraws.stack(rows)


def one_set(policy: Policy, config: ScoreConfig, *seed: object) -> WeightedDraws:
    """K draws, or 2 x K independent ones for chosen and rejected."""
    if not config.shared:
        return WeightedDraws.stack([_one(policy, config, *seed, side) for side in ("chosen", "rejected")])
    return _one(policy, config, *seed)


def _one(policy: Policy, config: ScoreConfig, *seed: object) -> WeightedDraws:
    random = generator("pair draws", *seed)
    return make_draws(policy.draw(config.draws, random), config, random)


def counts(batch: Batch, candidates: Tensor) -> Tensor:
    """[B, C] valid steps times action dimensions."""
    return (~batch["action_is_pad"]).sum(-1) * candidates.shape[-1]


def weighted(per_draw: Tensor, weight: Tensor, config: ScoreConfig, valid: Tensor) -> Tensor:
    """`draws.weigh` of [B, C, K] per-draw scores, as the config reduces them; `valid` is that of `counts`."""
    return weigh(per_draw, weight, valid.to(per_draw) if config.reduce == "mean" else None)


@torch.no_grad()
def reference_scores(
    policy: Policy, data: PairData | OutcomeData, config: ScoreConfig, pool: int, seed: int, batch_size: int = 16,
    progress: bool = True,
) -> Tensor:  # fmt: skip
    """[N, pool, 2, K] weighted scores (see `weighted`) of all pairs on all sets of draws, by the policy as it is."""
    device = next(policy.parameters()).device
    together = max(1, ROWS_AT_ONCE // (2 * config.draws * data.chunk_size))
    found = torch.empty(len(data), pool, 2, config.draws)
    for first in progress_bar(range(0, len(data), batch_size), desc="reference scores", unit="batch", shown=progress):
        ids = range(first, min(first + batch_size, len(data)))
        batch, candidates = data.batch(ids)
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        valid = counts(batch, candidates)
        for slot in range(0, pool, together):
            slots = range(slot, min(slot + together, pool))
            sets = [pair_draws(policy, config, reference_seeds(config, seed, ids, [s] * len(ids))) for s in slots]
            axis = 1 if config.shared else 2
            draws = WeightedDraws(
                type(sets[0].draws)(*(torch.cat([getattr(s.draws, n) for s in sets], axis) for n in ("noise", "time"))),
                torch.cat([s.weight for s in sets], -1),
            ).to(device)
            per_draw = policy.scores(batch, candidates.to(device), draws.draws)
            for i, s in enumerate(slots):
                part = slice(i * config.draws, (i + 1) * config.draws)
                scores = weighted(per_draw[..., part], draws.weight[..., part], config, valid.to(device))
                found[first : first + len(ids), s] = scores.cpu()
    finite(found, f"reference on the pairs of {data.root}")
    return found


def score_config(policy: Policy, config: ScoreConfig) -> ScoreConfig:
    """The config as it applies to this policy: times, weights and antithetic noise mean something to flows only.

    A policy whose score is exact needs one draw, which it does not look at.
    """
    if policy.supports("velocity"):
        return config
    draws = 1 if policy.supports("likelihood") else config.draws
    return replace(
        config, draws=draws, times="policy", fixed_times=(), weight="uniform", stratified=False, antithetic=False
    )


def policy_seeds(seed: int, ids: Sequence[int], slots: Sequence[int]) -> list[tuple]:
    return [(seed, int(i), int(slot)) for i, slot in zip(ids, slots, strict=True)]


def reference_seeds(config: ScoreConfig, seed: int, ids: Sequence[int], slots: Sequence[int]) -> list[tuple]:
    """The policy's own, unless nothing is to be shared."""
    own = policy_seeds(seed, ids, slots)
    return own if config.shared else [("reference", *s) for s in own]
