"""Does the distance to the training set predict failure? The area under the curve, with an interval over episodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from burnish.evaluate.records import Record
from burnish.evaluate.stats import LEVEL, RESAMPLES


@dataclass(frozen=True)
class Watched:
    """Episodes of one policy.

    Args:
        trials: [n] what an episode is paired on between policies, e.g. task and initial state.
        failed: bool [n].
        scores: [n] higher where failure is expected.
    """

    trials: Sequence[Any]
    failed: np.ndarray
    scores: np.ndarray


def watched(records: Sequence[Record]) -> Watched:
    """The largest distance of every episode."""
    scores = np.array([max(record.distances) for record in records])
    return Watched([record.key for record in records], np.array([not record.success for record in records]), scores)


def auc(scores: np.ndarray, failed: np.ndarray, often: np.ndarray | None = None) -> np.ndarray:
    """P(score of a failure > score of a success) + P(equal) / 2; with counts `often` [R, n] of the episodes, [R].

    A count without a failure or without a success says nothing: 0.5.
    """
    often = np.ones((1, len(failed))) if often is None else often
    bad, good = often[:, failed], often[:, ~failed]
    order = (np.sign(scores[failed][:, None] - scores[~failed][None]) + 1) / 2
    pairs = bad.sum(1) * good.sum(1)
    return np.where(pairs > 0, (bad @ order * good).sum(1) / np.maximum(pairs, 1), 0.5)


def failure_auc(groups: Sequence[Watched]) -> tuple[float, float, float] | None:
    """The mean over policies of `auc`, and its 95 % interval; None where no policy both fails and succeeds.

    Distances of two policies are not compared with one another. Trials are resampled, each with its episodes under all
    policies (percentile bootstrap).
    """
    groups = [one for one in groups if 0 < one.failed.sum() < len(one.failed)]
    if not groups:
        return None
    place = {trial: i for i, trial in enumerate(dict.fromkeys(t for one in groups for t in one.trials))}
    n = len(place)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES // 10).astype(float)
    drawn = [auc(one.scores, one.failed, counts[:, [place[t] for t in one.trials]]) for one in groups]
    value = float(np.mean([auc(one.scores, one.failed)[0] for one in groups]))
    low, high = np.quantile(np.mean(drawn, 0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, min(float(low), value), max(float(high), value)


def figures(outcomes: Mapping[str, str]) -> dict[str, Any]:
    """What follows from the episodes that a row keeps, by policy, as "LOOK.STATE=SUCCESS LARGEST FIRST; ...".

    AUC of the largest distance as mean and interval, and beside it that of the first calls, of as many for every
    episode. One initial state under several looks is resampled as one.
    """
    kept = [[part.replace("=", " ").split() for part in one.split("; ")] for one in outcomes.values()]
    failed = [np.array([part[1] == "0" for part in one]) for one in kept]
    largest, first = (
        failure_auc([Watched([part[0].rpartition(".")[2] for part in one], bad,
                             np.array([float(part[column]) for part in one]))
                     for one, bad in zip(kept, failed, strict=True)]) or (0.5, 0.0, 1.0)
        for column in (2, 3)
    )  # fmt: skip
    every = np.concatenate(failed)
    return {"n": len(every), "mean": largest[0], "interval": list(largest[1:]), "success_rate": 1 - every.mean().item(),
            "first_calls": "{:.2f} [{:.2f}, {:.2f}]".format(*first)}  # fmt: skip
