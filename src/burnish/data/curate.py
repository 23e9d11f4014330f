"""Curation by vectors: near-duplicate episodes, outliers, idle stretches, and how few episodes cover a data set."""

from dataclasses import dataclass, field

import numpy as np

from burnish.data.search import centres, search, signatures
from burnish.data.vectors import Vectors

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
        encoder: in words.
        episodes: how many.
        typical: median distance of an episode to its nearest one.
        duplicates: (episode, episode, distance) of near-duplicates, nearest first.
        outliers: (episode, distance to the nearest one), farthest first.
        idle: (episode, first frame, frame after the last, seconds) in which no view changes, longest first.
        idle_share: of all frames.
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
