"""Looking after every trial: an interval and a verdict that hold however often one looks, and whenever one stops.

A fixed test that is repeated after each trial finds a difference between equal policies sooner or later. Trials on a
real robot are dear, so one does want to look. Here every value that the true difference might have is bet against,
trial by trial, with a stake that knows earlier trials only; a value whose bet has grown the money twentyfold is ruled
out, and stays so. If it is the true one that happens with a chance of at most 1 in 20, ever (Ville's inequality).
"""

import math
from dataclasses import dataclass

import numpy as np

from burnish.core.errors import BurnishError
from burnish.evaluate.stats import LEVEL, Verdict, verdict

MOST_TRIALS = 100_000
_GRID = np.linspace(-1.0, 1.0, 401)
"""Differences that are bet against."""
_STAKE = 0.5
"""Of the money at most, so that no bet loses all of it."""


@dataclass(frozen=True)
class Sequential:
    """What `n` paired trials say, in the order in which they were made.

    Args:
        n: trials so far.
        difference: mean of B minus A.
        low, high: interval of the true difference, valid at every look.
        p: p-value against no difference, valid at every look.
        verdict: better, worse, equivalent (inside the margin), or undecided: go on.
        decided: the trial after which the verdict fell; None while it has not.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    verdict: Verdict
    decided: int | None

    def __str__(self) -> str:
        after = f"after trial {self.decided}: stop" if self.decided else "so far: go on"
        return (f"B is {self.verdict} {after}; B - A {100 * self.difference:+.1f} points, 95 % interval "
                f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}], p = {self.p:.3g}, both valid at every look "
                f"({self.n} paired trials)")  # fmt: skip


def confidence_sequence(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interval and p-value after every trial, valid at all of them together.

    The hedged capital process with predictable plug-in stakes of Waudby-Smith and Ramdas (Journal of the Royal
    Statistical Society B 86, 2024, section 4.4, arXiv:2010.09686), on trials moved from [-1, 1] to [0, 1].

    Args:
        differences: [n] of paired trials in their order, each in [-1, 1].

    Returns:
        low, high, p: [n] each; low never falls, high and p never rise.

    Raises:
        BurnishError: no trial, too many, or a difference outside [-1, 1].
    """
    values = np.asarray(differences, dtype=np.float64)
    if not 1 <= values.size <= MOST_TRIALS or not (np.abs(values) <= 1).all():
        raise BurnishError(f"{values.size} paired trials", f"1 to {MOST_TRIALS}, with differences from -1 to 1")
    y, true = (values + 1) / 2, (_GRID + 1) / 2
    count = np.arange(1, y.size + 1)
    mean = (0.5 + np.cumsum(y)) / (count + 1)
    spread = (0.25 + np.cumsum((y - mean) ** 2)) / (count + 1)
    spread = np.concatenate([[0.25], spread[:-1]])  # a stake knows only what came before
    stakes = np.sqrt(2 * math.log(2 / (1 - LEVEL)) / (spread * count * np.log(count + 1)))
    with np.errstate(divide="ignore"):
        up, down = _STAKE / true, _STAKE / (1 - true)
    money = np.zeros((2, _GRID.size))  # logarithms: of bets that the mean is higher, and lower
    low, high, p = np.empty(y.size), np.empty(y.size), np.empty(y.size)
    open_, left, smallest, middle = np.ones(_GRID.size, bool), _GRID, 1.0, _GRID.size // 2
    for i, (value, stake) in enumerate(zip(y, stakes, strict=True)):
        money[0] += np.log1p(np.minimum(stake, up) * (value - true))
        money[1] += np.log1p(-np.minimum(stake, down) * (value - true))
        wealth = np.logaddexp(money[0], money[1]) - math.log(2)
        open_ &= wealth < -math.log(1 - LEVEL)
        smallest = min(smallest, math.exp(-wealth[middle]))
        left = _GRID[open_] if open_.any() else left  # all are ruled out where the trials have changed midway
        low[i], high[i], p[i] = left[0], left[-1], smallest
    # The true value lies between two points of the grid.
    step = _GRID[1] - _GRID[0]
    return np.maximum(low - step, -1), np.minimum(high + step, 1), p


def sequential(differences: np.ndarray, margin: float | None = None) -> Sequential:
    """The verdict on paired trials made one after the other; `differences` are B minus A in the order of the trials.

    Args:
        differences: [n], each in [-1, 1].
        margin: declared before the first trial: differences up to this size do not matter.

    Raises:
        BurnishError: a margin that is none, or what `confidence_sequence` refuses.
    """
    if margin is not None and not 0 < margin < 1:
        raise BurnishError(f"margin {margin}", "between 0 and 1, e.g. 0.05 for five points")
    low, high, p = confidence_sequence(differences)
    words = [verdict(a, b, margin) for a, b in zip(low, high, strict=True)]
    decided = next((i for i, word in enumerate(words) if word != "undecided"), None)
    at = len(words) - 1 if decided is None else decided
    return Sequential(len(words), float(np.mean(differences)), float(low[-1]), float(high[-1]), float(p[-1]),
                      words[at], None if decided is None else decided + 1)  # fmt: skip
