"""Draws and scores of batches of pairs, for any policy.

What is kept from training is scored on draws that are the same in every run and at every step: else figures of two runs
would not compare.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from burnish.core.progress import progress_bar
from burnish.core.seeding import derive_seed, generator
from burnish.core.types import Batch
from burnish.data.pairs import OutcomeData, Pair, PairData
from burnish.methods.prefer.draws import ScoreConfig, WeightedDraws, make_draws, weigh
from burnish.methods.prefer.losses import finite, margin
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


COMMON = ScoreConfig(draws=8)
"""How every run scores its held-out pairs, whatever it trains with."""
MOST = 64
"""Held-out pairs that are scored."""
EVERY = 50
"""Steps between two measurements."""
_BATCH = 16


def split(pairs: Sequence[Pair], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pairs to train on and to hold out; no episode is on both sides.

    Which ones follows from the pairs alone, so that runs hold out the same. Where all pairs hang together none is.
    """
    group: dict[int, int] = {}

    def root(episode: int) -> int:
        while group.setdefault(episode, episode) != episode:
            episode = group[episode]
        return episode

    for pair in pairs:
        group[root(pair.chosen[0])] = root(pair.rejected[0])
    of = np.array([root(pair.chosen[0]) for pair in pairs])
    held = np.zeros(len(pairs), bool)
    for one in sorted(set(of.tolist()), key=lambda episode: derive_seed("held out", episode)):
        more = held | (of == one)
        if more.sum() <= share * len(pairs):
            held = more
    return np.flatnonzero(~held), np.flatnonzero(held)


class HeldOut:
    """Margins of some pairs against the policy as it is now, which is the start of a run."""

    def __init__(self, policy: Policy, data: PairData, ids: Sequence[int]):
        self.data, self.ids = data, [int(i) for i in ids[:MOST]]
        self.config = score_config(policy, COMMON)
        self.start = self._scores(policy)

    def figures(self, policy: Policy) -> dict[str, float]:
        """Mean margin, share with the right sign, and mean change of the chosen score against the start."""
        now = self._scores(policy)
        found = margin(now, self.start)
        right = (found > 0).double() + 0.5 * (found == 0).double()
        return {
            "held_out_margin": float(found.mean()), "held_out_accuracy": float(right.mean()),
            "held_out_displacement": float((now - self.start)[:, 0].mean()),
        }  # fmt: skip

    @torch.no_grad()
    def _scores(self, policy: Policy) -> Tensor:
        """[H, 2]."""
        device, found = next(policy.parameters()).device, []
        for first in range(0, len(self.ids), _BATCH):
            ids = self.ids[first : first + _BATCH]
            batch, candidates = self.data.batch(ids)
            moved: Batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            draws = pair_draws(policy, self.config, policy_seeds(0, ids, [0] * len(ids))).to(device)
            per_draw = policy.scores(moved, candidates.to(device), draws.draws)
            valid = counts(batch, candidates).to(device)
            found.append(weighted(per_draw, draws.weight, self.config, valid).mean(-1).float().cpu())
        return torch.cat(found)
