"""Preference pairs: two chunks for one observation of a LeRobot data set, and an index that says which is better.

A pair folder is an ordinary LeRobotDataset with two files beside it:

    pairs.jsonl          one line a pair: {"chosen": [episode, frame], "rejected": [episode, frame]}
    burnish_pairs.json   where the pairs come from, and how far starts may differ

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
from burnish.core.reading import read_object
from burnish.core.types import Batch

INDEX, FACTS = "pairs.jsonl", "burnish_pairs.json"
FORMAT = 1
FAR = 10.0
"""Standard deviations from the mean beyond which an action is in other units than the statistics."""


@dataclass(frozen=True)
class Pair:
    """Chosen and rejected, each (episode, frame) of one data set."""

    chosen: tuple[int, int]
    rejected: tuple[int, int]


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


def write_index(root: Path, pairs: Sequence[Pair], facts: dict[str, Any], state_tolerance: float = 0.0) -> None:
    """Make the data set `root` a pair folder.

    Raises:
        BurnishError: no pairs, or the same one twice.
    """
    if not pairs:
        raise BurnishError("no pairs", "at least one success and one failure from the same start",
                           "more rollouts, --action-noise for a policy that always acts alike, or one that neither "
                           "always fails nor always succeeds")  # fmt: skip
    check_unique(pairs)
    lines = [json.dumps({"chosen": list(p.chosen), "rejected": list(p.rejected)}) + "\n" for p in pairs]
    write_json(root / FACTS, {"format": FORMAT, "pairs": len(pairs), "state_tolerance": state_tolerance, **facts})
    write_text(root / INDEX, "".join(lines))


def check_unique(pairs: Sequence[Pair]) -> None:
    """Raise BurnishError for a pair that occurs twice, or in both directions."""
    seen: set[Pair] = set()
    for pair in pairs:
        if pair in seen or Pair(pair.rejected, pair.chosen) in seen:
            again = "twice" if pair in seen else "in both directions"
            raise BurnishError(f"the pair {pair.chosen} over {pair.rejected} occurs {again}", "each pair once")
        seen.add(pair)


def read_labels(path: Path) -> list[Pair]:
    """Pairs from a file of human or programmatic labels: JSON lines {"chosen": ..., "rejected": ...}.

    Each side is an episode number, [episode, frame], or {"episode": e, "frame": f}; without a frame, 0.
    """
    if not path.is_file():
        raise BurnishError(f"no file {path}", 'JSON lines such as {"chosen": 3, "rejected": 5}')
    pairs = []
    for count, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append(Pair(_place(row["chosen"]), _place(row["rejected"])))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise BurnishError(f"{path}:{count} is no pair ({type(error).__name__}: {error})",
                               '{"chosen": [episode, frame], "rejected": [episode, frame]}') from error  # fmt: skip
    return pairs


def _place(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        place = value["episode"], value.get("frame", 0)
    else:
        place = tuple(value) if isinstance(value, list) else (value, 0)
    if len(place) != 2 or not all(type(item) is int for item in place):
        raise ValueError(f"{value} is no episode and frame")
    return place


class PairData:
    """The pairs of a folder as batches.

    Args:
        root: pair folder.
        cameras: of the policy.
        chunk_size: T.
        image_size, cache_dir: see burnish.data.frames.open_frames.
        steps: of a chunk that are compared; 0 means all.

    Attributes:
        hash: changes with the data set or the index.
        successes: indices of all frames of the chosen episodes.

    Raises:
        BurnishError: no pair folder, a place outside the data set, a pair of different tasks or starts, the same
            action on both sides, actions that are not finite.
    """

    def __init__(
        self, root: Path, cameras: Sequence[str], chunk_size: int, *, image_size: int = 0, cache_dir: str = "",
        steps: int = 0, progress: bool = True,
    ):  # fmt: skip
        from burnish.data.loader import RobotData

        if not (root / INDEX).is_file() or not (root / FACTS).is_file():
            raise BurnishError(f"no pairs in {root} (it has no {INDEX})", "a pair folder", "burnish data pairs --help")
        self.facts = read_object(root / FACTS)
        tolerance = self.facts.get("state_tolerance", 0.0)
        if self.facts.get("format") != FORMAT or not number(tolerance) or tolerance < 0:
            raise BurnishError(f"{root / FACTS} has format {self.facts.get('format')} and state_tolerance {tolerance}",
                               f"format {FORMAT} and a number of at least 0")  # fmt: skip
        self.robot = RobotData(root, cameras, chunk_size, 1, 0, image_size=image_size, cache_dir=cache_dir,
                               augmented=False, progress=progress)  # fmt: skip
        self.root, self.chunk_size, self.steps = root, chunk_size, steps or chunk_size
        self.pairs = read_labels(root / INDEX)
        if len(self.pairs) != self.facts.get("pairs"):
            raise BurnishError(f"{root / INDEX} has {len(self.pairs)} pairs",
                               f"{self.facts.get('pairs')}, as {FACTS} says")  # fmt: skip
        check_unique(self.pairs)
        episodes = self.robot.episode_index
        self._first = np.searchsorted(episodes, np.arange(self.robot.meta.total_episodes))
        self._end = np.searchsorted(episodes, np.arange(self.robot.meta.total_episodes), side="right")
        self.frames = np.array([[self._frame(p.chosen), self._frame(p.rejected)] for p in self.pairs])  # [N, 2]
        self._check()
        chosen = sorted({p.chosen[0] for p in self.pairs})
        self.successes = np.concatenate([np.arange(self._first[e], self._end[e]) for e in chosen])
        index = hashlib.sha256((root / INDEX).read_bytes()).hexdigest()[:16]
        self.hash = f"{self.robot.hash}-{index}"

    def __len__(self) -> int:
        return len(self.pairs)

    def _frame(self, place: tuple[int, int]) -> int:
        episode, frame = place
        if not 0 <= episode < len(self._first):
            raise BurnishError(f"{self.root}/{INDEX} names episode {episode}", f"0 to {len(self._first) - 1}")
        if not 0 <= frame < self._end[episode] - self._first[episode]:
            raise BurnishError(f"{self.root}/{INDEX} names frame {frame} of episode {episode}",
                               f"0 to {self._end[episode] - self._first[episode] - 1}")  # fmt: skip
        return int(self._first[episode] + frame)

    def _check(self) -> None:
        data, tolerance = self.robot, float(self.facts.get("state_tolerance", 0.0))
        tasks = data.task_index[self.frames]
        for i in np.flatnonzero(tasks[:, 0] != tasks[:, 1])[:1]:
            one, two = (data.tasks[int(t)] for t in tasks[i])
            raise BurnishError(f"pair {i} of {self.root} compares '{one}' with '{two}'", "one task in a pair")
        if data.states is not None:
            apart = np.abs(data.states[self.frames[:, 0]] - data.states[self.frames[:, 1]]).max(1)
            for i in np.flatnonzero(~(apart <= tolerance))[:1]:
                found = f"pair {i} of {self.root} starts from states that differ by {apart[i]:.3g}"
                fix = "pair rollouts of the same initial state, or import with --state-tolerance"
                raise BurnishError(found, f"the same start (at most {tolerance:g})", fix)
        actions = data.chunks(self.frames)[0]
        for i in np.flatnonzero(~np.isfinite(actions).all((1, 2, 3)))[:1]:
            raise BurnishError(f"pair {i} of {self.root} has actions that are not finite", "numbers")
        for i in np.flatnonzero((actions[:, 0] == actions[:, 1]).all((1, 2)))[:1]:
            raise BurnishError(f"pair {i} of {self.root} has the same actions on both sides", "two different chunks")

    def check_units(self, stats: dict[str, Any]) -> None:
        """Raise BurnishError when the actions cannot be in the units of `stats`, LeRobot's statistics of "action"."""
        mean, std = (np.asarray(stats[k], np.float64).reshape(-1) for k in ("mean", "std"))
        actions = self.robot.actions[self.robot.indices].astype(np.float64)
        if actions.shape[1] != len(mean):
            raise BurnishError(f"{self.root} has actions of {actions.shape[1]} dimensions", f"{len(mean)}")
        z = (actions - mean) / np.maximum(std, 1e-8)
        moving = std > 1e-6
        far = float((np.abs(z[:, moving]) > FAR).mean())
        ratio = actions.std(0)[moving] / std[moving]
        if far > 0.01 or (ratio > 5 * FAR).any() or (len(ratio) and (ratio < 1 / (5 * FAR)).all()):
            raise BurnishError(
                f"the actions of {self.root} do not fit the policy's statistics ({far:.0%} lie more than {FAR:g} "
                f"standard deviations away; spread {ratio.min():.3g} to {ratio.max():.3g} of theirs)",
                "actions in environment units, as the policy was trained on", "do not normalise them beforehand",
            )  # fmt: skip

    def batch(self, ids: Sequence[int]) -> tuple[Batch, torch.Tensor]:
        """Observations of the pairs `ids`, and their candidates [B, 2, T, A], chosen first.

        "action_is_pad" is [B, 2, T] and the same for both: a step that one of them lacks would count for the other
        alone. Images are those of the chosen episode, never augmented: both sides and the reference see the same.
        """
        frames = self.frames[np.asarray(ids)]
        actions, padded = self.robot.chunks(frames)
        padded = np.broadcast_to(padded.any(1, keepdims=True), padded.shape).copy()
        padded[..., self.steps :] = True
        batch = self.observations(frames[:, 0])
        batch["action_is_pad"] = torch.from_numpy(padded)
        return batch, torch.from_numpy(actions)

    def demonstrations(self, frames: np.ndarray) -> Batch:
        """A batch for `Policy.loss` of the chunks that start at `frames` [B]."""
        actions, padded = map(torch.from_numpy, self.robot.chunks(frames))
        return {**self.observations(frames), "action": actions, "action_is_pad": padded}

    def observations(self, frames: np.ndarray) -> Batch:
        """Images [B, 3, H, W] in [0, 1], states and instructions of these frames [B]."""
        return self.robot.finish(self.robot.observations(frames), 0)
