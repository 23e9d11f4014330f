"""Do intervals of studies hold what they promise? Simulated: how often the interval of a difference holds the truth.

Two equal variants on the same initial states: every state has a difficulty that both share, every training seed of each
a shift of its own. The true difference is zero.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import norm

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.evaluate.stats import LEVEL, two_way
from workshop import stamped

SPREADS = (0.0, 2.0, 4.0, 6.0)
"""Standard deviations of the true success rates of training seeds, in points."""
SEEDS = (3, 5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop coverage --output results/stats/coverage.json"
    parser.add_argument("--tables", type=int, default=4000, help="simulated studies for each setting")
    parser.add_argument("--states", type=int, default=200, help="initial states")
    parser.add_argument("--output", default="results/stats/coverage.json", help="result file")


def main(args: argparse.Namespace) -> int:
    if args.tables < 10 or args.states < 2:
        raise BurnishError(f"{args.tables} tables of {args.states} states", "at least 10 of 2")
    figures: dict[str, float] = {}
    for seeds in SEEDS:
        for spread in SPREADS:
            rng = np.random.default_rng(seeds * 1000 + int(10 * spread))
            tables = [differences(rng, seeds, args.states, spread / 100) for _ in range(args.tables)]
            found = [two_way(table) for table in tables]
            name = f"{seeds}_seeds_spread_{spread:g}_points"
            figures[f"two_way_{name}_covered_share"] = float(np.mean([one.low <= 0 <= one.high for one in found]))
            boot = [crossed_bootstrap(table, rng) for table in tables[: args.tables // 4]]
            figures[f"bootstrap_{name}_covered_share"] = float(np.mean([low <= 0 <= high for low, high in boot]))
    targets = {name: "93 to 97 %" for name in figures if name.startswith("two_way")}
    write_json(Path(args.output), stamped(f"python -m workshop coverage --tables {args.tables} --states {args.states}",
                                             n=args.tables, figures=figures, targets=targets))  # fmt: skip
    for name, value in figures.items():
        print(f"{name}: {100 * value:.1f} %")
    return 0


def differences(rng: np.random.Generator, seeds: int, states: int, spread: float) -> np.ndarray:
    """[seeds, states] of -1, 0 and 1: two equal variants, about three quarters of the trials solved."""
    difficulty = rng.normal(0.9, 1.0, states)
    density = float(norm.pdf(0.9 / np.sqrt(2)) / np.sqrt(2))  # points of success for each unit of shift
    shifts = rng.normal(0, spread / density, (2, seeds, 1))
    solved = difficulty + shifts + rng.normal(size=(2, seeds, states)) > 0
    return solved[1].astype(float) - solved[0]


def crossed_bootstrap(table: np.ndarray, rng: np.random.Generator, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of the pigeonhole bootstrap over seeds and states (Owen 2007), row means moved apart first."""
    k, n = table.shape
    table = table + (table.mean(1, keepdims=True) - table.mean()) * (np.sqrt(k / (k - 1)) - 1)
    rows = rng.multinomial(k, np.full(k, 1 / k), size=resamples)
    columns = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    low, high = np.quantile(((rows @ table) * columns).sum(1) / (k * n), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
