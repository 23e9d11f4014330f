"""Losses and likelihoods of action tokens; pure functions of logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
