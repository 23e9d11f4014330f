"""The decoder behind every masked one: forward passes over open blocks until no MASK is left; a plan says how.

Pipelined decoding is section 3.4 of Fast-dVLA (arXiv 2603.25661); a single block as long as the chunk is MaskGIT.
"""

from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.sampling.passes import Buffers, Passes
from burnish.sampling.plan import DecodePlan, make_plan
from burnish.sampling.state import BlockState, Layout, begin
from burnish.sampling.token_model import DECODERS, Decoded, Decoder, Prompt, Stream, TokenModel

# Keeps its buffers and graphs for so many shapes of prompt.
_MAX_SHAPES = 4


class BlockDecoder(Decoder):
    """Decodes chunks of one model by one plan.

    Args:
        plan: checked against the model here.
    """

    carries = True

    def __init__(self, model: TokenModel, plan: DecodePlan):
        self.model, self.plan = model, plan.fit(model)
        self.passes, self.draws = Passes(model, self.plan), self.plan.order == "random"
        self._layout: Layout | None = None
        self._buffers: dict[Any, Buffers] = {}

    def decode(self, prompt: Prompt, prefix: Tensor, goal: int, stream: Stream | None) -> Decoded:
        model, plan, device = self.model, self.plan, prompt.states.device
        if self._layout is None or self._layout.seen.device != device:
            self._layout, self._buffers = Layout.of(model, device), {}
        layout = self._layout
        precision = torch.promote_types(prompt.states.dtype, torch.float32)  # of confidences
        buffers = self._prepare(prompt, begin(layout, plan, prefix, goal, precision, prompt))
        state = buffers.state
        streamed = prefix.shape[1] // model.step_length
        passes = syncs = positions = 0
        known = prompt.carry is not None and not bool((prompt.carry[:, :goal] == layout.mask_id).any())
        if prefix.shape[1] < goal and not known:
            opened = min(prefix.shape[1] // plan.block + plan.append, -(-goal // plan.block))
            outcome = self.passes.first(buffers, layout, opened)
            positions += prompt.states.shape[1] + opened * plan.block
            while True:
                passes += 1
                fed, slots, wanted, steps = outcome.tolist()
                syncs += 1
                if stream is not None and steps > streamed:
                    streamed = steps
                    stream(steps, state.ids[:, :-1].clone())
                if not fed:
                    break
                if passes > model.length:
                    raise not_finite(passes)
                if plan.cache:
                    blocks = self.passes.blocks(fed, device)
                    outcome = self.passes.next(buffers, layout, blocks, slots, wanted)
                else:
                    blocks = fed
                    outcome = self.passes.first(buffers, layout, blocks)
                    positions += prompt.states.shape[1]
                positions += blocks * plan.block
        # Pass by which each block of each sample was opened, fully activated, cached, long [B, N]; 0 is never.
        history = {name: getattr(state, f"{name}_at").clone() for name in ("opened", "active", "cached")}
        return Decoded(
            ids=state.ids[:, :-1].clone(), passes=passes, positions=positions, unmasked=state.unmasked[:, :-1].clone(),
            host_syncs=syncs, detail={"blocks": history},
        )  # fmt: skip

    def _prepare(self, prompt: Prompt, state: BlockState) -> Buffers:
        """Buffers for prompts of this shape; where graphs refer to them, prompt and state are copied into place."""
        graphed = self.passes.graphed(prompt.states.device)
        key = (prompt.states.shape, prompt.states.dtype, graphed, torch.is_inference_mode_enabled())
        buffers = self._buffers.pop(key, None)
        if buffers is None:
            kept = Prompt(prompt.states.clone(), prompt.valid.clone()) if graphed else prompt
            buffers = Buffers(kept, self.model.empty(kept), state)
        elif graphed:
            buffers.prompt.states.copy_(prompt.states)
            buffers.prompt.valid.copy_(prompt.valid)
            buffers.state.copy_(state)
        else:
            buffers.prompt, buffers.state = prompt, state
            buffers.cache.valid = prompt.valid
        self._buffers[key] = buffers
        if len(self._buffers) > _MAX_SHAPES:
            self._buffers.pop(next(iter(self._buffers)))
        return buffers


def not_finite(passes: int) -> BurnishError:
    """Every pass unmasks a token, unless its confidence is no number."""
    return BurnishError(f"decoding came to no end in {passes} passes: the policy's logits are not finite", "numbers",
                        "look at images, state and weights for NaN")  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"min_unmasked": "floor", "act": 4 / 7, "threshold": 0.5},
    # Half is the same as 4/7 for 7 tokens. A block of an even length reaches it one pass earlier.
    "fast": {"min_unmasked": "ceil", "act": 1 / 2},
    # All blocks at once, none waits for its predecessor: the passes of a single block, however long the chunk.
    "together": {"min_unmasked": "ceil", "add": 0.0, "act": 0.0, "append": 1 << 16},
}


def preset_values(preset: str) -> dict[str, Any]:
    """Options of a preset. Raises BurnishError for an unknown one."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise BurnishError(f"unknown preset '{preset}'", f"one of {', '.join(PRESETS)}")
    return PRESETS[preset]


@DECODERS.register("pipelined")
def pipelined(model: TokenModel, preset: str = "fast", **options: Any) -> BlockDecoder:
    """Fast-dVLA: several blocks at once, each block as soon as its predecessor is decoded far enough."""
    return BlockDecoder(model, make_plan(preset_values(preset), options))


def _register(name: str, defaults: dict[str, Any], one_block: bool = False) -> None:
    """Register the plan of `defaults` as a decoder; with `one_block` the chunk is a single block."""

    @DECODERS.register(name)
    def make(model: TokenModel, **options: Any) -> BlockDecoder:
        block = {"block": model.length} if one_block else {}
        return BlockDecoder(model, make_plan({**block, **defaults}, options))


# `pipelined` with the preset of this name: all blocks in the first pass, none waits; keys are kept as exactly.
_register("together", PRESETS["together"])
# One block after the other (block diffusion), storing a block's keys in the next one's first pass.
_register("sequential", {"add": 1.0, "act": 1.0, "min_unmasked": "ceil"})
# D2F (arXiv 2508.09192): pipelined, but a fully activated block unmasks a single token at least.
_register("d2f", {"add": 0.1, "act": 0.95, "min_unmasked": "one", "ties": "first"})
# All tokens in every pass, prompt recomputed, as many unmasked as a cosine schedule says (DD-VLA, UD-VLA).
_register("bidirectional", {"min_unmasked": "cosine", "cache": False}, one_block=True)
# As `bidirectional`, with the prompt computed once: exact where it sees no action token.
_register("prompt_cached", {"min_unmasked": "cosine"}, one_block=True)


@DECODERS.register("confidence")
def confidence(model: TokenModel, **options: Any) -> BlockDecoder:
    """All tokens open, the prompt cached where it can be; a pass unmasks the surest token and all confident ones."""
    defaults = {"block": model.length, "min_unmasked": "one", "ties": "first", "cache": not model.prompt_sees_actions}
    return BlockDecoder(model, make_plan(defaults, options))


@DECODERS.register("one_pass")
def one_pass(model: TokenModel, **options: Any) -> BlockDecoder:
    """Everything in the first pass (OpenVLA-OFT; Dream-VLA with one step)."""
    defaults = {"block": model.length, "min_unmasked": "ceil", "share": 1, "threshold": 0.0}
    return BlockDecoder(model, make_plan({**defaults, "cache": not model.prompt_sees_actions}, options))
