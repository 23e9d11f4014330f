"""What follows from the ranks of retrieval; intervals are over episodes, whose frames are not independent."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from burnish.evaluate.stats import paired_interval


def figures(outcomes: Mapping[str, str]) -> dict[str, Any]:
    """What follows from the ranks that a row keeps."""
    parts = {seed: [part.split(": ") for part in ranks.split("; ")] for seed, ranks in outcomes.items()}
    ranks = [np.array([int(r) for _, some in one for r in some.split()]) for one in parts.values()]
    episodes = [np.repeat([int(n) for n, _ in one], [len(some.split()) for _, some in one]) for one in parts.values()]
    every = np.concatenate(ranks)
    hits, n = int((every == 1).sum()), len(every)
    low, high = over_episodes([some == 1 for some in ranks], episodes)
    return {
        "n": n, "successes": hits, "rate": hits / n, "interval": [min(low, hits / n), max(high, hits / n)],
        "recall@5_rate": float((every <= 5).mean()), "recall@10_rate": float((every <= 10).mean()),
        "median_rank": float(np.median(every)), "by_seed": [float((some == 1).mean()) for some in ranks],
    }  # fmt: skip


def over_episodes(values: Sequence[np.ndarray], episodes: Sequence[np.ndarray]) -> tuple[float, float]:
    """95 % interval of the mean: episodes are resampled, each with its mean over its queries and seeds.

    Where all episodes are alike it is Wilson's bound for their number.
    """
    flat, which = np.concatenate(values).astype(float), np.concatenate(episodes)
    _, place = np.unique(which, return_inverse=True)
    means = np.bincount(place, flat) / np.bincount(place)
    low, high = paired_interval(means, np.random.default_rng(0))
    return max(0.0, low), high
