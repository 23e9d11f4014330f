"""Two policies on the same initial states: is one better, by how much, and what could have been seen at all."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError, plain
from burnish.core.reading import read_object, read_text, search
from burnish.evaluate.offline_scores import FIGURES, OfflineRecord, parse_offline
from burnish.evaluate.records import EPISODES, SETTINGS, SUMMARY, Record, rows_of
from burnish.evaluate.results import read_results
from burnish.evaluate.sequential import Sequential, sequential
from burnish.evaluate.stats import (
    Estimate,
    Rate,
    Verdict,
    estimate,
    mcnemar,
    minimum_detectable_difference,
    paired_interval,
    two_way,
    verdict,
    wilson,
)

OFFLINE = "offline"
"""What `settings.json` of an offline evaluation names as its environment."""
_SAME = ("data", "every", "dimensions")
"""Settings that two evaluations must share for their figures to mean the same."""

_OF_THE_DATA = ("hold", "mean", "seam_recorded")
"""Figures that no policy changes."""
_OF_A_LENGTH = ("consistency", "language_change", "language_noise", "language_rise")
"""Figures over a whole chunk, which chunks of two lengths do not share: what lies further ahead is harder."""


@dataclass(frozen=True)
class OfflineComparison:
    """A and B on the same held-out episodes; differences are B minus A, so below 0 is where B is nearer.

    Args:
        episodes, left_out: shared ones, and those that some run lacks.
        differences: figure to its estimate over episodes (and runs, where both sides have as many).
        steps: lengths of their chunks, ascending; where they differ, the action error is that of the steps all have.
        margin: difference of the action error up to which the two count as equivalent.
    """

    names: tuple[str, str]
    runs: tuple[int, int]
    episodes: int
    left_out: list[int]
    means: dict[str, tuple[float, float]]
    differences: dict[str, Estimate]
    steps: list[int]
    margin: float | None = None

    @property
    def verdict(self) -> Verdict:
        """The word for the difference in action error: "better" where B's is lower."""
        found = self.differences["error"]
        return verdict(-found.high, -found.low, self.margin)

    @property
    def note(self) -> str:
        """What chunks of several lengths leave to compare; "" for those of one."""
        lengths = " and ".join(map(str, self.steps))
        return (f"chunks of {lengths} steps: the action error is that of the first {self.steps[0]}, and figures of "
                "whole chunks are left out") * (len(self.steps) > 1)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        figures = {name: {"a": self.means[name][0], "b": self.means[name][1], **vars(one)}
                   for name, one in self.differences.items()}  # fmt: skip
        return {
            "a": self.names[0], "b": self.names[1], "runs": list(self.runs), "episodes": self.episodes,
            "left_out": self.left_out, "verdict": self.verdict, "margin": self.margin, "figures": figures,
            "steps": self.steps,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"A  {self.names[0]}", f"B  {self.names[1]}",
                 f"{self.episodes} held-out episodes; B - A with its 95 % interval over episodes"]  # fmt: skip
        for name, one in self.differences.items():
            label, (a, b) = FIGURES.get(name, f"error of {name}, in its units"), self.means[name]
            lines.append(f"{label:<46} {a:>8.3g} {b:>8.3g}   {one.mean:+.3g} [{one.low:+.3g}, {one.high:+.3g}]")
        margin = "" if self.margin is None else f" (margin {self.margin:g})"
        lines.append(f"action error of B: {self.verdict}, p = {self.differences['error'].p:.2g}{margin}")
        lines += [self.note] * bool(self.note)
        lines += [f"left out, not in all of them: {len(self.left_out)} episodes"] * bool(self.left_out)
        return "\n".join(map(plain, lines))


def is_offline(path: Path | str) -> bool:
    """Whether a folder holds an offline evaluation."""
    file = Path(path) / SETTINGS
    return file.is_file() and read_object(file, Path(path)).get("env") == OFFLINE


def compare_offline(
    a: Sequence[Path | str], b: Sequence[Path | str], *, task_regex: str | None = None, margin: float | None = None
) -> OfflineComparison:
    """As `burnish.evaluate.compare.compare`, of folders of offline evaluations; several are runs of one side.

    Raises:
        BurnishError: a folder that is no offline evaluation, other data or settings, or fewer than two shared episodes.
    """
    shared: dict[str, Any] = {}
    sides = [[_read(path, shared) for path in side] for side in (a, b)]
    runs = [run for side in sides for run in side]
    common = sorted(set.intersection(*map(set, runs)))
    kept = [e for e in common if search(task_regex or "", runs[0][e].task, "--task-regex")]
    if len(kept) < 2:
        raise BurnishError(f"{len(kept)} episodes that all of them hold", "at least 2 for an interval")
    means, differences = {}, {}
    steps = sorted({len(record.by_horizon) for run in runs for record in run.values()})
    found = [[{e: _values(run[e], shared, steps) for e in kept} for run in side] for side in sides]
    for name in (*(name for name in FIGURES if name not in _OF_THE_DATA), *map(str, shared["dimensions"])):
        some = [e for e in kept if all(name in run[e] for side in found for run in side)]
        if len(some) < 2:
            continue
        one, two = (np.array([[run[e][name] for e in some] for run in side]) for side in found)
        means[name] = float(one.mean()), float(two.mean())
        differences[name] = two_way(two - one if len(one) == len(two) else (two.mean(0) - one.mean(0))[None])
    names = tuple(", ".join(map(str, side)) for side in (a, b))
    left_out = sorted(set().union(*runs) - set(common))
    return OfflineComparison(names, (len(a), len(b)), len(kept), left_out, means, differences, steps, margin)


def _values(record: OfflineRecord, shared: dict[str, Any], steps: list[int]) -> dict[str, float]:
    if len(steps) == 1:
        return dict(zip(map(str, shared["dimensions"]), record.by_dimension, strict=True)) | record.figures
    first = float(np.mean([one for one in record.by_horizon[: steps[0]] if one is not None]))
    return {name: value for name, value in record.figures.items() if name not in _OF_A_LENGTH} | {"error": first}


def _read(path: Path | str, shared: dict[str, Any]) -> dict[int, OfflineRecord]:
    """The episodes of an evaluation by number; what all of them must share goes into `shared`."""
    if not is_offline(path):
        what = "no offline evaluation, and another one is" if Path(path).exists() else "not there"
        raise BurnishError(f"{path} is {what}", "both of one kind")
    folder = Path(path)
    settings, file = read_object(folder / SETTINGS, folder), folder / EPISODES
    for key in _SAME:
        if (other := shared.setdefault(key, settings.get(key))) != settings.get(key):
            found = f"{path} was measured with another '{key}', {settings.get(key)} and not {other}"
            raise BurnishError(found[:500], "the same data set and --every for both",
                               f"--every {other}, with another --output" if key == "every" else "")  # fmt: skip
    records = [parse_offline(row, where) for where, row in rows_of(read_text(file, folder), file)]
    dimensions = settings.get("dimensions")
    if not isinstance(dimensions, list) or {len(one.by_dimension) for one in records} != {len(dimensions)}:
        raise BurnishError(f"{file} holds no episodes of the dimensions in {SETTINGS}", "what `burnish eval` wrote")
    return {record.episode: record for record in records}


Key = tuple[str, int]
Run = dict[Key, Record]
MOST_TASKS, MOST_RUNS = 2000, 100
"""Of one comparison, so that it ends."""
_MCNEMAR, _TWO_WAY, _STATES = "exact McNemar test", "two-way random-effects test", "t test over initial states"
_INTERVAL = {
    _MCNEMAR: "paired bootstrap over {n} initial states", _TWO_WAY: "two-way over runs and {n} initial states",
    _STATES: "over the means of {n} initial states",
}  # fmt: skip
Paths = Path | str | Sequence[Path | str]


@dataclass(frozen=True)
class PairedResult:
    """A and B on `n` shared initial states; `difference` is B minus A.

    With one run on each side every figure is over single trials, `rate_a` and `rate_b` carry Wilson intervals and
    `p` is McNemar's. With k runs of the same states on both sides, the first of A beside the first of B, intervals
    and `p` are those of `stats.two_way`, over runs and states. With another number of runs that of the difference is
    Student's, over the means of initial states. Where all pairs are alike, Wilson's bound stands in.

    Args:
        low, high: 95 % interval of the difference.
        only_a, only_b: initial states on which A, or B, did better.
        detectable: smallest difference that n such pairs find with 80 % power; None when there is none.
    """

    n: int
    rate_a: Rate
    rate_b: Rate
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p: float
    detectable: float | None
    test: str

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rate_a": self.rate_a.to_dict(), "rate_b": self.rate_b.to_dict()}


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Printing it gives the whole table."""

    names: tuple[str, str]
    runs: tuple[int, int]
    overall: PairedResult
    per_task: dict[str, PairedResult]
    unpaired: tuple[list[Key], list[Key]]
    warnings: list[str] = field(default_factory=list)
    margin: float | None = None
    sequential: Sequential | None = None

    @property
    def verdict(self) -> Verdict:
        """The word for the whole difference; "better" and "worse" need the p-value too, which few pairs do not give."""
        return verdict(self.overall.low, self.overall.high, self.margin, self.overall.n, self.overall.p)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "a": self.names[0], "b": self.names[1], "runs": list(self.runs),
            "test": self.overall.test, "verdict": self.verdict, "margin": self.margin,
            "sequential": self.sequential and vars(self.sequential), "overall": self.overall.to_dict(),
            "per_task": {t: result.to_dict() for t, result in self.per_task.items()},
            "unpaired": {"a": [list(k) for k in self.unpaired[0]], "b": [list(k) for k in self.unpaired[1]]},
            "warnings": self.warnings,
        }  # fmt: skip

    def __str__(self) -> str:
        r, (name_a, name_b) = self.overall, self.names
        lines = [
            f"A  {name_a}{_runs(self.runs[0])}: {r.rate_a}",
            f"B  {name_b}{_runs(self.runs[1])}: {r.rate_b}",
            f"B - A  {100 * r.difference:+.1f} points, 95 % interval [{100 * r.low:+.1f}, {100 * r.high:+.1f}] "
            f"({_INTERVAL[r.test].format(n=r.n)})",
            f"{r.test}: p = {r.p:.3g}; only A better {r.only_a}, only B better {r.only_b}",
            _detectable(r),
        ]
        if self.margin is not None:
            lines.append(f"verdict with a margin of {100 * self.margin:g} points: {self.verdict}")
        if self.sequential is not None:
            lines.append(f"sequential: {self.sequential}")
        lines += [
            f"left out, only in {side}: {len(keys)} ({', '.join(f'{t} {s}'.strip() for t, s in keys[:3])}"
            f"{', ...' if len(keys) > 3 else ''})"
            for side, keys in zip("AB", self.unpaired, strict=True)
            if keys
        ]
        if len(self.per_task) > 1:
            lines += ["", *_table(self.per_task), "p of a task is not adjusted for how many there are"]
        return "\n".join(map(plain, [*lines, *(f"WARNING: {w}" for w in self.warnings)]))


def compare(
    a: Paths, b: Paths, *, task_regex: str | None = None, seed: int = 0, margin: float | None = None,
    sequential: bool = False,
) -> Comparison | OfflineComparison:  # fmt: skip
    """Compare two policies or methods, paired on (task, initial state), or by their offline evaluations on episodes.

    Args:
        a, b: evaluation folder or result file, see `read_results`; or several of them, the runs of one side (say, three
            seeds).
        task_regex: keep only tasks in which this is found.
        seed: of the bootstrap.
        margin: difference of success rates (offline: of action errors) up to which the policies count as equivalent.
        sequential: also the test, which may be looked at after each trial; trials in the order of their
            lines (of evaluation folders: by initial state), one run a side.

    Raises:
        BurnishError: unreadable results, a trial that occurs twice in a run, or nothing that pairs.
    """
    lists = [[side] if isinstance(side, str | Path) else list(side) for side in (a, b)]
    if any(is_offline(path) for side in lists for path in side):
        if sequential:
            raise BurnishError("--sequential with offline evaluations", "trials of a robot or a simulator")
        return compare_offline(*lists, task_regex=task_regex, margin=margin)
    names = (_name(a), _name(b))
    sides = [_load(side, task_regex) for side in (a, b)]
    keys = [list(dict.fromkeys(key for run in side for key in run)) for side in sides]
    shared = set(keys[0]) & set(keys[1])
    if not shared:
        examples = f"{_example(keys[0])} against {_example(keys[1])}"
        raise BurnishError(f"no trial of {names[0]} has a partner in {names[1]} ({examples})",
                           "evaluations of the same tasks on the same initial states")  # fmt: skip
    paired = [key for key in keys[0] if key in shared]
    tasks: dict[str, list[Key]] = {}
    for key in paired:
        tasks.setdefault(key[0], []).append(key)
    _check_bounds(len(tasks), *map(len, sides))
    overall = _result(sides, paired, seed)
    per_task = {task: _result(sides, some, seed) for task, some in tasks.items()}
    unpaired = tuple([k for k in some if k not in shared] for some in keys)
    runs = (len(sides[0]), len(sides[1]))
    folders = [Path(path).parent if Path(path).name == EPISODES else Path(path) for side in lists for path in side]
    ours = [folder for folder in folders if (folder / SETTINGS).is_file()]
    found = Comparison(names, runs, overall, per_task, unpaired, _warnings(sides, overall, ours), margin)
    return replace(found, sequential=_sequential(sides, paired, margin, bool(ours))) if sequential else found


def _sequential(sides: list[list[Run]], keys: list[Key], margin: float | None, ended: bool) -> Sequential:
    """`ended`: lines stand as episodes ended, solved ones first; the order of a test must know no outcome. Otherwise a
    pair stands where its later trial does, so that one that is completed at last comes last."""
    if max(map(len, sides)) > 1:
        raise BurnishError(f"--sequential with {max(map(len, sides))} runs of one side", "one run of each")
    (a,), (b,) = sides
    places = [{key: i for i, key in enumerate(run)} for run in (a, b)]
    made = {key: sorted(place[key] for place in places) for key in keys}
    keys = sorted(keys, key=lambda key: (key[1], key[0]) if ended else (made[key][1], -made[key][0]))
    return sequential(np.array([float(b[key].success) - float(a[key].success) for key in keys]), margin)


def _name(paths: Paths) -> str:
    return str(paths) if isinstance(paths, str | Path) else ", ".join(str(p) for p in paths)


def _example(keys: list[Key]) -> str:
    return f"{len(keys)} trials such as task {keys[0][0]!r} state {keys[0][1]}" if keys else "none"


def _load(paths: Paths, task_regex: str | None) -> list[Run]:
    """The runs of one side; a file that holds several seeds of the same initial states is several runs."""
    runs: list[Run] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        found = read_results(path)
        wanted = {task for task in {r.task for r in found} if search(task_regex or "", task, "--task-regex")}
        records = [r for r in found if r.task in wanted]
        groups: dict[int, Run] = {}
        several = len({r.key for r in records}) < len(records)
        for r in records:
            groups.setdefault(r.seed if several else 0, {})[r.key] = r
        runs += [group for _, group in sorted(groups.items())]
    if not any(runs):
        raise BurnishError(f"no task in {_name(paths)} matches '{task_regex}'")
    return [run for run in runs if run]


def _check_bounds(tasks: int, *runs: int) -> None:
    if tasks > MOST_TASKS:
        raise BurnishError(f"{tasks} tasks", f"at most {MOST_TASKS}", "--task-regex with a part of them")
    if max(runs) > MOST_RUNS:
        raise BurnishError(f"{max(runs)} runs of the same initial states (one for each seed)", f"at most {MOST_RUNS}")


def _result(sides: list[list[Run]], keys: list[Key], seed: int) -> PairedResult:
    successes = [np.array([sum(run[k].success for run in side if k in run) for k in keys]) for side in sides]
    trials = [np.array([sum(k in run for run in side) for k in keys]) for side in sides]
    # Whole numbers, so that equal shares are equal.
    better = np.sign(successes[1] * trials[0] - successes[0] * trials[1])
    n, difference = len(keys), successes[1] / trials[1] - successes[0] / trials[0]
    counts = int((better < 0).sum()), int((better > 0).sum())
    single, test = max(len(side) for side in sides) == 1, _STATES
    tables = [_outcomes(side, keys) for side in sides]
    rates = [_rate(s, t, table, single, seed) for s, t, table in zip(successes, trials, tables, strict=True)]
    if not single and n > 1:
        table = difference[None]
        if len(sides[0]) == len(sides[1]) and all(len(one) == len(sides[0]) for one in tables):
            table, test = tables[1] - tables[0], _TWO_WAY
        found = estimate(table, True)
        low, high = max(found.low, -1.0), min(found.high, 1.0)
        return PairedResult(n, *rates, found.mean, low, high, *counts, found.p, found.detectable, test)
    # One pair is added to each side, as in Laplace's rule: without a discordant pair, discordance is still not 0.
    detectable = minimum_detectable_difference(n, (float((difference**2).sum()) + 1) / (n + 2))
    low, high = paired_interval(difference, np.random.default_rng(seed))
    return PairedResult(n, *rates, float(difference.mean()), low, high, *counts, mcnemar(*counts), detectable, _MCNEMAR)


def _outcomes(side: list[Run], keys: list[Key]) -> np.ndarray:
    """Successes [runs, states]; their means [1, states] where a run lacks some."""
    if all(k in run for run in side for k in keys):
        return np.array([[float(run[k].success) for k in keys] for run in side])
    return np.array([[float(np.mean([run[k].success for run in side if k in run])) for k in keys]])


def _rate(successes: np.ndarray, trials: np.ndarray, table: np.ndarray, single: bool, seed: int) -> Rate:
    total, n = int(successes.sum()), int(trials.sum())
    if single:
        return wilson(total, n)
    rate, found = total / n, estimate(table, True)
    ends = (found.low, found.high) if found else paired_interval(table[0], np.random.default_rng(seed))
    return Rate(total, n, min(max(ends[0], 0.0), rate), max(min(ends[1], 1.0), rate))


def _warnings(sides: list[list[Run]], overall: PairedResult, ours: list[Path]) -> list[str]:
    warnings = [
        f"{path} has not ended, and episodes that end first are not like the rest"
        for path in ours
        if not (path / SUMMARY).is_file()
    ]
    warnings += [
        f"a run of {name} holds episodes of several weights"
        for name, side in zip("AB", sides, strict=True)
        if any(len({r.weights for r in run.values()} - {""}) > 1 for run in side)
    ]
    warnings += [
        f"runs {i + 1} and {j + 1} of {name} are trial-for-trial identical; they count as one"
        for name, side in zip("AB", sides, strict=True)
        for (i, x), (j, y) in combinations(enumerate(side), 2)
        if identical(x, y)
    ]
    if any(identical(x, y) for x, y in product(*sides)):
        question = "is it the same policy, or was the change without effect?"
        warnings.append(f"A and B are trial-for-trial identical: {question}")
    elif overall.only_a + overall.only_b == 0:
        warnings.append("A and B succeeded on the same initial states: the interval is what may have gone unseen")
    variants = [{r.variant for run in side for r in run.values()} for side in sides]
    if variants[0] != variants[1]:
        warnings.append(f"A holds {', '.join(sorted(variants[0]))} episodes, B {', '.join(sorted(variants[1]))}")
    elif "instruction_swap" in variants[0]:
        warnings.append("success is at the object that was not named: a policy that listens has less of it")
    return warnings


def identical(x: Run, y: Run) -> bool:
    """Whether two runs agree on every shared trial, in their steps too where both say how many there were."""
    shared = x.keys() & y.keys()
    return bool(shared) and all(
        x[k].success == y[k].success and (x[k].steps == y[k].steps or -1 in (x[k].steps, y[k].steps)) for k in shared
    )


def _runs(count: int) -> str:
    return f" ({count} runs)" if count > 1 else ""


def _detectable(r: PairedResult) -> str:
    if r.detectable is None:
        return f"{r.only_a + r.only_b} of {r.n} pairs differ: too few to find any difference with 80 % power"
    return f"smallest difference that {r.n} such pairs find with 80 % power: {100 * r.detectable:.1f} points"


def _table(per_task: dict[str, PairedResult]) -> list[str]:
    width = max(len("task"), *(len(task) for task in per_task))
    lines = [f"{'task':<{width}}  {'A':>28}  {'B':>28}  {'B - A':>7}  only A/B  p"]
    for task, r in per_task.items():
        lines.append(f"{task:<{width}}  {r.rate_a!s:>28}  {r.rate_b!s:>28}  {100 * r.difference:>+7.1f}  "
                     f"{r.only_a:>4}/{r.only_b:<3}  {r.p:.3g}")  # fmt: skip
    return lines
