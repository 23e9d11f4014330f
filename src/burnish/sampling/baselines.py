"""Decoders that do not fit the block machine: one token after the other, and Fast-dLLM's approximate cache."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.sampling.blocks import not_finite
from burnish.sampling.plan import DecodePlan, check_legal, make_plan
from burnish.sampling.token_model import DECODERS, Decoded, Decoder, Prompt, Stream, TokenModel, sees, visible
from burnish.sampling.unmask import choose, likeliest


class AutoregressiveDecoder(Decoder):
    """Greedy decoding of a causal policy: as many forward passes as tokens, one position each, the prompt's the first.

    Args:
        model: a policy with `block` 1 and `shift`.
        plan: `legal` is used.
    """

    def __init__(self, model: TokenModel, plan: DecodePlan):
        if model.block != 1 or not model.shift:
            raise BurnishError(
                f"a policy with attention over blocks of {model.block}{'' if model.shift else ' and no shift'}",
                "one that was trained autoregressively (block 1, shift)",
                "decoder pipelined, or sequential",
            )
        check_legal(plan, model)
        self.model, self.plan = model, plan

    def decode(self, prompt: Prompt, prefix: Tensor, goal: int, stream: Stream | None) -> Decoded:
        model, num, device = self.model, len(prompt.states), prompt.states.device
        known = prefix.shape[1]
        ids = torch.full((num, model.length), model.mask_id or 0, device=device)
        ids[:, :known] = prefix
        unmasked, bad = torch.zeros_like(ids), torch.zeros((), dtype=torch.bool, device=device)
        if known >= goal:
            return Decoded(ids, passes=0, positions=0, unmasked=unmasked)
        slots = torch.arange(model.length, device=device)
        seen = sees(slots[:, None], slots[None], 1)
        cache = model.empty(prompt)
        logits = model.whole(prompt, prefix, visible(prompt.valid, seen[:known, :known]), cache)
        logits = logits[:, -1] if known else cache.prompt_logits
        positions = prompt.states.shape[1] + known
        for position in range(known, goal):
            if position > known:
                mask = visible(prompt.valid, seen[position - 1 : position, :position])
                at = slots[position - 1].expand(num, 1)
                logits = model.extend(ids[:, position - 1 : position], at, mask, cache)[:, 0]
                positions += 1
            ids[:, position] = likeliest(logits, self.plan)[0]
            bad |= ~torch.isfinite(logits).all()
            unmasked[:, position] = position - known + 1
            if stream is not None and (position + 1) % model.step_length == 0:
                stream((position + 1) // model.step_length, ids.clone())
        if bool(bad):
            raise not_finite(goal - known)
        return Decoded(ids, passes=goal - known, positions=positions, unmasked=unmasked)


class FastDLLMDecoder(Decoder):
    """Fast-dLLM with its dual cache: everything again when a block begins, then only that block's tokens.

    The other blocks' keys are stale while a block is refined, so tokens differ from an exact decode.

    Args:
        plan: `block`, `threshold`, `min_unmasked` and `legal` are used; blocks need not match the training pattern.
    """

    def __init__(self, model: TokenModel, plan: DecodePlan):
        plan = replace(plan, block=plan.block or model.block)
        if plan.order != "confidence":
            raise BurnishError(f"decoder fast_dllm: order {plan.order}", "confidence", "decoder confidence")
        check_legal(plan, model)
        if model.length % plan.block:
            raise BurnishError(f"blocks of {plan.block} do not divide a chunk of {model.length} tokens", "a divisor")
        plan_as_one = make_plan({**vars(plan), "block": model.length, "cache": not model.prompt_sees_actions}, {})
        plan_as_one.fit(model)
        self.model, self.plan = model, plan

    def decode(self, prompt: Prompt, prefix: Tensor, goal: int, stream: Stream | None) -> Decoded:
        model, plan, num = self.model, self.plan, len(prompt.states)
        mask_id = model.vocabulary  # as the plan has checked
        ids = torch.full((num, model.length), mask_id, device=prompt.states.device)
        ids[:, : prefix.shape[1]] = prefix
        unmasked = torch.zeros_like(ids)
        slots = torch.arange(model.length, device=ids.device)
        seen = sees(slots[:, None], slots[None], model.block)
        mask = visible(prompt.valid, seen)
        cache = model.empty(prompt)
        passes = positions = syncs = 0
        streamed = prefix.shape[1] // model.step_length
        for begin in range(prefix.shape[1] // plan.block * plan.block, goal, plan.block):
            inside, fresh, turn = slice(begin, begin + plan.block), True, 0
            while bool((ids[:, inside] == mask_id).any()):
                syncs += 1
                passes += 1
                turn += 1
                if turn > plan.block:
                    raise not_finite(passes)
                if fresh:
                    logits = model.whole(prompt, ids, mask, cache, see_actions=model.prompt_sees_actions)
                    before = cache.prompt_logits[:, None] if begin == 0 else logits[:, begin - 1 : begin]
                    logits = logits[:, inside]
                    positions += prompt.states.shape[1] + model.length
                    fresh = False
                else:
                    at = slots[inside].expand(num, -1)
                    logits = model.extend(ids[:, inside], at, mask[:, inside], cache)
                    positions += plan.block
                if model.shift:
                    logits = torch.cat((before, logits[:, :-1]), 1)
                best, confidence = likeliest(logits, plan)
                turns = torch.full((num, 1), turn, device=ids.device)
                masked = (ids[:, inside] == mask_id)[:, None]
                taken = choose(confidence[:, None], masked, turns.bool(), turns, plan)[:, 0]
                ids[:, inside] = torch.where(taken, best, ids[:, inside])
                unmasked[:, inside].masked_fill_(taken, passes)
            steps = min(begin + plan.block, goal) // model.step_length
            if stream is not None and steps > streamed:
                streamed = steps
                stream(steps, ids.clone())
        return Decoded(ids, passes=passes, positions=positions, unmasked=unmasked, host_syncs=syncs)


@DECODERS.register("autoregressive")
def autoregressive(model: TokenModel, **options: Any) -> AutoregressiveDecoder:
    """One token after the other."""
    return AutoregressiveDecoder(model, make_plan({}, options))


@DECODERS.register("fast_dllm")
def fast_dllm(model: TokenModel, **options: Any) -> FastDLLMDecoder:
    """Fast-dLLM (arXiv 2505.22618), dual cache, blocks of one control step."""
    return FastDLLMDecoder(
        model, make_plan({"block": model.step_length, "min_unmasked": "one", "threshold": 0.9}, options)
    )
