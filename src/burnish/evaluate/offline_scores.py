"""What an episode of an offline evaluation says: predicted chunks against recorded actions, in numpy alone.

Distances are in standard deviations of the data set's actions, dimension by dimension: joints and grippers of any unit
weigh the same, and the mean action is about 0.8 off.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.evaluate.stats import two_way

FIGURES = {
    "error": "action error", "hold": "  of holding the last recorded action", "mean": "  of the mean action",
    "consistency": "overlapping chunks differ by", "seam": "jump where a chunk takes over",
    "seam_recorded": "  recorded change there", "gripper_found": "share of the gripper's changes that are made",
    "gripper_extra": "  changes too many, an episode", "gripper_late": "  late by, in seconds",
    "language_change": "another sentence moves the actions by", "language_noise": "  other noise moves them by",
    "language_rise": "  action error rises under it by",
}  # fmt: skip
"""Figures of an episode, and what they are called."""
SIDE = 0.1
"""Share of a gripper's range beyond its middle from which it counts as on that side."""
Interval = Sequence[float | None]


@dataclass(frozen=True)
class OfflineRecord:
    """One held-out episode: a line of `episodes.jsonl`.

    Args:
        task, other: its first instruction, and the one that stood in for it ("" where none did).
        episode, frames, calls: its number, its length, and how many chunks were predicted.
        figures: those of `FIGURES` that it has.
        by_dimension: [A] mean absolute error in the data set's units.
        by_horizon: [T] error of each step of a chunk; None for steps that lie beyond the end of every chunk.
        latency_ms, weights, seed, commit: as for an episode in closed loop.
    """

    task: str
    other: str
    episode: int
    frames: int
    calls: int
    figures: dict[str, float]
    by_dimension: Sequence[float]
    by_horizon: Sequence[float | None]
    latency_ms: Sequence[float] = ()
    weights: str = ""
    seed: int = 0
    commit: str = ""

    def to_line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def parse_offline(row: dict[str, Any], where: str) -> OfflineRecord:
    """A line of ours; BurnishError where a field is missing or of another kind."""
    parts = {one.name: row.get(one.name) for one in fields(OfflineRecord)}
    lists = [parts[key] for key in ("by_dimension", "by_horizon", "latency_ms")]
    figures = parts["figures"]
    right = (
        all(type(parts[key]) is int for key in ("episode", "frames", "calls", "seed"))
        and all(isinstance(parts[key], str) for key in ("task", "other", "weights", "commit"))
        and all(isinstance(one, list) and all(v is None or number(v) for v in one) for one in lists)
        and isinstance(figures, dict) and {"error"} <= figures.keys() <= FIGURES.keys()
        and all(map(number, figures.values())) and all(map(number, lists[0])) and any(map(number, lists[1][:1]))
    )  # fmt: skip
    if not right:
        raise BurnishError(f"{where} is no episode of an offline evaluation", "what `burnish eval --data` wrote")
    return OfflineRecord(**parts)


@dataclass(frozen=True)
class Scale:
    """What the recorded actions of a data set say about its dimensions.

    Args:
        unit: [A] standard deviation; NaN where a dimension never changes, which then counts in no error.
        centre, low, high: [A] mean and range.
        grippers: dimensions that open and close.
        fps: control steps a second.
    """

    unit: np.ndarray
    centre: np.ndarray
    low: np.ndarray
    high: np.ndarray
    grippers: Sequence[int]
    fps: float

    @classmethod
    def of(cls, actions: np.ndarray, grippers: Sequence[int], fps: float) -> "Scale":
        """That of actions [N, A]; BurnishError where none of them moves."""
        actions = actions[np.isfinite(actions).all(1)].astype(np.float64)
        low, high, deviation = actions.min(0), actions.max(0), actions.std(0)
        moves = deviation > 1e-6 * np.maximum(1e-6, np.abs(actions).max(0))
        if not moves.any():
            raise BurnishError("no dimension of the actions ever changes", "recorded motion")
        return cls(np.where(moves, deviation, np.nan), actions.mean(0), low, high, grippers, fps)

    def distance(self, one: np.ndarray, other: np.ndarray, inside: Any = True) -> np.ndarray:
        """[..., A] absolute differences in units of each dimension; NaN where not `inside`."""
        return np.where(inside, np.abs(one - other) / self.unit, np.nan)


def score(chunks: np.ndarray, starts: np.ndarray, recorded: np.ndarray, scale: Scale) -> dict[str, Any]:
    """The fields of `OfflineRecord` that chunks and recorded actions decide.

    Args:
        chunks: [C, T, A] predicted from the frames `starts` [C] of the episode, equally far apart, ascending.
        recorded: [L, A] actions of the whole episode.
    """
    every = int(starts[1] - starts[0]) if len(starts) > 1 else chunks.shape[1]
    true, inside = _along(recorded, starts, chunks.shape[1])
    apart = scale.distance(chunks, true, inside)
    held = recorded[np.maximum(starts - 1, 0)][:, None]
    overlap, before = chunks.shape[1] - every, recorded[starts[1:] - 1]
    figures = {
        "error": apart, "hold": scale.distance(held, true, inside)[starts > 0],
        "mean": scale.distance(scale.centre, true, inside),
        "consistency": scale.distance(chunks[:-1, every:], chunks[1:, :overlap], inside[1:, :overlap]),
        "seam": scale.distance(chunks[1:, 0], chunks[:-1, every - 1]),
        "seam_recorded": scale.distance(recorded[starts[1:]], before),
    }  # fmt: skip
    executed = np.concatenate(chunks[:, :every])[: len(recorded)]
    return {
        "frames": len(recorded), "calls": len(chunks),
        "figures": _known({name: mean_of(one) for name, one in figures.items()} | _gripper(executed, recorded, scale)),
        "by_dimension": [mean_of(one) for one in np.moveaxis(np.where(inside, np.abs(chunks - true), np.nan), -1, 0)],
        "by_horizon": [mean_of(one) for one in np.moveaxis(apart, 1, 0)],
    }  # fmt: skip


def language(
    chunks: np.ndarray, swapped: np.ndarray, again: np.ndarray, starts: np.ndarray, recorded: np.ndarray, scale: Scale
) -> dict[str, float]:
    """How far another sentence (`swapped`), and other noise (`again`), move the chunks [C, T, A] within the episode."""
    true, inside = _along(recorded, starts, chunks.shape[1])
    rise = scale.distance(swapped, true, inside) - scale.distance(chunks, true, inside)
    return _known({"language_change": mean_of(scale.distance(chunks, swapped, inside)), "language_rise": mean_of(rise),
                   "language_noise": mean_of(scale.distance(chunks, again, inside))})  # fmt: skip


def _along(recorded: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Recorded actions [C, T, A] at the steps of each chunk, and whether they lie in the episode, [C, T, 1]."""
    steps = starts[:, None] + np.arange(length)
    return recorded[np.minimum(steps, len(recorded) - 1)].astype(np.float64), (steps < len(recorded))[..., None]


def changes(values: np.ndarray, low: float, high: float) -> list[tuple[int, int]]:
    """(step, direction) of every change of side of a gripper's command [L]; near the middle it stays where it was."""
    place = (values - low) / ((high - low) or 1.0) - 0.5
    side = np.where(place > SIDE, 1, np.where(place < -SIDE, -1, 0))
    known = np.flatnonzero(side)
    return [(int(known[i]), int(side[known[i]])) for i in np.flatnonzero(np.diff(side[known])) + 1]


def _gripper(executed: np.ndarray, recorded: np.ndarray, scale: Scale) -> dict[str, float | None]:
    """Recorded changes that the policy makes too, in the same direction and at most a second apart, nearest first."""
    wanted, made, late = 0, 0, []
    for dim in scale.grippers:
        true, ours = (changes(one[:, dim], scale.low[dim], scale.high[dim]) for one in (recorded, executed))
        wanted, made = wanted + len(true), made + len(ours)
        near = sorted((abs(j - i), i, j) for i, d in true for j, e in ours if d == e and abs(j - i) <= scale.fps)
        while near:
            _, i, j = near[0]
            late.append((j - i) / scale.fps)
            near = [one for one in near if one[1] != i and one[2] != j]
    if not scale.grippers:
        return {}
    return {"gripper_found": len(late) / wanted if wanted else None, "gripper_extra": float(made - len(late)),
            "gripper_late": float(np.mean(late)) if late else None}  # fmt: skip


def _known(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}


def mean_of(values: np.ndarray) -> float | None:
    """Mean over everything that is a number; None where nothing is."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else None


def over_episodes(values: Iterable[float | None]) -> Interval | None:
    """[mean, low, high], Student's 95 % interval over episodes, each counted once; two Nones for one episode."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return [known[0], None, None] if known else None
    found = two_way(np.array([known]))
    return [found.mean, found.low, found.high]


def shown(interval: Interval | None) -> str:
    """[mean, low, high] as text."""
    if interval is None or interval[0] is None:
        return "-"
    mean, low, high = interval
    return f"{mean:.3g}" if low is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"
