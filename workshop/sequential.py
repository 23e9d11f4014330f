"""What looking after every trial costs: the sequential test beside the fixed one, on simulated paired trials."""

import argparse
from functools import cache
from pathlib import Path

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.evaluate.sequential import sequential
from burnish.evaluate.stats import POWER, mcnemar
from workshop import stamped

EQUAL = ((0.5, 0.5), (0.9, 0.9))
APART = ((0.5, 0.9), (0.5, 0.8), (0.5, 0.7), (0.7, 0.85))
"""Success rates of A and B; outcomes of a pair are independent, which is the worst that pairing can do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop sequential --output results/stats/sequential.json"
    parser.add_argument("--runs", type=int, default=1000, help="simulated experiments for each pair of rates")
    parser.add_argument("--trials", type=int, default=500, help="paired trials at most")
    parser.add_argument("--output", default="results/stats/sequential.json", help="result file")


def main(args: argparse.Namespace) -> int:
    if min(args.runs, args.trials) < 10:
        raise BurnishError(f"{args.runs} runs of {args.trials} trials", "at least 10 of each")
    rng, figures = np.random.default_rng(0), {}
    for a, b in EQUAL:
        trials = draw(rng, args.runs, args.trials, a, b)
        name = f"equal_at_{100 * a:.0f}"
        wrong = [sequential(row).verdict in ("better", "worse") for row in trials]
        figures[f"{name}_false_positive_rate"] = float(np.mean(wrong))
        figures[f"{name}_every_look_false_positive_rate"] = float(np.mean([looked(row) for row in trials]))
    for a, b in APART:
        trials = draw(rng, args.runs, args.trials, a, b)
        name = f"{100 * a:.0f}_against_{100 * b:.0f}"
        found = [sequential(row) for row in trials]
        stops = [one.decided or args.trials for one in found]
        figures[f"{name}_power_rate"] = float(np.mean([one.verdict == "better" for one in found]))
        figures[f"{name}_mean_trials"] = float(np.mean(stops))
        figures[f"{name}_median_trials"] = float(np.median(stops))
        for power in (POWER, 0.98):
            figures[f"{name}_fixed_trials_for_{100 * power:.0f}"] = fixed_size(rng, a, b, power)
    targets = {name: "<= 5 %" for name in figures if name.startswith("equal") and "every" not in name}
    write_json(Path(args.output), stamped(f"python -m workshop sequential --runs {args.runs} --trials {args.trials}",
                                             n=args.runs, figures=figures, targets=targets))  # fmt: skip
    for name, value in figures.items():
        print(f"{name}: {value:.3g}")
    return 0


def draw(rng: np.random.Generator, runs: int, trials: int, a: float, b: float) -> np.ndarray:
    """[runs, trials] of B minus A in -1, 0, 1."""
    return (rng.random((runs, trials)) < b).astype(float) - (rng.random((runs, trials)) < a)


@cache
def most_losses(discordant: int) -> int:
    """The most pairs on the losing side with which McNemar's test of so many discordant pairs finds a difference."""
    return max((k for k in range(discordant // 2 + 1) if mcnemar(k, discordant - k) < 0.05), default=-1)


def differs(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """Whether McNemar's test finds a difference, for each pair of counts."""
    most = np.array([most_losses(n) for n in range(int((better + worse).max()) + 1)])
    return np.minimum(better, worse) <= most[better + worse]


def looked(row: np.ndarray) -> bool:
    """Whether McNemar's test, looked at after every trial, ever says that two policies differ."""
    return bool(differs(np.cumsum(row > 0), np.cumsum(row < 0)).any())


def fixed_size(rng: np.random.Generator, a: float, b: float, power: float) -> int:
    """The fewest paired trials (in steps of two) at which McNemar's test, looked at once, has this power."""
    for trials in range(8, 1000, 2):
        rows = draw(rng, 2000, trials, a, b)
        if np.mean(differs((rows > 0).sum(1), (rows < 0).sum(1))) >= power:
            return trials
    return 1000
