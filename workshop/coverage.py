"""Do intervals of studies hold what they promise? Simulated: how often the interval of a difference holds the truth.

Two equal variants on the same initial states: every state has a difficulty that both share and a part that is each
variant's own (other policies find other states hard), every training seed of each a shift of its own.
"""

import argparse
from pathlib import Path

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.evaluate.stats import LEVEL, two_way
from workshop import stamped

SPREADS = (0.0, 2.0, 4.0, 6.0)
"""Standard deviations of the true success rates of training seeds, in points."""
SEEDS = (3, 5)
OWN = 10.0
"""Standard deviation over states, in points, of what is a variant's own; the table ends with none at all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop coverage --output results/stats/coverage.json"
    parser.add_argument("--tables", type=int, default=4000, help="simulated studies for each setting")
    parser.add_argument("--states", type=int, default=200, help="initial states")
    parser.add_argument("--output", default="results/stats/coverage.json", help="result file")


def main(args: argparse.Namespace) -> int:
    if args.tables < 10 or args.states < 2:
        raise BurnishError(f"{args.tables} tables of {args.states} states", "at least 10 of 2")
    figures: dict[str, float] = {}
    for seeds, spread, own in [*((k, s, OWN) for k in SEEDS for s in SPREADS), *((k, 0.0, 0.0) for k in SEEDS)]:
        rng = np.random.default_rng(int(seeds * 1000 + 10 * spread + own))
        tables = [differences(rng, seeds, args.states, spread / 100, own / 100) for _ in range(args.tables)]
        found = [two_way(table) for table in tables]
        name = f"{seeds}_seeds_spread_{spread:g}{'' if own else '_states_alike'}"
        figures[f"{name}_two_way_share"] = float(np.mean([one.low <= 0 <= one.high for one in found]))
        boot = [crossed_bootstrap(table, rng) for table in tables[: args.tables // 4]]
        figures[f"{name}_bootstrap_share"] = float(np.mean([low <= 0 <= high for low, high in boot]))
    targets = {name: "93 to 97 %" for name in figures if "two_way" in name and "alike" not in name}
    write_json(Path(args.output), stamped(f"python -m workshop coverage --tables {args.tables} --states {args.states}",
                                          n=args.tables, figures=figures, targets=targets))  # fmt: skip
    for name, value in figures.items():
        print(f"{name}: {100 * value:.1f} %")
    return 0


def differences(rng: np.random.Generator, seeds: int, states: int, spread: float, own: float) -> np.ndarray:
    """[seeds, states] of B minus A in -1, 0, 1, between variants that are equal in the mean."""
    table, difficulty = np.zeros((seeds, states)), rng.beta(1.5, 1.5, states)
    for sign in (1, -1):
        rate = difficulty + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, own, states)
        table += sign * (rng.random((seeds, states)) < rate)
    return table


def crossed_bootstrap(table: np.ndarray, rng: np.random.Generator, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of the pigeonhole bootstrap over seeds and states (Owen 2007), row means moved apart first."""
    k, n = table.shape
    table = table + (table.mean(1, keepdims=True) - table.mean()) * (np.sqrt(k / (k - 1)) - 1)
    rows = rng.multinomial(k, np.full(k, 1 / k), size=resamples)
    columns = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    low, high = np.quantile(((rows @ table) * columns).sum(1) / (k * n), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
