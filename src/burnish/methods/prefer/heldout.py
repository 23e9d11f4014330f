"""Pairs that are kept from training, scored on draws that are the same in every run and at every step.

What a run says of the pairs that it trains on, on draws of its own, compares neither with another run nor with itself.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from burnish.core.seeding import derive_seed
from burnish.core.types import Batch
from burnish.data.pairs import Pair, PairData
from burnish.methods.prefer.draws import ScoreConfig
from burnish.methods.prefer.losses import margin
from burnish.methods.prefer.scoring import counts, pair_draws, policy_seeds, score_config, weighted
from burnish.policies.base import Policy

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
