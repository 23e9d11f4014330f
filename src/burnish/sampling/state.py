"""What is known about a chunk while it is decoded, on the device: blocks open, activate, complete and are cached.

All functions change the state in place and read nothing back, so that a pass can be a CUDA graph. Shapes: B samples,
L tokens, N blocks of k tokens, R tokens of a forward pass. Column L of `ids` and `unmasked` is scrap, where padding
writes.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from burnish.sampling.plan import DecodePlan
from burnish.sampling.token_model import Prompt, sees
from burnish.sampling.unmask import choose


@dataclass
class BlockState:
    """Tensors of one decode.

    Args:
        ids: long [B, L + 1].
        unmasked: long [B, L + 1], pass that unmasked a token; 0 for a prefix and for what is still masked.
        rank: long [B, L + 1], which tokens come first, see `ranks`.
        opened: long [B], blocks that are fed or cached.
        cached: long [B], leading blocks whose keys and values are final.
        active: bool [B, N], fully activated blocks.
        turns: long [B, N], passes that a block has had.
        carry_ids: long [B], what the last cached position (or the prompt) predicts for the one after it; for `shift`.
        carry_confidence: float [B], its confidence.
        passes: long [], passes so far.
        goal: long [], leading tokens to decode (all of them unless there is an early exit).
        opened_at, active_at, cached_at: long [B, N], pass in which a block got there; 0 is never.
    """

    ids: Tensor
    unmasked: Tensor
    rank: Tensor
    opened: Tensor
    cached: Tensor
    active: Tensor
    turns: Tensor
    carry_ids: Tensor
    carry_confidence: Tensor
    passes: Tensor
    goal: Tensor
    opened_at: Tensor
    active_at: Tensor
    cached_at: Tensor

    def copy_(self, other: "BlockState") -> None:
        """Take over the values of `other` (same shapes), keeping this state's memory."""
        for entry in fields(self):
            getattr(self, entry.name).copy_(getattr(other, entry.name))

    def clone(self) -> "BlockState":
        return BlockState(*(getattr(self, entry.name).clone() for entry in fields(self)))


@dataclass(frozen=True)
class Layout:
    """Sizes that do not change during a decode, and the table of who sees whom.

    Args:
        length: L.
        step_length: tokens of a control step.
        executed: tokens that will be executed.
        seen: bool [L + 1, L], what an action token may attend to, by position; nothing for padding.
    """

    length: int
    mask_id: int
    step_length: int
    executed: int
    seen: Tensor

    @classmethod
    def of(cls, model, device: torch.device) -> "Layout":
        slots = torch.arange(model.length, device=device)
        seen = torch.zeros(model.length + 1, model.length, dtype=torch.bool, device=device)
        seen[:-1] = sees(slots[:, None], slots[None], model.block)
        return cls(model.length, model.mask_id, model.step_length, model.executed, seen)


def ranks(layout: Layout, plan: DecodePlan, num: int, seeds: Tensor | None) -> Tensor:
    """long [B, L + 1]: tokens of the lowest rank are unmasked first, confidence decides among equals."""
    device, places = layout.seen.device, torch.arange(layout.length + 1, device=layout.seen.device)
    if plan.order == "random":
        each = [0] * num if seeds is None else seeds.tolist()
        drawn = [torch.randperm(layout.length + 1, generator=torch.Generator().manual_seed(seed)) for seed in each]
        return torch.stack(drawn).to(device)
    by = {"time": places // layout.step_length, "executed": (places >= layout.executed).long()}
    return by.get(plan.order, torch.zeros_like(places)).expand(num, -1).clone()


def begin(
    layout: Layout, plan: DecodePlan, prefix: Tensor, goal: int, precision: torch.dtype, prompt: Prompt
) -> BlockState:
    """The state before the first pass: the blocks that `prefix` long [B, n] touches are open, and `append` more."""
    num, tokens = prefix.shape
    device, blocks = prefix.device, layout.length // plan.block
    whole = tokens // plan.block
    opened = min(whole + plan.append, -(-goal // plan.block))
    ids = torch.full((num, layout.length + 1), layout.mask_id, device=device)
    if prompt.carry is not None:
        ids[:, :-1] = prompt.carry
    ids[:, :tokens] = prefix
    ids[:, -1] = 0
    zeros = torch.zeros(num, blocks, dtype=torch.long, device=device)
    state = BlockState(
        ids=ids, unmasked=torch.zeros_like(ids), rank=ranks(layout, plan, num, prompt.seeds),
        opened=torch.full((num,), opened, device=device),
        cached=torch.zeros(num, dtype=torch.long, device=device), active=zeros.bool(), turns=zeros.clone(),
        carry_ids=torch.zeros(num, dtype=torch.long, device=device),
        carry_confidence=torch.zeros(num, dtype=precision, device=device),
        passes=torch.zeros((), dtype=torch.long, device=device),
        goal=torch.tensor(goal, device=device), opened_at=zeros.clone(), active_at=zeros.clone(), cached_at=zeros,
    )  # fmt: skip
    _activate(state, layout, plan)
    return state


def is_masked(state: BlockState, layout: Layout) -> Tensor:
    """bool [B, L]."""
    return state.ids[:, :-1] == layout.mask_id


def unfinished(state: BlockState, layout: Layout) -> Tensor:
    """bool [B], samples that lack a token before the goal."""
    wanted = torch.arange(layout.length, device=state.ids.device) < state.goal
    return (is_masked(state, layout) & wanted).any(-1)


def lay_out(state: BlockState, layout: Layout, plan: DecodePlan, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of the next pass: from each sample's first block that is not cached, padded to `count`.

    Returns:
        ids [B, R], positions [B, R] (L on padding) and what they see among the action slots, bool [B, R, L].
    """
    first = (state.cached * plan.block)[:, None]
    positions = first + torch.arange(count, device=first.device)
    live = (positions < (state.opened * plan.block)[:, None]) & unfinished(state, layout)[:, None]
    positions = torch.where(live, positions, layout.length)
    return state.ids.gather(1, positions), positions, layout.seen[positions]


def settle(
    state: BlockState, layout: Layout, plan: DecodePlan, positions: Tensor, ids: Tensor, confidence: Tensor
) -> None:
    """Unmask tokens after a pass and count the leading blocks as cached that were clean before it.

    A block whose last MASK falls in this pass is not: its keys and values were computed with the MASK in place.
    It is fed once more, clean, together with the active blocks (D2F's `to_cache`); caching it now changes the tokens.

    Args:
        positions: long [B, R] of `lay_out`.
        ids: long [B, R], likeliest id by position.
        confidence: float [B, R], that in it.
    """
    num, count = positions.shape
    own_ids, own_confidence = ids, confidence
    if plan.shift:
        ids = torch.cat((state.carry_ids[:, None], ids[:, :-1]), 1)
        confidence = torch.cat((state.carry_confidence[:, None], confidence[:, :-1]), 1)
    state.passes += 1
    live = positions < layout.length
    now = state.ids.gather(1, positions)
    masked = (live & (now == layout.mask_id)).view(num, -1, plan.block)
    blocks = (positions[:, :: plan.block] // plan.block).clamp_max(state.active.shape[1] - 1)
    live_block = live[:, :: plan.block]
    state.turns.scatter_add_(1, blocks, live_block.long())
    turns, active = state.turns.gather(1, blocks), state.active.gather(1, blocks)
    rank = None
    if plan.order != "confidence":
        rank = state.rank.gather(1, positions).view(num, -1, plan.block)
    taken = choose(confidence.view(num, -1, plan.block), masked, active, turns, plan, rank).view(num, count)
    state.ids.scatter_(1, positions, torch.where(taken, ids, now))
    state.unmasked.scatter_(1, positions, torch.where(taken, state.passes, state.unmasked.gather(1, positions)))
    if not plan.cache:
        return
    clean = live_block & ~masked.any(-1)
    fresh = clean.long().cumprod(1)
    run = fresh.sum(1)
    last = (run * plan.block - 1).clamp_min(0)[:, None]
    state.carry_ids.copy_(torch.where(run > 0, own_ids.gather(1, last)[:, 0], state.carry_ids))
    state.carry_confidence.copy_(torch.where(run > 0, own_confidence.gather(1, last)[:, 0], state.carry_confidence))
    state.cached += run
    number = torch.arange(state.active.shape[1], device=positions.device)
    newly = (number < state.cached[:, None]) & (state.cached_at == 0)
    state.cached_at.copy_(torch.where(newly, state.passes, state.cached_at))


def advance(state: BlockState, layout: Layout, plan: DecodePlan) -> None:
    """Between two passes: open blocks behind a tail that is decoded far enough, and activate successors."""
    tail = _decoded(state, layout, plan).gather(1, (state.opened - 1)[:, None])[:, 0]
    limit = -(-state.goal // plan.block)
    more = torch.minimum(state.opened + plan.append, limit)
    state.opened.copy_(torch.where(tail >= plan.need(plan.add), more, state.opened))
    _activate(state, layout, plan)


def summary(state: BlockState, layout: Layout, plan: DecodePlan) -> Tensor:
    """The few numbers that the host needs for the next pass, long [4]: its one synchronisation.

    Blocks to feed (0: all samples are done), slots in use, tokens whose logits are wanted, finished control steps.
    """
    todo = unfinished(state, layout)
    masked = is_masked(state, layout)
    fed = torch.where(todo, state.opened - state.cached, 0).max()
    slots = torch.where(todo, state.opened, 0).max() * plan.block
    inside = torch.arange(layout.length, device=masked.device) < (state.opened * plan.block)[:, None]
    wanted = (masked & inside & todo[:, None]).sum(-1).max()
    steps = (~masked).long().cumprod(1).sum(1).min() // layout.step_length
    return torch.stack((fed, slots, wanted, steps))


def wanted_tokens(state: BlockState, layout: Layout, plan: DecodePlan, positions: Tensor, count: int) -> Tensor:
    """long [B, count], the tokens of a pass that predict a masked one, in order; filled up with others."""
    predicted = (positions + int(bool(plan.shift))).clamp_max(layout.length)
    wanted = state.ids.gather(1, predicted) == layout.mask_id
    return (~wanted).long().argsort(dim=1, stable=True)[:, :count]


def _decoded(state: BlockState, layout: Layout, plan: DecodePlan) -> Tensor:
    """long [B, N], unmasked tokens of each block."""
    return (~is_masked(state, layout)).view(len(state.ids), -1, plan.block).sum(-1)


def _activate(state: BlockState, layout: Layout, plan: DecodePlan) -> None:
    """A block is fully activated once its predecessor is decoded far enough; the prompt always is."""
    before = _decoded(state, layout, plan).roll(1, 1)
    before[:, 0] = plan.block
    state.active |= before >= plan.need(plan.act)
    number = torch.arange(before.shape[1], device=before.device)
    is_opened = number < state.opened[:, None]
    begun = state.passes + 1
    state.opened_at.copy_(torch.where(is_opened & (state.opened_at == 0), begun, state.opened_at))
    state.active_at.copy_(torch.where(is_opened & state.active & (state.active_at == 0), begun, state.active_at))
