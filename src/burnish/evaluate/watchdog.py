"""Does the distance to the training set predict failure? The area under the curve, with an interval over episodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

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


def auc(scores: np.ndarray, failed: np.ndarray) -> float:
    """P(score of a failure > score of a success) + P(equal) / 2, by the sum of ranks (Mann and Whitney 1947)."""
    bad = int(failed.sum())
    return float((rankdata(scores)[failed].sum() - bad * (bad + 1) / 2) / (bad * (len(failed) - bad)))


def failure_auc(groups: Sequence[Watched]) -> tuple[float, float, float] | None:
    """The mean over policies of `auc`, and its 95 % interval; None where no policy both fails and succeeds.

    Distances of two policies are not compared with one another. Trials are resampled, each with its episodes under all
    policies (percentile bootstrap).
    """
    groups = [one for one in groups if 0 < one.failed.sum() < len(one.failed)]
    if not groups:
        return None
    value = float(np.mean([auc(one.scores, one.failed) for one in groups]))
    numbers = {trial: place for place, trial in enumerate(dict.fromkeys(t for one in groups for t in one.trials))}
    n = len(numbers)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES // 10).astype(float)
    drawn = []
    for one in groups:
        often = counts[:, [numbers[trial] for trial in one.trials]]
        bad, good = often[:, one.failed], often[:, ~one.failed]
        apart = one.scores[one.failed][:, None] - one.scores[~one.failed][None]
        pairs = bad.sum(1) * good.sum(1)
        drawn.append(np.where(pairs > 0, ((bad @ ((np.sign(apart) + 1) / 2)) * good).sum(1), np.nan)
                     / np.maximum(pairs, 1))  # fmt: skip
    found = np.stack(drawn)
    means = np.nanmean(found[:, ~np.isnan(found).all(0)], 0)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, min(float(low), value), max(float(high), value)


def text(records: Sequence[Record]) -> str:
    """What a result keeps of episodes: "camera.12=0 0.31 0.24; ..." says of initial state 12 under the camera whether
    it succeeded, its largest distance, and the largest of as many first calls as the shortest of all episodes has."""
    first = min(len(record.distances) for record in records)
    parts = [f"{r.task.partition('+')[2] or 'plain'}.{r.initial_state}={int(r.success)} {max(r.distances):.4g} "
             f"{max(r.distances[:first]):.4g}" for r in records]  # fmt: skip
    return "; ".join(parts)


def figures(outcomes: Mapping[str, str]) -> dict[str, Any]:
    """What follows from the episodes that a row keeps, by policy: AUC as mean and interval, and beside it that of the
    first calls, in which no episode has had more occasions than another."""
    largest, first = [], []
    for kept in outcomes.values():
        parts = [part.replace("=", " ").split() for part in kept.split("; ")]
        trials, failed = [part[0] for part in parts], np.array([part[1] == "0" for part in parts])
        largest.append(Watched(trials, failed, np.array([float(part[2]) for part in parts])))
        first.append(Watched(trials, failed, np.array([float(part[3]) for part in parts])))
    value, *ends = failure_auc(largest) or (0.5, 0.0, 1.0)
    early = failure_auc(first)
    return {
        "n": sum(len(one.failed) for one in largest), "mean": value, "interval": ends,
        "first_calls": "{:.2f} [{:.2f}, {:.2f}]".format(*early) if early else "",
        "success_rate": 1 - float(np.concatenate([one.failed for one in largest]).mean()),
    }  # fmt: skip
