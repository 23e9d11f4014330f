"""Two offline evaluations of the same data set, paired on the held-out episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError, plain
from burnish.core.patterns import search
from burnish.core.reading import read_object, read_text
from burnish.evaluate.offline_scores import FIGURES, OfflineRecord, parse_offline
from burnish.evaluate.records import EPISODES, SETTINGS, rows_of
from burnish.evaluate.stats import Estimate, Verdict, two_way, verdict

OFFLINE = "offline"
"""What `settings.json` of an offline evaluation names as its environment."""
_SAME = ("data", "every", "dimensions")
"""Settings that two evaluations must share for their figures to mean the same."""

_OF_THE_DATA = ("hold", "mean", "seam_recorded")
"""Figures that no policy changes."""


@dataclass(frozen=True)
class OfflineComparison:
    """A and B on the same held-out episodes; differences are B minus A, so below 0 is where B is nearer.

    Args:
        episodes, left_out: shared ones, and those that some run lacks.
        differences: figure to its estimate over episodes (and runs, where both sides have as many).
        margin: difference of the action error up to which the two count as equivalent.
    """

    names: tuple[str, str]
    runs: tuple[int, int]
    episodes: int
    left_out: list[int]
    means: dict[str, tuple[float, float]]
    differences: dict[str, Estimate]
    margin: float | None = None

    @property
    def verdict(self) -> Verdict:
        """The word for the difference in action error: "better" where B's is lower."""
        found = self.differences["error"]
        return verdict(-found.high, -found.low, self.margin)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        figures = {name: {"a": self.means[name][0], "b": self.means[name][1], **vars(one)}
                   for name, one in self.differences.items()}  # fmt: skip
        return {
            "a": self.names[0], "b": self.names[1], "runs": list(self.runs), "episodes": self.episodes,
            "left_out": self.left_out, "verdict": self.verdict, "margin": self.margin, "figures": figures,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"A  {self.names[0]}", f"B  {self.names[1]}",
                 f"{self.episodes} held-out episodes; B - A with its 95 % interval over episodes"]  # fmt: skip
        for name, one in self.differences.items():
            label, (a, b) = FIGURES.get(name, f"error of {name}, in its units"), self.means[name]
            lines.append(f"{label:<46} {a:>8.3g} {b:>8.3g}   {one.mean:+.3g} [{one.low:+.3g}, {one.high:+.3g}]")
        margin = "" if self.margin is None else f" (margin {self.margin:g})"
        lines.append(f"action error of B: {self.verdict}, p = {self.differences['error'].p:.2g}{margin}")
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
    for name in (*(name for name in FIGURES if name not in _OF_THE_DATA), *map(str, shared["dimensions"])):
        some = [e for e in kept if all(name in _values(run[e], shared) for run in runs)]
        if len(some) < 2:
            continue
        one, two = (np.array([[_values(run[e], shared)[name] for e in some] for run in side]) for side in sides)
        means[name] = float(one.mean()), float(two.mean())
        differences[name] = two_way(two - one if len(one) == len(two) else (two.mean(0) - one.mean(0))[None])
    names = tuple(", ".join(map(str, side)) for side in (a, b))
    left_out = sorted(set().union(*runs) - set(common))
    return OfflineComparison(names, (len(a), len(b)), len(kept), left_out, means, differences, margin)


def _values(record: OfflineRecord, shared: dict[str, Any]) -> dict[str, float]:
    return dict(zip(map(str, shared["dimensions"]), record.by_dimension, strict=True)) | record.figures


def _read(path: Path | str, shared: dict[str, Any]) -> dict[int, OfflineRecord]:
    """The episodes of an evaluation by number; what all of them must share goes into `shared`."""
    if not is_offline(path):
        raise BurnishError(f"{path} is no offline evaluation, and another one is", "both of one kind")
    folder = Path(path)
    settings, file = read_object(folder / SETTINGS, folder), folder / EPISODES
    for key in _SAME:
        if shared.setdefault(key, settings.get(key)) != settings.get(key):
            raise BurnishError(f"{path} was measured with another '{key}'", "the same data set and --every for both")
    records = [parse_offline(row, where) for where, row in rows_of(read_text(file, folder), file)]
    dimensions = settings.get("dimensions")
    if not isinstance(dimensions, list) or {len(one.by_dimension) for one in records} != {len(dimensions)}:
        raise BurnishError(f"{file} holds no episodes of the dimensions in {SETTINGS}", "what `burnish eval` wrote")
    return {record.episode: record for record in records}
