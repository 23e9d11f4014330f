"""Exact search by matrix product in vectors of frames, and which episodes to take by it.

Exact up to a million vectors: 100,000 of 128 numbers are 51 MB, which a core reads in a few milliseconds.

Also curation by vectors: near-duplicates, outliers, idle stretches, and how few episodes cover a data set.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.data.vectors import REMEDY, Vectors, load_vectors, show

Project = Callable[[Tensor], Tensor]
"""Features [B, D] of an encoder to vectors [B, W]; a retrieval head is one."""
GROUP = 64
SCORES = 1 << 24
"""Scores that are held at once."""
MOMENTS = 8
"""Moments, evenly spaced over an episode, that stand for it."""


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Places of the k highest of scores [M], the highest first, of equal ones the first."""
    # The k highest maxima of groups are k scores: nothing below the least of them is among the best k.
    groups = scores[: len(scores) // GROUP * GROUP].reshape(-1, GROUP).max(1, initial=-np.inf)
    if len(groups) >= k:
        candidates = np.flatnonzero(scores >= np.partition(groups, len(groups) - k)[len(groups) - k])
    else:
        candidates = np.arange(len(scores))
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]


def search(queries: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k keys with the highest scalar products: scores and places, [Q, k] each.

    Args:
        queries: [Q, D] float32.
        keys: [M, D] float32, M >= k.
    """
    found = np.empty((2, len(queries), k))
    step = max(1, SCORES // len(keys))
    for first in range(0, len(queries), step):
        for row, scores in enumerate(queries[first : first + step] @ keys.T, first):
            places = best(scores, k)
            found[:, row] = scores[places], places
    return found[0].astype(np.float32), found[1].astype(np.int64)


class Index:
    """Vectors of length 1 that can be asked.

    Args:
        vectors: float32 [N, V, D], see `build`; view v of frame n is key n * V + v.
    """

    def __init__(self, vectors: Vectors):
        self.vectors = vectors
        if vectors.values.dtype != np.float32:
            raise BurnishError("vectors that are no index", "one that burnish data index wrote", REMEDY)
        self.keys = vectors.values.reshape(-1, vectors.values.shape[-1])

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """The index in a folder, memory-mapped."""
        return cls(load_vectors(folder))

    @property
    def views(self) -> int:
        return self.vectors.values.shape[1]

    def check(self, about: dict[str, Any]) -> None:
        """Raise BurnishError unless queries with these facts are of the same encoder and head as this index."""
        for name in ("encoder", "head"):
            one, other = (show(value) for value in (about[name], self.vectors.about[name]))
            if one != other:
                raise BurnishError(f"a query of {name} {one} against an index of {name} {other}",
                                   "the same for both", REMEDY)  # fmt: skip

    def ask(self, queries: np.ndarray, about: dict[str, Any], k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and places of the k nearest keys, [Q, k] each.

        Args:
            queries: unit vectors [Q, D].
            about: what they come from, see `check`.
            k: at most the number of keys.
        """
        self.check(about)
        if not 1 <= k <= len(self.keys):
            raise BurnishError(f"{k} neighbours of {len(self.keys)} vectors", f"1 to {len(self.keys)}")
        return search(np.ascontiguousarray(queries, np.float32), self.keys, k)


def build(features: Vectors, project: Project | None = None, head: str = "") -> Vectors:
    """The vectors of an index, float32 [N, V, W] of length 1.

    Args:
        features: what an encoder gave, see `encode_dataset`.
        project: the head; None takes the features as they are.
        head: its hash.
    """
    flat = features.values.reshape(-1, features.values.shape[-1])
    project = project or (lambda rows: torch.nn.functional.normalize(rows, dim=-1))
    with torch.no_grad():
        blocks = [project(torch.from_numpy(flat[i : i + 8192].astype(np.float32))) for i in range(0, len(flat), 8192)]
    values = torch.cat(blocks).numpy().reshape(*features.values.shape[:2], -1)
    return Vectors(values, features.frames, {**features.about, "head": head})


def signatures(vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [E] of the episodes and float32 [E, MOMENTS * V * D] of each: its vectors at evenly spaced moments.

    The squared distance of two is one minus the mean cosine of their aligned moments.
    """
    episodes, starts, counts = np.unique(vectors.frames["episode"], return_index=True, return_counts=True)
    spots = np.linspace(0, 1, MOMENTS)
    rows = [start + np.round(spots * (count - 1)).astype(int) for start, count in zip(starts, counts, strict=True)]
    flat = vectors.values[np.concatenate(rows)].astype(np.float32)
    return episodes, flat.reshape(len(episodes), -1) / np.sqrt(2 * MOMENTS * vectors.values.shape[1])


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Squared distances [E, F] of signatures."""
    squares = np.square(one).sum(1)[:, None] + np.square(other).sum(1)[None] - 2 * one @ other.T
    return np.maximum(squares, 0)


def nearest_episodes(index: Index, target: Vectors, k: int) -> list[tuple[int, float]]:
    """The k episodes of an index whose frames lie nearest to those of a target: number and mean cosine.

    An episode counts by the mean over its frames and views of the cosine with the nearest frame of the target (Du et
    al. 2023, Behavior Retrieval, arXiv 2304.08742, weighs single frames so).
    """
    index.check(target.about)
    keys = target.values.reshape(-1, target.values.shape[-1])
    near = search(np.asarray(index.keys), keys, 1)[0].reshape(len(index.vectors.frames), -1).mean(1)
    episodes, place = np.unique(index.vectors.frames["episode"], return_inverse=True)
    score = np.bincount(place, near) / np.bincount(place)
    order = np.argsort(-score, kind="stable")[:k]
    return [(int(episodes[i]), float(score[i])) for i in order]


def centres(vectors: Vectors, k: int) -> tuple[list[int], list[float]]:
    """Up to k episodes that cover a data set (greedy k-centre, Gonzalez 1985), and after each of them the farthest
    that an episode then is from its nearest centre: one minus the mean cosine of aligned moments.

    The first is the one nearest to the mean of all.
    """
    episodes, marks = signatures(vectors)
    chosen = [int(distances(marks, marks.mean(0, keepdims=True))[:, 0].argmin())]
    left = distances(marks, marks[chosen])[:, 0]
    radii = [float(left.max())]
    while len(chosen) < min(k, len(episodes)):
        chosen.append(int(left.argmax()))
        left = np.minimum(left, distances(marks, marks[chosen[-1:]])[:, 0])
        radii.append(float(left.max()))
    return [int(episodes[i]) for i in chosen], radii


NEAR = 0.2
"""Episodes nearer to one another than this share of the median distance to a nearest neighbour are near-duplicates."""
FAR = 5.0
"""Outliers are farther from their nearest neighbour than the median by so many median absolute deviations."""
STILL = 0.05
"""Frames are alike where they are nearer than this share of the episodes' usual step from frame to frame."""
SECONDS = 1.0
"""Shortest idle stretch."""
NEIGHBOURS = 9
"""Nearest episodes that are looked at for each, itself among them."""
MOST = 50
"""Findings of a kind that are kept."""
CURVE = 64


@dataclass(frozen=True)
class Curation:
    """What the vectors of a data set show. Distances are one minus the mean cosine of two episodes' aligned moments.

    Args:
        typical: median distance of an episode to its nearest one.
        duplicates: (episode, episode, distance) of near-duplicates, nearest first.
        outliers: (episode, distance to the nearest one), farthest first.
        idle: (episode, first frame, frame after the last, seconds) in which no view changes, longest first.
        cover: episodes in the order in which they cover the data set best.
        radii: after each of them, the farthest that an episode is from the nearest of those so far.
        rows: episode to the row of a frame in its middle, for a thumbnail.
    """

    encoder: str
    episodes: int
    typical: float
    duplicates: list[tuple[int, int, float]] = field(default_factory=list)
    outliers: list[tuple[int, float]] = field(default_factory=list)
    idle: list[tuple[int, int, int, float]] = field(default_factory=list)
    idle_share: float = 0.0
    cover: list[int] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)


def curate(vectors: Vectors, fps: float) -> Curation:
    """Look at an index (unit vectors of all frames, see `search.build`) of a data set of `fps` frames a second."""
    episodes, marks = signatures(vectors)
    # A signature has the length sqrt(1/2): the distance of two is one minus twice their scalar product.
    scores, places = search(marks, marks, min(NEIGHBOURS, len(marks)))
    apart = np.where(places == np.arange(len(marks))[:, None], np.inf, 1 - 2 * scores)
    nearest = apart.min(1)
    several = len(episodes) > 1
    typical = float(np.median(nearest)) if several else 0.0
    pairs = {(int(min(e, places[e, n])), int(max(e, places[e, n]))): max(0.0, float(apart[e, n]))
             for e, n in zip(*np.nonzero(apart <= NEAR * typical), strict=True)}  # fmt: skip
    twins = sorted(((int(episodes[a]), int(episodes[b]), far) for (a, b), far in pairs.items()), key=lambda one: one[2])
    spread = float(np.median(np.abs(nearest - typical))) if several else 0.0
    lonely = np.flatnonzero(nearest > typical + FAR * max(spread, 1e-6)) if len(episodes) > 2 else []
    strange = sorted(((int(episodes[i]), float(nearest[i])) for i in lonely), key=lambda found: -found[1])
    idle, share = idle_stretches(vectors, fps)
    cover, radii = centres(vectors, CURVE)
    starts, counts = np.unique(vectors.frames["episode"], return_index=True, return_counts=True)[1:]
    middles = vectors.frames["row"][starts + counts // 2]
    return Curation(
        vectors.about["spec"], len(episodes), typical, twins[:MOST], strange[:MOST], idle[:MOST], share, cover, radii,
        dict(zip(episodes.tolist(), middles.tolist(), strict=True)),
    )  # fmt: skip


def idle_stretches(vectors: Vectors, fps: float) -> tuple[list[tuple[int, int, int, float]], float]:
    """Stretches of at least SECONDS in which no view moves on, longest first, and the share of all frames in them.

    A frame is still where in every view its distance to the one before is below STILL times the median over the data
    set; of views that never move the median is zero, and they do not count.
    """
    values = vectors.values
    step = np.zeros(values.shape[:2], np.float32)
    for first in range(1, len(values), 4096):  # memory-mapped: block by block
        now, before = values[first : first + 4096], values[first - 1 : first - 1 + len(values[first : first + 4096])]
        step[first : first + len(now)] = np.square(now - before).sum(-1) / 2
    episode, time = vectors.frames["episode"], vectors.frames["time"]
    opening = np.append(True, episode[1:] != episode[:-1])
    usual = np.median(step[~opening], 0) if (~opening).any() else np.zeros(values.shape[1])
    moving = usual > 1e-9
    still = (step[:, moving] < STILL * usual[moving]).all(1) & ~opening & moving.any()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], still.astype(np.int8), [0]])))
    every, found = int(vectors.about["every"]), []
    for start, stop in edges.reshape(-1, 2):
        first, last = time[start] - every, time[stop - 1] + every
        if (last - first) / fps >= SECONDS:
            found.append((int(episode[start]), int(first), int(last), float((last - first) / fps)))
    frames = sum(last - first for _, first, last, _ in found) / every
    return sorted(found, key=lambda one: -one[3]), float(frames / len(values))
