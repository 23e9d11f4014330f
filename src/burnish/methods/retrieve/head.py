"""The head: features of a frame's view to a unit vector; and its folder, which knows the encoder that it was made for.

The folder has `head.safetensors` (weights, mean and deviation of the features) and `head.json` (sizes, encoder,
training data, options, SHA-256 of the weights).

Losses after CrossVLA (Liu 2026, arXiv 2605.21854): InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) between two
views of one moment, and between two moments of one episode. Its code counts other frames of the same episode as
negatives; here they are neither, unless they are far away in time.

B anchors on this rank, K keys of all ranks, V views, D width of a vector.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from burnish.core.errors import BurnishError, one_line
from burnish.core.files import new_folder, write_json
from burnish.core.options import number
from burnish.core.outputs import mark, require_own
from burnish.core.reading import read_object, regular_file
from burnish.data.vectors import show
from burnish.methods.retrieve.options import RetrieveConfig, make_config

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


KIND = "retrieval head"
WEIGHTS, ABOUT, FORMAT = "head.safetensors", "head.json", 1
WORDS = 512
"""Places of the hashed words of a sentence."""
LEAST_TEMPERATURE = 0.01
REMEDY = "burnish method retrieve train --help"


def sentence_features(texts: Sequence[str]) -> Tensor:
    """[B, WORDS] of sentences: their words and pairs of neighbouring words, hashed to places and scaled to length 1.

    Feature hashing (Weinberger et al. 2009, arXiv 0902.2206): no language model is needed, so sentences are told apart
    by their words alone.
    """
    found = torch.zeros(len(texts), WORDS)
    for row, text in zip(found, texts, strict=True):
        words = re.findall(r"\w+", text.lower())
        for token in (*words, *map(" ".join, zip(words, words[1:], strict=False))):
            digest = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "big")
            row[digest % WORDS] += 1.0 if digest >> 63 else -1.0
    return F.normalize(found, dim=1)


class Head(nn.Module):
    """Linear, GELU, linear, length 1 (CrossVLA: 1152, 512, 128; 656,000 parameters), on standardised features.

    Args:
        features: width of the features.
        generator: draws the weights (normal, by the layers' inputs; biases are zero).

    Attributes:
        mean, deviation: [features] of what it was trained on; 0 and 1 where it does not standardise.
    """

    def __init__(self, features: int, config: RetrieveConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(features, config.hidden) if config.hidden else None
        self.fc2 = nn.Linear(config.hidden, config.width) if config.hidden else None
        self.words = nn.Linear(WORDS, config.width, bias=False) if config.sentence_weight else None
        self.progress = nn.Linear(config.width, 1) if config.progress_weight else None
        self.log_scale = nn.Parameter(torch.tensor(1 / config.temperature).log(), requires_grad=config.learned)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        for layer in filter(None, (self.fc1, self.fc2, self.words, self.progress)):
            nn.init.normal_(layer.weight, 0.0, layer.in_features**-0.5, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Take mean and deviation from features [..., features]."""
        flat = features.reshape(-1, features.shape[-1]).double()
        self.mean.copy_(flat.mean(0))
        spread = flat.std(0, correction=0)
        self.deviation.copy_(spread.clamp_min(0.01 * float(spread.mean()) + 1e-12))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp_max(1 / LEAST_TEMPERATURE)

    def forward(self, features: Tensor) -> Tensor:
        """[..., features] to unit vectors [..., width]."""
        x = (features.to(self.mean.dtype) - self.mean) / self.deviation
        return F.normalize(x if self.fc1 is None else self.fc2(F.gelu(self.fc1(x))), dim=-1)

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [B, width] of instructions; BurnishError where it was trained without them."""
        if self.words is None:
            raise BurnishError("the head knows no sentences", "one trained with sentence_weight above 0", REMEDY)
        weight = self.words.weight
        return F.normalize(self.words(sentence_features(texts).to(weight)), dim=-1)

    def losses(
        self, vectors: Tensor, partners: Tensor, moments: Moments, when: Moments, remaining: Tensor, which: Tensor,
        texts: Sequence[str], gather: Gather = one_rank, rank: int = 0,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The weighted terms by name, those of weight 0 left out.

        Args:
            vectors, partners: [B, V, width] of anchors and of frames near them in time.
            moments, when: of both, see `Moments`.
            remaining: [B] frames to the end of an anchor's episode.
            which: [B] place of its instruction in `texts`.
            texts: all instructions of the data.
            gather, rank: of several processes; the losses then see the frames of all.
        """
        c, scale, terms = self.config, self.scale, {}
        if c.view_weight and vectors.shape[1] > 1:
            far = 1.0 if c.same_episode == "negative" else float("inf")
            terms["view"] = c.view_weight * view_loss(vectors, moments, scale, far, gather)
        if c.time_weight:
            both = moments, when
            if c.exact:  # each anchor is an episode of its own
                own = torch.arange(len(vectors), device=vectors.device) + rank * len(vectors)
                both = (Moments(own, torch.zeros_like(own)),) * 2
            terms["time"] = c.time_weight * time_loss(vectors, partners, *both, scale, c.window, c.far, gather)
        if self.words is not None:
            terms["sentence"] = c.sentence_weight * sentence_loss(vectors, self.sentences(texts), which, scale, gather)
        if self.progress is not None:
            score = self.progress(vectors.mean(1))[:, 0]
            terms["progress"] = c.progress_weight * progress_loss(score, remaining, which, gather)
        return terms


def partner_frames(rng: Any, frames: Any, starts: Any, ends: Any, config: RetrieveConfig) -> Any:
    """int64 [B] a frame within `window` of each of `frames`, in its episode; with `exact` the one `window` later.

    `starts` and `ends` [B] are the first frame of the episode and the one after its last; `rng` is numpy's.
    """
    step = rng.integers(1, config.window + 1, len(frames)) * rng.choice([-1, 1], len(frames))
    there = frames + (config.window if config.exact else step)
    outside = (there < starts) | (there >= ends)
    if not config.exact:
        there = (frames - step) * outside + there * ~outside
    return there.clip(starts, ends - 1)


def save_head(folder: Path, head: Head, encoder: dict[str, Any], **about: Any) -> str:
    """Write a head's folder, whole or not at all; returns the hash of its weights.

    Args:
        encoder: identity of what makes its features, see `data.vectors.Encoder`.
        about: whatever else should be known of it (data, cameras, seed, minutes).
    """
    require_own(folder, KIND)
    with new_folder(folder) as made:
        mark(made, KIND)
        save_file({name: one.detach().cpu().contiguous() for name, one in head.state_dict().items()}, made / WEIGHTS)
        digest = _digest(made / WEIGHTS)
        write_json(made / ABOUT, {
            "format": FORMAT, "encoder": encoder, "features": len(head.mean), "config": asdict(head.config),
            "normalisation": "mean and deviation of the training frames" if head.config.standardise else "none",
            "hash": digest, **about,
        })  # fmt: skip
    return digest


def load_head(folder: Path, encoder: dict[str, Any] | None = None) -> tuple[Head, dict[str, Any]]:
    """A head in evaluation mode and what head.json says; where the folder lies does not matter.

    Args:
        encoder: of the features that it is meant for; None asks for no particular one.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise BurnishError(f"no retrieval head in {folder}", f"{ABOUT} and {WEIGHTS}", REMEDY)
    about = read_object(folder / ABOUT, folder)
    path = regular_file(folder / WEIGHTS, folder)
    width, config = about.get("features"), about.get("config")
    if about.get("format") != FORMAT or not isinstance(config, dict) or not isinstance(about.get("encoder"), dict):
        raise BurnishError(f"{folder / ABOUT} describes no head of format {FORMAT}", "what burnish wrote", REMEDY)
    if not number(width) or not 1 <= width <= 1 << 20:
        raise BurnishError(f"{folder / ABOUT}: features is {str(width)[:40]}", "their number")
    if _digest(path) != about.get("hash"):
        raise BurnishError(f"{path} is not the file that {ABOUT} names", "the folder as it was written", REMEDY)
    if encoder is not None and encoder != about["encoder"]:
        raise BurnishError(f"the head in {folder} is for features of {show(about['encoder'])}",
                           f"one for {show(encoder)}", REMEDY)  # fmt: skip
    with torch.device("meta"):
        head = Head(int(width), make_config("default", config))
    try:
        head.load_state_dict(load_file(path), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise BurnishError(f"{path} does not fit {ABOUT} ({one_line(error, 120)})", "a whole folder", REMEDY) from None
    return head.eval().requires_grad_(False), about


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
