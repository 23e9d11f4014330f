"""One plan for every decoder, so that two decoders are one option apart; a plan that cannot work is refused.

Fast-dVLA (arXiv 2603.25661) section 3.4, D2F (arXiv 2508.09192), Fast-dLLM (arXiv 2505.22618), DD-VLA (2508.20072).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.sampling.token_model import TokenModel

Forced = Literal["floor", "ceil", "one", "cosine", "linear"]


@dataclass(frozen=True)
class DecodePlan:
    """How a chunk of masked tokens is committed. Every comparison with a threshold is "at least".

    Args:
        block: tokens of a block; 0 takes the model's own.
        add: once this share of the last open block is decoded, the next ones are opened (tau_add).
        act: once this share of a block is decoded, its successor is fully activated (tau_act).
        conf: tokens at least so confident are committed (tau_conf); above 1 none is ever confident.
        share: a fully activated block commits at least the share 1 / `share` of its open tokens (n).
        forced: how many that is: "floor" max(1, floor(open / share)) (the paper, with its stall mended), "ceil"
            ceil(open / share), "one" a single token (D2F), "cosine" or "linear": as many as leave that schedule's share
            open at this pass of `steps` (MaskGIT; Dream), whatever the confidence.
        steps: passes of a schedule.
        append: blocks that may be opened before one pass; 1 is the paper's and means at least as many passes as blocks.
        ties: "all" commits every token as confident as the last forced one (the paper's >=); "first" the first of them.
        confidence: "max" probability, or "ordinal": the probability within `width` bins of the likeliest one.
        width: bins on either side for "ordinal".
        legal: ids that may be committed; None is all of the model's.
        shift: whether the token at a position is read from the row before it; None takes the model's own.
        cache: keep keys and values of prompt and frozen blocks. False recomputes all in every pass: same tokens.
        compile: torch.compile the passes (static shapes).
        graph: replay passes as CUDA graphs; None does so on a GPU.
    """

    block: int = 0
    add: float = 2 / 7
    act: float = 4 / 7
    conf: float = 0.5
    share: int = 2
    forced: Forced = "floor"
    steps: int = 12
    append: int = 1
    ties: Literal["all", "first"] = "all"
    confidence: Literal["max", "ordinal"] = "max"
    width: int = 1
    legal: tuple[int, ...] | None = None
    shift: bool | None = None
    cache: bool = True
    compile: bool = False
    graph: bool | None = None

    @property
    def scheduled(self) -> bool:
        """True where the number of tokens per pass is fixed in advance."""
        return self.forced in ("cosine", "linear")

    def need(self, share: float) -> int:
        """Decoded tokens of a block that make at least this share of it (thresholds come in steps of 1 / block)."""
        return math.ceil(share * self.block - 1e-9)

    def fit(self, model: TokenModel) -> "DecodePlan":
        """This plan with the model's own values filled in.

        Raises:
            BurnishError: a value out of range, or one that cannot work with this model, with the reason.
        """
        plan = replace(self, block=self.block or model.block, shift=model.shift if self.shift is None else self.shift)
        check_values(plan, model)
        _check_model(plan, model)
        return plan


def make_plan(defaults: dict[str, Any], options: dict[str, Any]) -> DecodePlan:
    """A plan from a decoder's own values and the user's, who may change any of them.

    Raises:
        BurnishError: an unknown option.
    """
    known = DecodePlan.__dataclass_fields__
    for name in options:
        if name not in known:
            raise BurnishError(f"unknown option '{name}' of a decoder", f"one of {', '.join(known)}")
    values = {**defaults, **options}
    if values.get("legal") is not None:
        if not isinstance(values["legal"], list | tuple | range) or not all(type(i) is int for i in values["legal"]):
            raise BurnishError(f"legal={values['legal']!r}", "a list of ids")
        values["legal"] = tuple(values["legal"])
    return DecodePlan(**values)


def check_values(plan: DecodePlan, model: TokenModel) -> None:
    """Raise BurnishError for a value of the wrong type or out of range, whatever decoder it is for."""
    for name in ("add", "act", "conf"):
        if not number(getattr(plan, name)):
            raise BurnishError(f"threshold {name}={getattr(plan, name)!r}", "a number")
    for name, known in (("shift", (None, True, False)), ("graph", (None, True, False)), ("cache", (True, False)),
                        ("compile", (True, False))):  # fmt: skip
        if not any(getattr(plan, name) is value for value in known):
            raise BurnishError(f"{name}={getattr(plan, name)!r}", "true or false")
    if plan.legal is not None and not (plan.legal and set(plan.legal) <= set(range(model.vocabulary))):
        raise BurnishError(f"legal ids {plan.legal[:8]}", f"some of 0 to {model.vocabulary - 1}")
    for name in ("add", "act"):
        if not 0 <= getattr(plan, name) <= 1:
            raise BurnishError(f"threshold {name}={getattr(plan, name)}", "a share of a block, 0 to 1")
    if plan.conf < 0:
        raise BurnishError(f"threshold conf={plan.conf}", "a probability, or more than 1 for never")
    for name in ("share", "steps", "append", "block"):
        value = getattr(plan, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BurnishError(f"{name}={value}", "a whole number of at least 1")
    choices = {
        "forced": ("floor", "ceil", "one", "cosine", "linear"),
        "ties": ("all", "first"),
        "confidence": ("max", "ordinal"),
    }
    for name, known in choices.items():
        if getattr(plan, name) not in known:
            raise BurnishError(f"{name}={getattr(plan, name)!r}", f"one of {', '.join(known)}")
    if type(plan.width) is not int or plan.width < 0:
        raise BurnishError(f"width={plan.width!r}", "bins on either side, 0 or more")


def _check_model(plan: DecodePlan, model: TokenModel) -> None:
    if model.mask_id is None:
        raise BurnishError(
            "the policy was trained without a MASK token", "one trained by masked diffusion", "decoder autoregressive"
        )
    if model.mask_id != model.vocabulary:
        raise BurnishError(f"MASK has id {model.mask_id}", f"the id after the {model.vocabulary} legal ones")
    if model.length % plan.block:
        raise BurnishError(
            f"blocks of {plan.block} do not divide a chunk of {model.length} tokens",
            f"a divisor, best a multiple of the {model.step_length} tokens of a control step",
        )
    if plan.block % model.block:
        raise BurnishError(
            f"blocks of {plan.block} cannot be frozen: the policy was trained with attention over blocks of "
            f"{model.block}{' (bidirectional)' if model.block == model.length else ''}",
            f"a multiple of {model.block}",
            "decoder prompt_cached, or distil the policy into a block-causal one",
        )
    if plan.cache and model.prompt_sees_actions:
        raise BurnishError(
            "the policy's prompt attends to action tokens, so its keys change at every pass and cannot be cached",
            "a policy trained with an isolated prompt",
            "decoder bidirectional",
        )
    if plan.shift != model.shift:
        raise BurnishError(f"shift={plan.shift}", f"shift={model.shift}, as the policy was trained")
    if plan.confidence == "ordinal" and not model.time_ordered:
        raise BurnishError(
            "ordinal confidence with FAST tokens, which have no order", "binned actions", "confidence max"
        )
