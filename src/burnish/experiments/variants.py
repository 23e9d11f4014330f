"""Variants of a recipe, trained with several seeds and measured on the same trials: one table, one row for each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.evaluate.records import Record
from burnish.evaluate.results import read_results
from burnish.evaluate.stats import crossed_bootstrap, wilson

Trials = dict[int, dict[Any, float]]
"""Training seed to trial to outcome; a trial is an initial state or a question."""


def read_successes(evaluations: Mapping[int, Path]) -> Trials:
    """Success of every episode of one variant at what it was told; `evaluations` maps a training seed to its folder.

    Under an instruction swap that is the task with the newly named object.
    """

    def told(record: Record) -> float:
        return float(record.success if record.other_success is None else record.other_success)

    return {seed: {r.key: told(r) for r in read_results(folder)} for seed, folder in evaluations.items()}


def variant_rows(variants: Mapping[str, Trials], reference: str, **extra: Any) -> list[dict[str, Any]]:
    """Rows of a result: rate and interval of each variant; its difference from the reference, paired on seed and trial.

    Intervals hold over seeds and trials (`stats.crossed_bootstrap`); with one seed they hold over trials alone. Where
    all outcomes are equal they are Wilson's for the number of trials.

    Args:
        variants: name to trials; those without any seed are left out.
        reference: the one that the others are compared with.
        extra: further columns, the same in every row.

    Every row keeps its raw outcomes: for each seed a text of 0 and 1, trials in the order of their keys.

    Raises:
        BurnishError: two seeds of a variant, or a variant and the reference, share no trial.
    """
    rows = []
    for name, trials in variants.items():
        if not trials:
            continue
        table = _table([trials], name)[0]
        low, high = _interval(table)
        row: dict[str, Any] = {
            "label": name, **extra, "n": table.size, "successes": int(table.sum()), "rate": float(table.mean()),
            "interval": [low, high], "by_seed": [float(rate) for rate in table.mean(1)],
            "outcomes": {str(seed): _string(run) for seed, run in trials.items()},
        }  # fmt: skip
        shared = trials.keys() & variants.get(reference, {}).keys()
        if name != reference and shared:
            ours, theirs = _table([_only(trials, shared), _only(variants[reference], shared)], name)
            difference = ours - theirs
            row["minus_reference"] = [float(difference.mean()), *_interval(difference, -1.0)]
        rows.append(row)
    return rows


def _string(run: Mapping[Any, float]) -> str:
    return "".join("01"[run[key] > 0.5] for key in sorted(run, key=str))


def _only(trials: Trials, seeds: set[int]) -> Trials:
    return {seed: trials[seed] for seed in sorted(seeds)}


def _table(variants: Sequence[Trials], name: str) -> list[np.ndarray]:
    """[seeds, trials] of each variant, on the trials that all of their runs have in common."""
    runs = [run for trials in variants for run in trials.values()]
    shared = [key for key in runs[0] if all(key in run for run in runs)]
    if not shared:
        raise BurnishError(f"the runs of variant '{name}' share no trial", "the same initial states in every run")
    return [np.array([[run[key] for key in shared] for run in trials.values()]) for trials in variants]


def _interval(table: np.ndarray, least: float = 0.0) -> tuple[float, float]:
    """95 % interval of the mean of [seeds, trials] of outcomes from `least` to 1. Where all are equal resampling knows
    no spread; then Wilson's bound for that many trials says how much may have gone unseen."""
    mean = float(table.mean())
    if np.ptp(table) > 0:
        low, high = crossed_bootstrap(table, np.random.default_rng(0))
        return min(low, mean), max(high, mean)
    unseen = wilson(0, table.shape[1]).high
    return max(least, mean - unseen), min(1.0, mean + unseen)
