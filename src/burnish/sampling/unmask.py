"""Which masked tokens are committed after a pass: pure functions of confidences; nothing is ever masked again."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from burnish.sampling.plan import DecodePlan


def confidence(logits: Tensor, plan: DecodePlan) -> tuple[Tensor, Tensor]:
    """Likeliest legal id of each row and how sure the model is of it (at least float32; ties: the lowest id).

    Args:
        logits: [..., V] over the legal ids of the model.
        plan: `confidence`, `width` and `legal` are used.

    Returns:
        ids [...] and probabilities [...].
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


def forced_count(num_open: Tensor, passes: Tensor, plan: DecodePlan) -> Tensor:
    """How many tokens a fully activated block commits at least.

    Args:
        num_open: long [...], MASK tokens in the block.
        passes: long, broadcasts: passes that the block has had, this one included (for the schedules).
        plan: the rule.

    Returns:
        long [...], at least 1. (Algorithm 1 of the paper has floor(open / n), which is 0 for the last tokens: it then
        never ends.)
    """
    if plan.forced == "one":
        return torch.ones_like(num_open)
    if plan.forced == "floor":
        return (num_open // plan.share).clamp_min(1)
    if plan.forced == "ceil":
        return (-(-num_open // plan.share)).clamp_min(1)
    done = (passes.double() / plan.steps).clamp_max(1)
    left = torch.cos(math.pi / 2 * done) if plan.forced == "cosine" else 1 - done
    # Half a millionth keeps cos(pi / 2), which is not quite 0, and whole products from being rounded the wrong way.
    return (num_open - (plan.block * left + 5e-7).floor().long()).clamp_min(1)


def choose(sure: Tensor, is_open: Tensor, active: Tensor, passes: Tensor, plan: DecodePlan) -> Tensor:
    """Tokens to commit.

    Args:
        sure: [B, N, k] confidences.
        is_open: bool [B, N, k], True on MASK.
        active: bool [B, N], fully activated blocks; the others commit what is confident, possibly nothing.
        passes: long [B, N], see `forced_count`.
        plan: the rule.

    Returns:
        bool [B, N, k], a subset of `is_open`; not empty in a fully activated block with open tokens.
    """
    sure = sure.masked_fill(~is_open, -1.0)
    confident = is_open & (sure >= plan.conf) & (not plan.scheduled)
    count = forced_count(is_open.sum(-1), passes, plan)
    ranked, order = sure.sort(dim=-1, descending=True, stable=True)
    if plan.ties == "all":
        last = ranked.gather(-1, (count - 1)[..., None])
        forced = sure >= last
    else:
        place = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        forced = place < count[..., None]
    return confident | (forced & is_open & active[..., None])
