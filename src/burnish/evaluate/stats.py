"""Statistics of success rates: intervals, paired tests, what n trials can detect. Pure numpy and scipy."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest, norm, t

from burnish.core.errors import BurnishError

LEVEL = 0.95
"""Of all intervals and tests, unless said."""
RESAMPLES = 20_000
POWER = 0.8
"""At which a smallest detectable difference is found."""
Verdict = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True)
class Rate:
    """A success rate that never travels without its n and its 95 % Wilson interval."""

    successes: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """successes / n."""
        return self.successes / self.n

    def to_dict(self) -> dict[str, float]:
        """rate, successes, n, low and high."""
        return {"rate": self.rate, **asdict(self)}

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] (n={self.n})"


def wilson(successes: int, n: int, level: float = LEVEL) -> Rate:
    """Success rate with the Wilson score interval of `level` (Wilson, JASA 22, 1927); covers well at 0 and n too.

    Raises:
        BurnishError: n < 1, or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise BurnishError(f"{successes} successes of {n} trials", "n >= 1 and 0 <= successes <= n")
    z = float(norm.isf((1 - level) / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Rate(int(successes), int(n), low, high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p-value from the discordant counts `only_first` and `only_second` (1 without any)."""
    discordant = only_first + only_second
    return 1.0 if discordant == 0 else float(binomtest(only_first, discordant, 0.5).pvalue)


def paired_bootstrap(
    differences: np.ndarray, rng: np.random.Generator, *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean paired difference, resampling pairs with replacement.

    Resampling n pairs is a multinomial draw over the distinct differences, so the cost does not grow with n.

    Args:
        differences: [n] one number for each pair (or each cluster, e.g. an initial state with several seeds).
        rng: source of the resampling; the same generator state gives the same interval.
        resamples: how many.

    Raises:
        BurnishError: no pair at all.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    n = int(counts.sum())
    if n == 0:
        raise BurnishError("no pairs to resample", "at least one")
    means = rng.multinomial(n, counts / n, size=resamples) @ values / n
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def unseen(n: int) -> float:
    """How large a share may be that none of `n` cases has shown: Wilson's bound; 0 of no case, which nobody counted."""
    return wilson(0, n).high if n else 0.0


def paired_interval(differences: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % interval of the mean of paired differences of successes (or of successes), each in [-1, 1].

    That of `paired_bootstrap`; where all are equal, which has no width, Wilson's bound says how much may be unseen.
    """
    low, high = paired_bootstrap(differences, rng)
    width = unseen(len(differences)) if np.ptp(differences) == 0 else 0.0
    return max(low - width, -1.0), min(high + width, 1.0)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, a two-sided p-value against zero, and what could have been seen.

    Args:
        mean, low, high, p: of the mean.
        error: standard error.
        freedom: degrees of freedom of the t distribution.
        detectable: smallest true mean that a study of this size and spread finds with 80 % power.
    """

    mean: float
    low: float
    high: float
    p: float
    error: float
    freedom: float
    detectable: float

    @property
    def interval(self) -> list[float]:
        """[low, high], 95 %."""
        return [self.low, self.high]


def two_way(values: np.ndarray) -> Estimate:
    """Mean of a table whose rows (training seeds) and columns (initial states) are both random samples.

    The two-way random-effects analysis of variance: value = mean + seed + state + rest. With mean squares A of seeds,
    B of states and E of the rest, (A + B - E) / kn estimates the variance of the mean without bias, and Satterthwaite's
    rule (Biometrics Bulletin 2, 1946) gives the degrees of freedom of its t distribution: never fewer than the fewest
    of a part, which subtracting E would feign. Chance may bring the estimate near nothing or below; it is kept at half
    of E: at the whole of it, which the variance itself cannot fall below, intervals are longer and cover 98 % where
    seeds do not differ. `python -m workshop coverage` simulates it. With one row, or one column: Student's interval.

    Args:
        values: [k, n] outcomes, or differences between two methods paired on seed and state.

    Raises:
        BurnishError: fewer than two numbers.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.shape[1] == 1:
        table = table.T
    k, n = table.shape
    if k < 1 or n < 2:
        raise BurnishError(f"a table of {k} seeds and {n} initial states", "at least one seed and two states")
    mean = float(table.mean())
    rows, columns = table.mean(1), table.mean(0)
    of_states = k * float(((columns - mean) ** 2).sum()) / (n - 1)
    parts, rest = [(of_states, n - 1)], 0.0
    if k > 1:
        residuals = table - rows[:, None] - columns + mean
        rest = float((residuals**2).sum()) / ((k - 1) * (n - 1))
        parts += [(n * float(((rows - mean) ** 2).sum()) / (k - 1), k - 1), (rest, (k - 1) * (n - 1))]
    square = max(sum(part for part, _ in parts) - 2 * rest, rest / 2)
    if square == 0.0:
        return Estimate(mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0, math.inf, 0.0)
    freedom = max(min(of for _, of in parts), square**2 / sum(part**2 / of for part, of in parts))
    error = math.sqrt(square / (k * n))
    half = float(t.isf((1 - LEVEL) / 2, freedom))
    p = 2 * float(t.sf(abs(mean) / error, freedom))
    detectable = (half + float(t.isf(1 - POWER, freedom))) * error
    return Estimate(mean, mean - half * error, mean + half * error, p, error, freedom, detectable)


def estimate(table: np.ndarray, shares: bool) -> Estimate | None:
    """`two_way`; None of a single number. Where all outcomes are equal the spread of shares is not 0: Wilson's bound
    for so many units says how much may have gone unseen."""
    if table.size < 2:
        return None
    found = two_way(table)
    if np.ptp(table) > 0 or not shares:
        return found
    n = table.shape[1]
    width, p = unseen(n), min(1.0, 2 * 0.5**n) if found.mean else 1.0
    return Estimate(found.mean, found.mean - width, found.mean + width, p, 0.0, found.freedom, width)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of one family, adjusted by Holm's step-down rule (Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, highest = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = highest
    return adjusted


def verdict(low: float, high: float, margin: float | None = None, pairs: int = 0, p: float = 0.0) -> Verdict:
    """The word for a difference with the interval [low, high].

    Args:
        margin: differences up to this size do not matter; None where none was declared, then nothing is equivalent.
        pairs: of successes, how many: where as many that never differ would leave more than the margin unseen, a few
            that differ cannot show that two are equivalent. 0: not of successes, or the interval knows it.
        p: "better" and "worse" need a p-value of at most 1 - LEVEL too, which few pairs do not give.
    """
    if margin is not None and -margin <= low and high <= margin and unseen(pairs) <= margin:
        return "equivalent"
    if p > 1 - LEVEL:
        return "undecided"
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def letters(differ: np.ndarray) -> list[str]:
    """Compact letters (Piepho, Journal of Computational and Graphical Statistics 13, 2004): arms that share one are
    not shown to differ.

    Args:
        differ: [arms, arms] bool, symmetric; whether two arms differ.

    Returns:
        One string for each arm, such as "ab".
    """
    groups = [set(range(len(differ)))]
    for i, j in zip(*np.nonzero(np.triu(differ)), strict=True):
        split = [part for group in groups for part in ((group - {i}, group - {j}) if {i, j} <= group else (group,))]
        groups = [part for at, part in enumerate(split)
                  if not any(part < other or (part == other and at > k) for k, other in enumerate(split))]  # fmt: skip
    groups.sort(key=lambda group: sorted(group))
    return ["".join(chr(ord("a") + place) for place, group in enumerate(groups) if arm in group)
            for arm in range(len(differ))]  # fmt: skip


def minimum_detectable_difference(n: int, discordance: float, *, power: float = POWER) -> float | None:
    """Smallest true difference of two rates that a paired test on n pairs finds with the given power.

    Solves n d^2 = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 for d (Connor, Biometrics 43, 1987), where psi is
    the share of pairs in which the two differ.

    Args:
        n: number of pairs.
        discordance: psi, in [0, 1].

    Returns:
        d in (0, psi], or None when even psi itself would stay undetected.

    Raises:
        BurnishError: numbers out of range.
    """
    if n < 1 or not 0 <= discordance <= 1:
        raise BurnishError(f"{n} pairs with discordance {discordance}", "n >= 1, discordance in [0, 1]")
    z_a, z_b = float(norm.isf((1 - LEVEL) / 2)), float(norm.isf(1 - power))
    under_root = z_a**2 * discordance * n - (n + z_b**2) * discordance * (z_a**2 - z_b**2)
    if discordance == 0 or under_root < 0:
        return None
    d = (z_a * math.sqrt(discordance * n) + math.copysign(math.sqrt(under_root), z_b)) / (n + z_b**2)
    return d if d <= discordance else None


def percentiles(values: np.ndarray | list[float]) -> dict[str, float]:
    """{"p50", "p95", "p99", "mean", "n"} of `values`; empty when there are none."""
    if len(values) == 0:
        return {}
    array = np.asarray(values, dtype=np.float64)
    p50, p95, p99 = np.percentile(array, [50, 95, 99]).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "mean": float(array.mean()), "n": int(array.size)}
