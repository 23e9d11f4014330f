"""How well frames find their like: ranks of the first right neighbour, against chance.

Queries and keys are frames' vectors; what is right and what may not be found at all is said by two tables of truth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.evaluate.retrieval import figures

AT = (1, 5, 10)
"""k of recall@k."""


@dataclass(frozen=True)
class Found:
    """One split under one encoder.

    Args:
        ranks: int [Q] of the first right key, from 1; 0 where none is right.
        episodes: [Q] the query's episode.
        chance: [Q, len(AT)] probability that a right key is among the first k of a random order.
    """

    ranks: np.ndarray
    episodes: np.ndarray
    chance: np.ndarray


def first_right(queries: np.ndarray, keys: np.ndarray, right: np.ndarray, barred: np.ndarray) -> np.ndarray:
    """int [Q] rank of the nearest right key among those that are not barred, from 1; 0 where there is none.

    A key as near as the right one counts before it, so that vectors which are all alike are not right by chance.

    Args:
        queries, keys: [Q, D], [K, D].
        right, barred: bool [Q, K].
    """
    scores = np.where(barred, -np.inf, queries @ keys.T)
    right = right & ~barred
    nearest = np.where(right, scores, -np.inf).max(1, keepdims=True)
    ranks = (scores >= nearest).sum(1) - (right & (scores == nearest)).sum(1) + 1
    return np.where(right.any(1), ranks, 0)


def by_chance(right: np.ndarray, barred: np.ndarray, at: Sequence[int] = AT) -> np.ndarray:
    """[Q, len(at)] 1 - C(K - r, k) / C(K, k): of K keys that are not barred r are right."""
    allowed = (~barred).sum(1).astype(float)
    wrong = allowed - (right & ~barred).sum(1)
    found = np.zeros((len(right), len(at)))
    for place, k in enumerate(at):
        left = np.ones(len(right))
        for i in range(k):
            left *= np.clip((wrong - i) / np.maximum(allowed - i, 1), 0, 1)
        found[:, place] = np.where(wrong < allowed, 1 - left, 0)
    return found


def find(queries: np.ndarray, keys: np.ndarray, right: np.ndarray, barred: np.ndarray, episodes: np.ndarray) -> Found:
    """Ranks and chance of every query, see `first_right`; queries without a right key are left out."""
    some = (right & ~barred).any(1)
    if not some.any():
        raise BurnishError("no query has anything right to find", "tasks with two episodes among those held out")
    right, barred = right[some], barred[some]
    return Found(first_right(queries[some], keys, right, barred), episodes[some], by_chance(right, barred))


def ranks_row(label: str, split: str, seeds: dict[int, Found], **extra: Any) -> dict[str, Any]:
    """A line of a result: recall@1 with its interval over episodes, recall@5 and @10, median rank, chance of recall@1.

    Every query's rank is kept as `outcomes`: for each seed the ranks in order, a semicolon between episodes.
    """
    chance = np.concatenate([one.chance for one in seeds.values()]).mean(0)
    outcomes = {str(seed): text(one) for seed, one in seeds.items()}
    return {"label": label, "eval": split, **figures(outcomes), "chance_rate": float(chance[0]), **extra,
            "outcomes": outcomes}  # fmt: skip


def text(found: Found) -> str:
    """Ranks in order, with the number of each episode before its own: "12: 1 4 1; 15: 2 1"."""
    episodes, starts = np.unique(found.episodes, return_index=True)
    parts = np.split(found.ranks, np.sort(starts)[1:])
    numbers = found.episodes[np.sort(starts)]
    return "; ".join(f"{n}: {' '.join(map(str, part))}" for n, part in zip(numbers, parts, strict=True))


def shuffled(tasks: np.ndarray, episodes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The tasks [N] of frames with those of whole episodes permuted: the control that must come out at chance."""
    numbers, first, place = np.unique(episodes, return_index=True, return_inverse=True)
    return tasks[first][rng.permutation(len(numbers))][place]


def time_errors(
    vectors: np.ndarray, share: np.ndarray, tasks: np.ndarray, episodes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|t/T - t'/T'| of the nearest frame of another episode with the same task, its mean over all such frames, and the
    episode: [n] each, of the frames that have any.

    Args:
        vectors: [N, D].
        share: [N] t/T of each frame.
        tasks, episodes: [N].
    """
    allowed = (tasks[:, None] == tasks[None]) & (episodes[:, None] != episodes[None])
    some = allowed.any(1)
    nearest = np.where(allowed, vectors @ vectors.T, -np.inf).argmax(1)
    apart = np.abs(share[:, None] - share[None])
    chance = (apart * allowed).sum(1) / np.maximum(allowed.sum(1), 1)
    return np.abs(share - share[nearest])[some], chance[some], episodes[some]
