"""Which tokens are unmasked after a forward pass: pure functions of confidences; nothing is ever masked again."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from burnish.sampling.plan import DecodePlan

_LAST = 1 << 40
"""Rank of what is not masked."""


def likeliest(logits: Tensor, plan: DecodePlan) -> tuple[Tensor, Tensor]:
    """Likeliest legal id at each position and the model's confidence in it (at least float32; ties: the lowest id).

    Args:
        logits: [..., V] over the legal ids of the model.
        plan: `confidence`, `width` and `legal` are used.

    Returns:
        ids [...] and confidences [...], which are probabilities.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if plan.legal is not None:
        logits = logits.masked_fill(_illegal(plan.legal, logits.shape[-1], logits.device), -torch.inf)
    if plan.confidence == "max":
        peak, ids = logits.max(-1)
        return ids, (peak - logits.logsumexp(-1)).exp()
    ids = logits.argmax(-1)
    near = (torch.arange(logits.shape[-1], device=logits.device) - ids[..., None]).abs() <= plan.width
    return ids, (logits.softmax(-1) * near).sum(-1)


@lru_cache(maxsize=16)
def _illegal(legal: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    """bool [V]. Kept, because making it copies from the host, which a CUDA graph may not."""
    illegal = torch.ones(vocabulary, dtype=torch.bool, device=device)
    illegal[list(legal)] = False
    return illegal


def least_unmasked(num_masked: Tensor, passes: Tensor, plan: DecodePlan) -> Tensor:
    """How many tokens of a fully activated block are unmasked at least.

    Args:
        num_masked: long [...], MASK tokens in the block.
        passes: long, broadcasts: passes that the block has had, this one included (for the schedules).

    Returns:
        long [...], at least 1. (Algorithm 1 of the paper has floor(masked / n), which is 0 for the last tokens: it then
        never ends.)
    """
    if plan.min_unmasked == "one":
        return torch.ones_like(num_masked)
    if plan.min_unmasked == "floor":
        return (num_masked // plan.share).clamp_min(1)
    if plan.min_unmasked == "ceil":
        return (-(-num_masked // plan.share)).clamp_min(1)
    done = (passes.double() / plan.steps).clamp_max(1)
    left = torch.cos(math.pi / 2 * done) if plan.min_unmasked == "cosine" else 1 - done
    # Half a millionth keeps cos(pi / 2), which is not quite 0, and whole products from being rounded the wrong way.
    return (num_masked - (plan.block * left + 5e-7).floor().long()).clamp_min(1)


def choose(
    confidence: Tensor, is_masked: Tensor, active: Tensor, passes: Tensor, plan: DecodePlan, rank: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Tokens to unmask.

    Args:
        confidence: [B, N, k].
        is_masked: bool [B, N, k].
        active: bool [B, N], fully activated blocks; in the others what is confident is unmasked, possibly nothing.
        passes: long [B, N], see `least_unmasked`.
        rank: long [B, N, k], tokens of the lowest come first, confident or not, and confidence decides among equals;
            None is one rank for all.

    Returns:
        bool [B, N, k], a subset of `is_masked`; not empty in a fully activated block with masked tokens.
    """
    confidence = confidence.masked_fill(~is_masked, -1.0)
    confident = is_masked & (confidence >= plan.threshold) & (not plan.scheduled)
    count = least_unmasked(is_masked.sum(-1), passes, plan)[..., None]
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    equal = confidence >= confidence.gather(-1, order.gather(-1, count - 1))
    if rank is not None:
        rank = rank.masked_fill(~is_masked, _LAST)
        confident &= rank == rank.amin(-1, keepdim=True)
        order = order.gather(-1, rank.gather(-1, order).argsort(dim=-1, stable=True))
        last = order.gather(-1, count - 1)
        equal = (rank == rank.gather(-1, last)) & (confidence >= confidence.gather(-1, last))
    required = order.argsort(-1) < count
    if plan.ties == "all":
        required |= equal
    # What is no number is never unmasked, so that a decode of such logits comes to no end, which its caller notices.
    return confident | (required & is_masked & active[..., None] & ~confidence.isnan())
