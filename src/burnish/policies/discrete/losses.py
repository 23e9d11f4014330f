"""Losses and likelihoods of action tokens, and which of them a masked-diffusion policy does not see in training.

A noise schedule gives every block a share of hidden tokens and says whether the block is learned from; blocks that are
not are hidden as a whole. D2F (arXiv 2508.09192) and Fast-dVLA (arXiv 2603.25661) train on shares that grow from block
to block, so that a block can be decoded on top of unfinished earlier ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.registry import Registry


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, L] nats of `ids` [B, L] under `logits` [B, L, V]."""
    return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


def ordinal(logits: Tensor, values: Tensor, centres: Tensor) -> Tensor:
    """Distance between the expected and the true action, in normalised units: bins that are near count as near.

    DiscreteRTC trains with it beside the cross-entropy, with weight 0.1.

    Args:
        logits: [B, L, V].
        values: [B, L] true normalised actions.
        centres: [L, V] action of every id at every position.

    Returns:
        [B, L].
    """
    return ((logits.float().softmax(-1) * centres).sum(-1) - values).abs()


def repeat_last(actions: Tensor, padded: Tensor | None) -> Tensor:
    """Chunks [B, T, A] whose padded steps, bool [B, T], repeat the last action before them.

    They are trained like all others. Were they always hidden, a visible token in a late place would tell the policy
    that the episode goes on, and a decoder that unmasks late places first would tell it so about every episode.
    """
    if padded is None:
        return actions
    steps = torch.arange(actions.shape[1], device=actions.device)
    last = torch.where(padded.to(actions.device).bool(), 0, steps).cummax(1).values
    return actions.gather(1, last[..., None].expand_as(actions))


def inverse_share(hidden: Tensor, block: int) -> Tensor:
    """[B, L]: for each token the block's length over its number of hidden tokens (D2F divides by the share drawn).

    The weight 1 / t of masked diffusion, under which the loss is a bound of the likelihood.
    """
    blocks = hidden.view(len(hidden), -1, block).float()
    return (block / blocks.sum(-1).clamp_min(1)).repeat_interleave(block, dim=1)


def any_order_masks(noise: Tensor, time: Tensor, valid: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Hidden tokens of an unbiased estimate of the likelihood bound, from draws alone, and their weights.

    In every block m of its n valid tokens are hidden, m uniform in 1 .. n, the ones of least `noise`. The sum over
    hidden tokens of -n / m times the cross-entropy then has the bound of masked diffusion as its mean (the chain rule
    over a random order). Blocks share `time`, shifted by the golden ratio, which keeps each of them uniform.

    Args:
        noise: [B, L], continuous.
        time: [B] in (0, 1].
        valid: bool [B, L], False on padding, which stays hidden and counts nothing.
        block: tokens of a block; the bound is a sum over blocks, each given all earlier ones.

    Returns:
        hidden bool [B, L] and weights [B, L], 0 on tokens that are not scored.
    """
    B, L = noise.shape
    noise, valid = noise.view(B, L // block, block), valid.view(B, L // block, block)
    index = torch.arange(L // block, device=noise.device)
    share = (time[:, None].double() + index * ((math.sqrt(5) - 1) / 2)) % 1  # time 1 becomes 0: the same point
    share = torch.where(share == 0, 1.0, share)
    count = valid.sum(-1)
    hide = (share * count).ceil().clamp(min=1)
    rank = noise.masked_fill(~valid, torch.inf).argsort(dim=-1).argsort(dim=-1)
    hidden = (rank < hide[..., None]) & valid
    weight = hidden * (count / hide)[..., None]
    return (hidden | ~valid).view(B, L), weight.view(B, L).to(torch.float32)


@dataclass(frozen=True)
class Shares:
    """What a schedule returns.

    Args:
        hidden: [B, N] share of hidden tokens of each block, 1 hides all of them.
        learned: bool [B, N].
    """

    hidden: Tensor
    learned: Tensor


Schedule = Callable[..., Shares]
NOISE: Registry[Schedule] = Registry("noise schedule")
"""Schedules by name: schedule(batch size, number of blocks, generator, **options) -> Shares."""


def hide(shares: Shares, block: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the hidden tokens.

    Returns:
        Hidden tokens and those among them to learn from, bool [B, N * block]; at least one of the latter a sample.
    """
    share, learned = (x.repeat_interleave(block, dim=1) for x in (shares.hidden, shares.learned))
    order = torch.rand(share.shape, generator=generator, device=generator.device)
    hidden = (order < share) | ~learned
    # A sample of which nothing was hidden would teach nothing: hide the token that came closest to it.
    nearest = (order - share).masked_fill(~learned, torch.inf).argmin(dim=1, keepdim=True)
    return hidden.scatter(1, nearest, True), (hidden & learned).scatter(1, nearest, True)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in (0, 1]."""
    return 1 - torch.rand(shape, generator=generator, device=generator.device)


def _all(share: Tensor) -> Shares:
    return Shares(share, torch.ones_like(share, dtype=torch.bool))


@NOISE.register("uniform")
def uniform(batch: int, blocks: int, generator: torch.Generator) -> Shares:
    """One uniform share for the whole chunk: plain masked diffusion."""
    return _all(_uniform((batch, 1), generator).expand(-1, blocks))


@NOISE.register("cosine")
def cosine(batch: int, blocks: int, generator: torch.Generator) -> Shares:
    """One share for the whole chunk, cos(pi r / 2) with uniform r, as DD-VLA (arXiv 2508.20072) trains."""
    return _all(torch.cos(_uniform((batch, 1), generator) * math.pi / 2).clamp_min(1e-3).expand(-1, blocks))


@NOISE.register("sorted")
def sorted_uniform(batch: int, blocks: int, generator: torch.Generator) -> Shares:
    """Uniform shares in rising order."""
    return _all(_uniform((batch, blocks), generator).sort(dim=1).values)


@NOISE.register("d2f")
def d2f(batch: int, blocks: int, generator: torch.Generator, low: float = 0.2, high: float = 0.7) -> Shares:
    """D2F's released code: the first share uniform in [low, high), then steps of U(0, 1) (high - first) / (N - 1).

    Blocks are hardly ever hidden as a whole, yet at inference every block begins so.
    """
    first = low + (high - low) * torch.rand((batch, 1), generator=generator, device=generator.device)
    steps = torch.rand((batch, blocks - 1), generator=generator, device=generator.device)
    rise = torch.cumsum(steps * (high - first) / max(1, blocks - 1), dim=1)
    return _all(torch.cat([first, first + rise], dim=1).clamp(max=1))


@NOISE.register("pipeline")
def pipeline(batch: int, blocks: int, generator: torch.Generator, window: float = 4, whole: float = 0.5) -> Shares:
    """States that a pipelined decoder meets: known blocks, then 1 to `window` open ones, then absent ones.

    Shares of the open blocks are uniform and rising; with probability `whole` the last of them is hidden as a whole, as
    a block is when it joins.

    Args:
        window: most open blocks at a time.
    """
    device = generator.device
    first = torch.randint(blocks, (batch, 1), generator=generator, device=device)
    width = 1 + torch.randint(max(1, int(window)), (batch, 1), generator=generator, device=device)
    index = torch.arange(blocks, device=device)
    last = (first + width - 1).clamp(max=blocks - 1)
    is_open = (index >= first) & (index <= last)
    # Sorting with the others pushed to the end leaves the open blocks' shares in rising order at the front.
    share = _uniform((batch, blocks), generator).masked_fill(~is_open, torch.inf).sort(dim=1).values
    share = share.gather(1, (index - first).clamp_min(0))
    fresh = torch.rand((batch, 1), generator=generator, device=device) < whole
    share = torch.where(fresh & (index == last), 1.0, share)
    return Shares(torch.where(is_open, share, (index > last).to(share)), index <= last)
