"""The losses of a retrieval head, on unit vectors and on who belongs to whom; no network and no data in here.

After CrossVLA (Liu 2026, arXiv 2605.21854): InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) between two views of
one moment, and between two moments of one episode. Its code counts other frames of the same episode as negatives; here
they are neither, unless they are far away in time.

B anchors on this rank, K keys of all ranks, V views, D width of a vector.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Gather = Callable[[Tensor], Tensor]
"""The rows of all ranks, those of the first rank first, with gradient; the argument itself on one rank."""


class Moments(NamedTuple):
    """When frames were seen: `episode` and `time` (in frames), int64 [B] each."""

    episode: Tensor
    time: Tensor


def one_rank(rows: Tensor) -> Tensor:
    """The `Gather` of a process alone."""
    return rows


def all_ranks(rows: Tensor) -> Tensor:
    """The `Gather` of several: the gradient of a row is the sum over all ranks' losses."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows.contiguous()))


def related(queries: Moments, keys: Moments, window: int = 0, far: float = math.inf) -> tuple[Tensor, Tensor]:
    """Which keys are positives of a query, and which are neither positive nor negative: bool [B, K] each.

    Frames of one episode are positives up to `window` frames apart, negatives from `far` on, and neither between.
    Frames of other episodes are negatives.
    """
    same = queries.episode[:, None] == keys.episode[None]
    apart = (queries.time[:, None] - keys.time[None]).abs()
    positive = same & (apart <= window)
    return positive, same & ~positive & (apart < far)


def info_nce(queries: Tensor, keys: Tensor, positive: Tensor, neither: Tensor, scale: Tensor | float) -> Tensor:
    """Mean over queries of the mean over their positives of log(1 + sum over negatives of exp(s - s_positive)).

    With one positive that is InfoNCE; further positives do not push one another away (Khosla et al. 2020, arXiv
    2004.11362). A query without a positive counts nothing.

    Args:
        queries, keys: unit vectors [B, D] and [K, D].
        positive, neither: bool [B, K], see `related`.
        scale: one over the temperature.
    """
    scores = scale * queries @ keys.T
    # A finite floor: the gradient of a log-sum-exp over nothing but minus infinity is NaN.
    floor = torch.finfo(scores.dtype).min / 4
    against = scores.masked_fill(positive | neither, floor).logsumexp(1, keepdim=True)
    each = F.softplus(against - scores) * positive
    counts = positive.sum(1)
    return (each.sum(1) / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)


def view_loss(
    vectors: Tensor, moments: Moments, scale: Tensor | float, far: float = math.inf, gather: Gather = one_rank
) -> Tensor:
    """Symmetric InfoNCE between the views of one moment, mean over ordered pairs of views; 0 where there is one view.

    Args:
        vectors: [B, V, D].
        moments: when they were seen.
        far: frames of the same episode are negatives from so many frames on; by default never.
    """
    positive, neither = related(moments, Moments(*map(gather, moments)), 0, far)
    keys, views = gather(vectors), range(vectors.shape[1])
    pairs = [info_nce(vectors[:, a], keys[:, b], positive, neither, scale) for a in views for b in views if a != b]
    return torch.stack(pairs).mean() if pairs else vectors.sum() * 0.0


def time_loss(
    vectors: Tensor, partners: Tensor, moments: Moments, when: Moments, scale: Tensor | float, window: int, far: float,
    gather: Gather = one_rank,
) -> Tensor:  # fmt: skip
    """Symmetric InfoNCE between moments of one episode within `window` frames, in each view by itself.

    Args:
        vectors, partners: [B, V, D].
        moments, when: of both.
        window, far: see `related`; frames of the same episode that are `far` apart are its hard negatives.
    """
    sides = ((vectors, moments, partners, when), (partners, when, vectors, moments))
    terms = []
    for queries, asked, others, known in sides:
        positive, neither = related(asked, Moments(*map(gather, known)), window, far)
        keys = gather(others)
        terms += [info_nce(queries[:, v], keys[:, v], positive, neither, scale) for v in range(queries.shape[1])]
    return torch.stack(terms).mean()


def sentence_loss(
    vectors: Tensor, sentences: Tensor, which: Tensor, scale: Tensor | float, gather: Gather = one_rank
) -> Tensor:
    """Symmetric InfoNCE between frames and the instructions that they were recorded under.

    Args:
        vectors: [B, V, D].
        sentences: unit vectors [I, D] of all instructions, the same on every rank.
        which: [B] the instruction of each frame.
    """
    numbers, keys = torch.arange(len(sentences), device=which.device), gather(vectors)
    own, asked = which[:, None] == numbers, numbers[:, None] == gather(which)[None]
    terms = []
    for v in range(vectors.shape[1]):
        terms.append(info_nce(vectors[:, v], sentences, own, torch.zeros_like(own), scale))
        terms.append(info_nce(sentences, keys[:, v], asked, torch.zeros_like(asked), scale))
    return torch.stack(terms).mean()


def progress_loss(scores: Tensor, remaining: Tensor, which: Tensor, gather: Gather = one_rank) -> Tensor:
    """Pairs of frames of one task are ranked by the time to their episode's end: logistic loss, mean over pairs.

    Args:
        scores: [B], higher is nearer to the end.
        remaining: [B] frames to the end of the episode.
        which: [B] the task of each frame.
    """
    scores, remaining, which = gather(scores), gather(remaining), gather(which)
    later = (remaining[:, None] < remaining[None]) & (which[:, None] == which[None])
    losses = F.softplus(scores[None] - scores[:, None]) * later
    return losses.sum() / later.sum().clamp_min(1)
