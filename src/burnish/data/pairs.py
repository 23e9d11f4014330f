"""Preference pairs: two chunks for one observation of a LeRobot data set, and an index that says which is better.

A pair folder is an ordinary LeRobotDataset with two files beside it:

    pairs.jsonl          one line a pair: {"chosen": [episode, frame], "rejected": [episode, frame]}; what was proposed
                         at the very observation of the chosen chunk, but not recorded: "rejected": {"action": [...]}
    burnish_pairs.json   where the pairs come from, how far starts may differ, and "outcomes": for each episode
                         whether it succeeded, null where nobody said; "columns", where features have other names

Images, states and actions stay in the data set, in environment units; a chunk is cut out when it is needed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish.core.errors import BurnishError
from burnish.core.files import write_json, write_text
from burnish.core.options import number
from burnish.core.reading import read_lines, read_object
from burnish.core.types import Batch
from burnish.data.dataset import open_dataset
from burnish.data.loader import RobotData

INDEX, FACTS = "pairs.jsonl", "burnish_pairs.json"
FORMAT = 1
FAR = 10.0
"""Standard deviations from the mean beyond which an action is in other units than the statistics."""
LONGEST = 4096
"""Actions of a proposal."""
_AT_ONCE = 1024


@dataclass(frozen=True)
class Pair:
    """Chosen and rejected, each (episode, frame) of one data set.

    Args:
        chosen: where the better chunk starts.
        rejected: where the worse one starts; for a proposal that of `chosen`.
        proposal: actions that were proposed there and not recorded, in environment units; () where the chunk was.
    """

    chosen: tuple[int, int]
    rejected: tuple[int, int]
    proposal: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """A label of a whole episode."""

    episode: int
    success: bool


def divergence(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> int | None:
    """First frame in which two rollouts of one initial state act differently after equal states.

    Args:
        a, b: "state" [T, D] and "action" [T, A].

    Returns:
        The frame, or None when the starts differ or one never departs from the other.
    """
    length = min(len(a["action"]), len(b["action"]))
    same = (a["action"][:length] == b["action"][:length]).all(1)
    if same.all():
        return None
    frame = int(np.argmin(same))
    equal_states = (a["state"][: frame + 1] == b["state"][: frame + 1]).all()
    return frame if equal_states else None


def make_pairs(
    outcomes: Sequence[bool], lengths: Sequence[int], rollouts: Sequence[dict[str, np.ndarray]], *, ties: str = "skip",
    offsets: Sequence[int] = (0,), limit: int = 0,
) -> list[Pair]:  # fmt: skip
    """Pairs among the rollouts of one initial state; episodes are numbered from 0 here.

    Args:
        outcomes: whether each rollout solved the task.
        lengths: control steps of each.
        rollouts: see `divergence`.
        ties: skip, or faster: of two successes the one with fewer steps is chosen.
        offsets: how many frames before the branch point a chunk starts, one pair each.
        limit: at most so many pairs; 0 means all.
    """
    if ties not in ("skip", "faster"):
        raise BurnishError(f"ties '{ties}'", "skip or faster")
    pairs: list[Pair] = []
    for i in range(len(outcomes)):
        for j in range(i + 1, len(outcomes)):
            better = _better(i, j, outcomes, lengths, ties)
            frame = None if better is None else divergence(rollouts[i], rollouts[j])
            if better is None or frame is None:
                continue
            worse = j if better == i else i
            pairs += [Pair((better, frame - n), (worse, frame - n)) for n in offsets if frame >= n]
    return pairs[:limit] if limit else pairs


def _better(i: int, j: int, outcomes: Sequence[bool], lengths: Sequence[int], ties: str) -> int | None:
    if outcomes[i] != outcomes[j]:
        return i if outcomes[i] else j
    if ties == "faster" and outcomes[i] and lengths[i] != lengths[j]:
        return i if lengths[i] < lengths[j] else j
    return None


def write_index(
    root: Path, pairs: Sequence[Pair], facts: dict[str, Any], state_tolerance: float | Sequence[float] = 0.0
) -> None:
    """Make the data set `root` a pair folder; `facts` may hold "outcomes", see above."""
    labelled = facts.get("source") != "rollouts" and any(o is not None for o in facts.get("outcomes", []))
    if not pairs and not labelled:
        raise BurnishError("no pairs", "at least one success and one failure from the same start",
                           "more rollouts, --action-noise for a policy that always acts alike, or one that neither "
                           "always fails nor always succeeds")  # fmt: skip
    check_unique(pairs)
    lines = []
    for pair in pairs:
        rejected = {"action": pair.proposal} if pair.proposal else list(pair.rejected)
        lines.append(json.dumps({"chosen": list(pair.chosen), "rejected": rejected}) + "\n")
    try:
        about = {"format": FORMAT, "pairs": len(pairs), "state_tolerance": state_tolerance, **facts}
        write_json(root / FACTS, about)
        write_text(root / INDEX, "".join(lines))
    except BaseException:  # one without the other is of no use
        for name in (FACTS, INDEX):
            (root / name).unlink(missing_ok=True)
        raise


def require_no_pairs(root: Path) -> None:
    """Raise BurnishError where the data set `root` is a pair folder already."""
    if (root / INDEX).exists() or (root / FACTS).exists():
        raise BurnishError(f"{root} has pairs already", "a data set without",
                           f"rm -f '{root / INDEX}' '{root / FACTS}'")  # fmt: skip


def check_unique(pairs: Sequence[Pair]) -> None:
    """Raise BurnishError for a pair that occurs twice, or in both directions."""
    seen: set[Pair] = set()
    for pair in pairs:
        if pair in seen or (not pair.proposal and Pair(pair.rejected, pair.chosen) in seen):
            again = "twice" if pair in seen else "in both directions"
            raise BurnishError(f"the pair {pair.chosen} over {pair.rejected} occurs {again}", "each pair once")
        seen.add(pair)


def read_labels(path: Path) -> list[Pair | Outcome]:
    """Labels of a human or a program, JSON lines of three kinds:

    {"chosen": 3, "rejected": [5, 20]}                a side is an episode (frame 0), [episode, frame], or
                                                      {"episode": 5, "frame": 20}
    {"chosen": [3, 20], "rejected": {"action": [[0.1, ...], ...]}}   actions that were proposed there
    {"episode": 3, "success": true}
    """
    if not path.exists():
        raise BurnishError(f"no file {path}", 'JSON lines such as {"chosen": 3, "rejected": 5}')
    labels: list[Pair | Outcome] = []
    for count, row in read_lines(path):
        try:
            labels.append(_label(row))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise BurnishError(
                f"{path}:{count} is no pair ({type(error).__name__}: {str(error)[:200]})",
                '{"chosen": [episode, frame], "rejected": [episode, frame]}, or {"episode": 3, "success": true}',
            ) from error
    return labels


def _label(row: dict[str, Any]) -> Pair | Outcome:
    if "success" in row:
        if set(row) != {"episode", "success"} or type(row["episode"]) is not int or type(row["success"]) is not bool:
            raise ValueError("an outcome has a whole number as episode, and true or false as success")
        return Outcome(row["episode"], row["success"])
    chosen, rejected = _place(row["chosen"]), row["rejected"]
    if not isinstance(rejected, dict) or "action" not in rejected:
        return Pair(chosen, _place(rejected))
    steps = rejected["action"]
    if set(rejected) != {"action"} or not isinstance(steps, list) or not 1 <= len(steps) <= LONGEST:
        raise ValueError(f"a proposal is 1 to {LONGEST} actions")
    wide = len(steps[0]) if isinstance(steps[0], list) else 0
    if not wide or not all(isinstance(s, list) and len(s) == wide and all(map(number, s)) for s in steps):
        raise ValueError("the actions of a proposal are equally many finite numbers each")
    return Pair(chosen, chosen, tuple(tuple(map(float, step)) for step in steps))


def _place(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        place = value["episode"], value.get("frame", 0)
    else:
        place = tuple(value) if isinstance(value, list) else (value, 0)
    if len(place) != 2 or not all(type(item) is int for item in place):
        raise ValueError(f"{value} is no episode and frame")
    return place


def frame_of(data: RobotData, place: tuple[int, int], where: str) -> int:
    """Index of the frame at (episode, frame); raises BurnishError where the data set has none."""
    episode, frame = place
    total = data.meta.total_episodes
    if not 0 <= episode < total:
        raise BurnishError(f"{where} names episode {episode}", f"0 to {total - 1}")
    first, end = np.searchsorted(data.episode_index, [episode, episode + 1])
    if not 0 <= frame < end - first:
        raise BurnishError(f"{where} names frame {frame} of episode {episode}", f"0 to {end - first - 1}")
    return int(first + frame)


def chunks_of(data: RobotData, pairs: Sequence[Pair], frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both chunks of pairs that start at `frames` [B, 2]: [B, 2, T, A], and steps that one of them lacks [B, 2, T]."""
    actions, padded = data.chunks(frames)
    for i, pair in enumerate(pairs):
        if pair.proposal:
            given = np.asarray(pair.proposal, actions.dtype)[: actions.shape[2]]
            actions[i, 1, : len(given)], actions[i, 1, len(given) :] = given, given[-1]
            padded[i, 1] = np.arange(actions.shape[2]) >= len(given)
    return actions, np.broadcast_to(padded.any(1, keepdims=True), padded.shape).copy()


def check_pairs(data: RobotData, pairs: Sequence[Pair], tolerance: float | Sequence[float], where: str) -> np.ndarray:
    """The frames [N, 2] at which pairs start, when all is as it must be.

    Args:
        tolerance: how far the states at the start may differ, one number or one for each dimension.
        where: names the pairs in errors.
    """
    frames = np.array([[frame_of(data, place, where) for place in (p.chosen, p.rejected)] for p in pairs])
    frames = frames.reshape(-1, 2).astype(np.int64)
    for i, pair in enumerate(pairs):
        if not pair.proposal and pair.chosen[0] == pair.rejected[0]:
            raise BurnishError(f"pair {i} of {where} pairs episode {pair.chosen[0]} with itself", "two episodes",
                               'actions that were not recorded as "rejected": {"action": [...]}')  # fmt: skip
        if pair.proposal and len(pair.proposal[0]) != data.actions.shape[1]:
            raise BurnishError(f"pair {i} of {where} proposes actions of {len(pair.proposal[0])} dimensions",
                               f"{data.actions.shape[1]}")  # fmt: skip
    tasks = data.task_index[frames]
    for i in np.flatnonzero(tasks[:, 0] != tasks[:, 1])[:1]:
        one, two = (data.tasks[int(t)] for t in tasks[i])
        raise BurnishError(f"pair {i} of {where} compares '{one}' with '{two}'", "one task in a pair")
    if data.states is not None:
        _check_states(data.states[frames], np.asarray(tolerance, np.float64), where)
    for start in range(0, len(pairs), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        actions, padded = chunks_of(data, pairs[part], frames[part])
        for i in np.flatnonzero(~np.isfinite(actions).all((1, 2, 3)))[:1]:
            raise BurnishError(f"pair {start + i} of {where} has actions that are not finite", "numbers")
        same = (actions[:, 0] == actions[:, 1]).all(-1) | padded[:, 0]
        for i in np.flatnonzero(same.all(1))[:1]:
            raise BurnishError(f"pair {start + i} of {where} has the same actions on both sides",
                               "two different chunks")  # fmt: skip
    return frames


def _check_states(states: np.ndarray, tolerance: np.ndarray, where: str) -> None:
    if tolerance.ndim == 1 and len(tolerance) not in (1, states.shape[2]):
        raise BurnishError(f"{len(tolerance)} tolerances for states of {states.shape[2]} dimensions in {where}",
                           f"1 or {states.shape[2]}")  # fmt: skip
    apart = np.abs(states[:, 0].astype(np.float64) - states[:, 1])
    for i in np.flatnonzero(~(apart <= tolerance).all(1))[:1]:
        limit = np.broadcast_to(tolerance, apart[i].shape)
        worst = int(np.argmax(np.nan_to_num(apart[i] - limit, nan=np.inf)))
        raise BurnishError(
            f"pair {i} of {where} starts from states that differ by {apart[i, worst]:.3g} in dimension {worst}",
            f"the same start (at most {limit[worst]:g})",
            "pair rollouts of the same initial state, or import with --state-tolerance",
        )


class PairFolder:
    """What both views of a pair folder share: its frames, its facts, and who succeeded.

    Args:
        chunk_size: T.
        steps: of a chunk that count; 0 means all.
        **options: image_size, cache_dir, cache_gb, seen and window, see burnish.data.loader.RobotData.

    Attributes:
        hash: changes with the data set, the index or the outcomes.
        outcomes: for each episode whether it succeeded, None where nobody said.
        successes: indices of all frames of the episodes that succeeded, or were chosen in a pair.
    """

    def __init__(
        self, root: Path, cameras: Sequence[str], chunk_size: int, *, steps: int = 0, progress: bool = True,
        **options: Any,
    ):  # fmt: skip
        if not (root / INDEX).is_file() or not (root / FACTS).is_file():
            raise BurnishError(f"no pairs in {root} (it has no {INDEX})", "a pair folder", "burnish data pairs --help")
        self.facts = read_object(root / FACTS)
        tolerance = self.facts.get("state_tolerance", 0.0)
        numbers = tolerance if isinstance(tolerance, list) and tolerance else [tolerance]
        if self.facts.get("format") != FORMAT or not all(number(one) and one >= 0 for one in numbers):
            raise BurnishError(f"{root / FACTS} has format {self.facts.get('format')} and state_tolerance {tolerance}",
                               f"format {FORMAT} and numbers of at least 0")  # fmt: skip
        columns = self.facts.get("columns") or {}
        if not isinstance(columns, dict):
            raise BurnishError(f"{root / FACTS} has columns {str(columns)[:60]!r}", "a map of features, or none")
        self.robot = RobotData(root, cameras, chunk_size, 1, 0, augmented=False, progress=progress,
                               meta=open_dataset(root, columns), **options)  # fmt: skip
        self.root, self.chunk_size, self.steps = root, chunk_size, steps or chunk_size
        self.pairs = [label for label in read_labels(root / INDEX) if isinstance(label, Pair)]
        if len(self.pairs) != self.facts.get("pairs"):
            raise BurnishError(f"{root / INDEX} has {len(self.pairs)} pairs",
                               f"{self.facts.get('pairs')}, as {FACTS} says")  # fmt: skip
        check_unique(self.pairs)
        self.outcomes: list[bool | None] = self.facts.get("outcomes") or [None] * self.robot.meta.total_episodes
        fits = isinstance(self.outcomes, list) and len(self.outcomes) == self.robot.meta.total_episodes
        if not fits or not all(outcome in (True, False, None) for outcome in self.outcomes):
            raise BurnishError(f"{root / FACTS} has outcomes that are not those of its episodes",
                               f"true, false or null for each of {self.robot.meta.total_episodes}")  # fmt: skip
        self.frames = check_pairs(self.robot, self.pairs, tolerance, str(root))
        good = {p.chosen[0] for p in self.pairs} | {e for e, outcome in enumerate(self.outcomes) if outcome}
        self.successes = np.flatnonzero(np.isin(self.robot.episode_index, sorted(good)))
        about = (root / INDEX).read_bytes() + json.dumps(self.outcomes).encode()
        self.hash = f"{self.robot.hash}-{hashlib.sha256(about).hexdigest()[:16]}"

    def check_units(self, stats: dict[str, Any]) -> None:
        """Raise BurnishError when the actions cannot be in the units of `stats`, LeRobot's statistics of "action"."""
        mean, std = (np.asarray(stats[k], np.float64).reshape(-1) for k in ("mean", "std"))
        actions = self.robot.actions[self.robot.indices].astype(np.float64)
        if actions.shape[1] != len(mean):
            raise BurnishError(f"{self.root} has actions of {actions.shape[1]} dimensions", f"{len(mean)}")
        moving = std > 1e-6
        ratio = actions.std(0)[moving] / std[moving]
        proposed = np.array([step for pair in self.pairs for step in pair.proposal]).reshape(-1, len(mean))
        far = max(
            float((np.abs((some - mean) / np.maximum(std, 1e-8))[:, moving] > FAR).mean()) if len(some) else 0.0
            for some in (actions, proposed)
        )
        if far > 0.01 or (ratio > 5 * FAR).any() or (len(ratio) and (ratio < 1 / (5 * FAR)).all()):
            raise BurnishError(
                f"the actions of {self.root} do not fit the policy's statistics ({far:.0%} lie more than {FAR:g} "
                f"standard deviations away; spread {ratio.min():.3g} to {ratio.max():.3g} of theirs)",
                "actions in environment units, as the policy was trained on", "do not normalise them beforehand",
            )  # fmt: skip

    def demonstrations(self, frames: np.ndarray) -> Batch:
        """A batch for `Policy.loss` of the chunks that start at `frames` [B]."""
        actions, padded = map(torch.from_numpy, self.robot.chunks(frames))
        return {**self.observations(frames), "action": actions, "action_is_pad": padded}

    def observations(self, frames: np.ndarray) -> Batch:
        """Images [B, 3, H, W] in [0, 1], states and instructions of these frames [B]."""
        return self.robot.finish(self.robot.observations(frames), 0)


class PairData(PairFolder):
    def __init__(self, root: Path, cameras: Sequence[str], chunk_size: int, **options: Any):
        super().__init__(root, cameras, chunk_size, **options)
        if not self.pairs:
            raise BurnishError(f"{root} has outcomes of episodes and no pairs", "pairs", "loss: kto, or loss: clone")

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, ids: Sequence[int]) -> tuple[Batch, torch.Tensor]:
        """Observations of the pairs `ids`, and their candidates [B, 2, T, A], chosen first.

        "action_is_pad" is [B, 2, T] and the same for both: a step that one of them lacks would count for the other
        alone. Images are those of the chosen episode, never augmented: both sides and the reference see the same.
        """
        frames = self.frames[np.asarray(ids)]
        actions, padded = chunks_of(self.robot, [self.pairs[int(i)] for i in ids], frames)
        padded[..., self.steps :] = True
        batch = self.observations(frames[:, 0])
        batch["action_is_pad"] = torch.from_numpy(padded)
        return batch, torch.from_numpy(actions)


class OutcomeData(PairFolder):
    """Single chunks with the outcome of their episode, for losses that need no pairs.

    Has the face of `PairData`: the second candidate of a chunk is the chunk of another one, which says how far the
    policy has moved from its reference in general.

    Args:
        every: frames between two chunks of an episode.

    Attributes:
        desirable: bool [N], from a success.
    """

    def __init__(self, root: Path, cameras: Sequence[str], chunk_size: int, *, every: int = 1, **options: Any):
        super().__init__(root, cameras, chunk_size, **options)
        episodes = self.robot.episode_index
        said = np.array([-1 if outcome is None else int(outcome) for outcome in self.outcomes])[episodes]
        first = np.searchsorted(episodes, episodes)
        place = np.arange(len(said)) - first
        self.starts = np.flatnonzero((said >= 0) & (place % every == 0))
        self.desirable = said[self.starts] == 1
        if not self.desirable.any() or self.desirable.all():
            missing = "failure" if self.desirable.any() else "success"
            raise BurnishError(f"no episode of {root} is labelled as a {missing}", "both outcomes",
                               "burnish data pairs --help")  # fmt: skip
        self.other = np.random.default_rng(0).permutation(len(self.starts))
        self.hash = f"{self.hash}-{every}"

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, ids: Sequence[int]) -> tuple[Batch, torch.Tensor]:
        """Observations, and candidates [B, 2, T, A]: the chunk that was executed there, and one from elsewhere."""
        own = self.starts[np.asarray(ids)]
        frames = np.stack([own, self.starts[self.other[np.asarray(ids)]]], 1)
        actions, padded = self.robot.chunks(frames)
        padded[..., self.steps :] = True
        batch = self.observations(own)
        batch["action_is_pad"] = torch.from_numpy(padded)
        return batch, torch.from_numpy(actions)
