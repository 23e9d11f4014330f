"""What is known about a chunk while it is decoded, on the device: blocks open, activate, complete and freeze.

All functions change the state in place and read nothing back, so that a pass can be a CUDA graph. Shapes: B samples, L
tokens, N blocks of k tokens, R rows of a pass. Column L of `ids` and `committed` is scrap, where padding rows write.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from burnish.sampling.plan import DecodePlan
from burnish.sampling.token_model import sees
from burnish.sampling.unmask import choose


@dataclass
class BlockState:
    """Tensors of one decode.

    Args:
        ids: long [B, L + 1].
        committed: long [B, L + 1], pass that committed a token; 0 for a prefix and for what is still open.
        opened: long [B], blocks that are fed or frozen.
        frozen: long [B], leading blocks whose keys and values are final.
        active: bool [B, N], fully activated blocks.
        turns: long [B, N], passes that a block has had.
        carry_ids: long [B], what the last frozen row (or the prompt) says about the token after it; for `shift`.
        carry_sure: float [B], how sure it is.
        passes: long [], passes so far.
        goal: long [], leading tokens to decode (all of them unless there is an early exit).
        opened_at, active_at, frozen_at: long [B, N], pass in which a block got there; 0 is never.
    """

    ids: Tensor
    committed: Tensor
    opened: Tensor
    frozen: Tensor
    active: Tensor
    turns: Tensor
    carry_ids: Tensor
    carry_sure: Tensor
    passes: Tensor
    goal: Tensor
    opened_at: Tensor
    active_at: Tensor
    frozen_at: Tensor

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
        mask_id: the id of MASK.
        step_length: tokens of a control step.
        seen: bool [L + 1, L], what an action row may attend to, by position; nothing for padding.
    """

    length: int
    mask_id: int
    step_length: int
    seen: Tensor

    @classmethod
    def of(cls, model, device: torch.device) -> "Layout":
        slots = torch.arange(model.length, device=device)
        seen = torch.zeros(model.length + 1, model.length, dtype=torch.bool, device=device)
        seen[:-1] = sees(slots[:, None], slots[None], model.block)
        return cls(model.length, model.mask_id, model.step_length, seen)


def begin(layout: Layout, plan: DecodePlan, prefix: Tensor, goal: int, sure: torch.dtype) -> BlockState:
    """The state before the first pass: the blocks that `prefix` long [B, n] touches are open, and `append` more."""
    num, tokens = prefix.shape
    device, blocks = prefix.device, layout.length // plan.block
    whole = tokens // plan.block
    opened = min(whole + plan.append, -(-goal // plan.block))
    ids = torch.full((num, layout.length + 1), layout.mask_id, device=device)
    ids[:, :tokens] = prefix
    ids[:, -1] = 0
    zeros = torch.zeros(num, blocks, dtype=torch.long, device=device)
    state = BlockState(
        ids=ids, committed=torch.zeros_like(ids), opened=torch.full((num,), opened, device=device),
        frozen=torch.zeros(num, dtype=torch.long, device=device), active=zeros.bool(), turns=zeros.clone(),
        carry_ids=torch.zeros(num, dtype=torch.long, device=device),
        carry_sure=torch.zeros(num, dtype=sure, device=device), passes=torch.zeros((), dtype=torch.long, device=device),
        goal=torch.tensor(goal, device=device), opened_at=zeros.clone(), active_at=zeros.clone(), frozen_at=zeros,
    )  # fmt: skip
    _activate(state, layout, plan)
    return state


def is_open(state: BlockState, layout: Layout) -> Tensor:
    """bool [B, L], tokens that are still MASK."""
    return state.ids[:, :-1] == layout.mask_id


def unfinished(state: BlockState, layout: Layout) -> Tensor:
    """bool [B], samples that lack a token before the goal."""
    wanted = torch.arange(layout.length, device=state.ids.device) < state.goal
    return (is_open(state, layout) & wanted).any(-1)


def lay_out(state: BlockState, layout: Layout, plan: DecodePlan, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the next pass: from each sample's first block that is not frozen, padded to `rows`.

    Returns:
        ids [B, R], positions [B, R] (L on padding) and what they see among the action slots, bool [B, R, L].
    """
    first = (state.frozen * plan.block)[:, None]
    positions = first + torch.arange(rows, device=first.device)
    live = (positions < (state.opened * plan.block)[:, None]) & unfinished(state, layout)[:, None]
    positions = torch.where(live, positions, layout.length)
    return state.ids.gather(1, positions), positions, layout.seen[positions]


def settle(state: BlockState, layout: Layout, plan: DecodePlan, positions: Tensor, ids: Tensor, sure: Tensor) -> None:
    """Commit tokens after a pass and freeze the leading blocks that were clean before it.

    A block whose last MASK falls in this pass is not frozen: its keys and values were computed with the MASK in place.
    It is fed once more, clean, together with the active blocks (D2F's `to_cache`); freezing it now changes the tokens.

    Args:
        state: before the pass.
        layout: sizes.
        plan: the rule.
        positions: long [B, R] of `lay_out`.
        ids: long [B, R], likeliest id by row.
        sure: float [B, R], its confidence.
    """
    num, rows = positions.shape
    row_ids, row_sure = ids, sure
    if plan.shift:
        ids = torch.cat((state.carry_ids[:, None], ids[:, :-1]), 1)
        sure = torch.cat((state.carry_sure[:, None], sure[:, :-1]), 1)
    state.passes += 1
    live = positions < layout.length
    now = state.ids.gather(1, positions)
    masked = (live & (now == layout.mask_id)).view(num, -1, plan.block)
    blocks = (positions[:, :: plan.block] // plan.block).clamp_max(state.active.shape[1] - 1)
    live_block = live[:, :: plan.block]
    state.turns.scatter_add_(1, blocks, live_block.long())
    turns, active = state.turns.gather(1, blocks), state.active.gather(1, blocks)
    taken = choose(sure.view(num, -1, plan.block), masked, active, turns, plan).view(num, rows)
    state.ids.scatter_(1, positions, torch.where(taken, ids, now))
    state.committed.scatter_(1, positions, torch.where(taken, state.passes, state.committed.gather(1, positions)))
    if not plan.cache:
        return
    clean = live_block & ~masked.any(-1)
    fresh = clean.long().cumprod(1)
    run = fresh.sum(1)
    last = (run * plan.block - 1).clamp_min(0)[:, None]
    state.carry_ids.copy_(torch.where(run > 0, row_ids.gather(1, last)[:, 0], state.carry_ids))
    state.carry_sure.copy_(torch.where(run > 0, row_sure.gather(1, last)[:, 0], state.carry_sure))
    state.frozen += run
    number = torch.arange(state.active.shape[1], device=positions.device)
    newly = (number < state.frozen[:, None]) & (state.frozen_at == 0)
    state.frozen_at.copy_(torch.where(newly, state.passes, state.frozen_at))


def advance(state: BlockState, layout: Layout, plan: DecodePlan) -> None:
    """Between two passes: open blocks behind a tail that is decoded far enough, and activate successors."""
    tail = _decoded(state, layout, plan).gather(1, (state.opened - 1)[:, None])[:, 0]
    limit = -(-state.goal // plan.block)
    more = torch.minimum(state.opened + plan.append, limit)
    state.opened.copy_(torch.where(tail >= plan.need(plan.add), more, state.opened))
    _activate(state, layout, plan)


def summary(state: BlockState, layout: Layout, plan: DecodePlan) -> Tensor:
    """The few numbers that the host needs for the next pass, long [4]: its one synchronisation.

    Blocks to feed (0: all samples are done), slots in use, rows whose logits are wanted, finished control steps.
    """
    todo = unfinished(state, layout)
    masked = is_open(state, layout)
    fed = torch.where(todo, state.opened - state.frozen, 0).max()
    slots = torch.where(todo, state.opened, 0).max() * plan.block
    inside = torch.arange(layout.length, device=masked.device) < (state.opened * plan.block)[:, None]
    wanted = (masked & inside & todo[:, None]).sum(-1).max()
    steps = (~masked).long().cumprod(1).sum(1).min() // layout.step_length
    return torch.stack((fed, slots, wanted, steps))


def wanted_rows(state: BlockState, layout: Layout, plan: DecodePlan, positions: Tensor, count: int) -> Tensor:
    """long [B, count], the rows of a pass that tell an open token, in order; filled up with others."""
    told = (positions + int(bool(plan.shift))).clamp_max(layout.length)
    wanted = state.ids.gather(1, told) == layout.mask_id
    return (~wanted).long().argsort(dim=1, stable=True)[:, :count]


def _decoded(state: BlockState, layout: Layout, plan: DecodePlan) -> Tensor:
    """long [B, N], committed tokens of each block."""
    return (~is_open(state, layout)).view(len(state.ids), -1, plan.block).sum(-1)


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
