"""One plan for every decoder, so that two decoders are one option apart; a plan that cannot work is refused.

Fast-dVLA (arXiv 2603.25661) section 3.4, D2F (arXiv 2508.09192), Fast-dLLM (arXiv 2505.22618), DD-VLA (2508.20072).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import check, option, refuse_unknown
from burnish.core.renames import DECODER_OPTIONS, rename
from burnish.sampling.token_model import TokenModel

_RULES = ("floor", "ceil", "one", "cosine", "linear")


@dataclass(frozen=True)
class DecodePlan:
    """How the masked tokens of a chunk are unmasked. Every comparison with a threshold is "at least".

    Args:
        min_unmasked: how many tokens of a fully activated block are unmasked at least in a forward pass: "floor"
            max(1, floor(masked / share)) (the paper, with its stall repaired), "ceil" ceil(masked / share), "one" a
            single token (D2F), "cosine" or "linear": as many as leave that schedule's share masked at this pass of
            `steps` (MaskGIT; Dream), whatever the confidence.
    """

    block: int = option(0, "tokens of a block; 0 takes the model's own", least=0)
    add: float = option(2 / 7, "once this share of the last open block is unmasked, the next ones are opened (tau_add)",
                        least=0, most=1)  # fmt: skip
    act: float = option(4 / 7, "once this share of a block is unmasked, its successor is fully activated (tau_act)",
                        least=0, most=1)  # fmt: skip
    threshold: float = option(
        0.9, "tokens of at least this confidence are unmasked (tau_conf); above 1 none is", least=0
    )
    share: int = option(2, "a fully activated block unmasks at least 1 / share of its masked tokens (n)", least=1)
    min_unmasked: str = option("floor", "how many that is", choices=_RULES)
    steps: int = option(12, "forward passes of a schedule", least=1)
    append: int = option(
        1, "blocks that may be opened before one pass; 1 is the paper's and means at least as many passes as blocks",
        least=1,
    )  # fmt: skip
    order: str = option(
        "confidence", "which tokens of a block come first: the most confident, those of executed steps, those of "
        "earlier steps (confidence decides among equals), or random",
        choices=("confidence", "executed", "time", "random"),
    )  # fmt: skip
    ties: str = option("all", "unmask every token as confident as the last required one (the paper's >=), or the first",
                       choices=("all", "first"))  # fmt: skip
    confidence: str = option("max", "max probability, or ordinal: the probability within `width` bins of the likeliest",
                             choices=("max", "ordinal"))  # fmt: skip
    width: int = option(1, "bins on either side for ordinal", least=0)
    legal: tuple[int, ...] | None = option(None, "ids that may be written; None is all of the model's")
    shift: bool | None = option(None, "the token at a position is read from the one before it; None is the model's own")
    cache: bool = option(True, "keep keys and values of prompt and finished blocks; False gives the same tokens")
    compile: bool = option(False, "torch.compile the forward passes (static shapes)")
    graph: bool | None = option(None, "replay forward passes as CUDA graphs; None does so on a GPU")

    def __post_init__(self) -> None:
        check(self, "decoder")

    @property
    def scheduled(self) -> bool:
        """True where the number of tokens per pass is fixed in advance."""
        return self.min_unmasked in ("cosine", "linear")

    def need(self, share: float) -> int:
        """Unmasked tokens of a block that make at least this share of it (thresholds come in steps of 1 / block)."""
        return math.ceil(share * self.block - 1e-9)

    def fit(self, model: TokenModel) -> "DecodePlan":
        """This plan with the model's own values filled in."""
        plan = replace(self, block=self.block or model.block, shift=model.shift if self.shift is None else self.shift)
        check_legal(plan, model)
        _check_model(plan, model)
        return plan


def make_plan(defaults: dict[str, Any], options: dict[str, Any]) -> DecodePlan:
    """A plan from a decoder's own values and the user's, who may change any of them."""
    options = rename(options, DECODER_OPTIONS, "decoder: ")
    refuse_unknown(DecodePlan, options, "decoder")
    values = {**defaults, **options}
    if values.get("legal") is not None:
        if not isinstance(values["legal"], list | tuple | range) or not all(type(i) is int for i in values["legal"]):
            raise BurnishError(f"decoder: legal is {values['legal']!r}", "a list of ids")
        values["legal"] = tuple(values["legal"])
    return DecodePlan(**values)


def check_legal(plan: DecodePlan, model: TokenModel) -> None:
    """Raise BurnishError for legal ids that the model does not have."""
    if plan.legal is not None and not (plan.legal and set(plan.legal) <= set(range(model.vocabulary))):
        raise BurnishError(f"legal ids {plan.legal[:8]}", f"some of 0 to {model.vocabulary - 1}")


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
            f"blocks of {plan.block} cannot be cached: the policy was trained with attention over blocks of "
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
    if plan.order == "executed" and not model.executed or plan.order == "time" and not model.time_ordered:
        raise BurnishError(f"order {plan.order} with tokens of which nobody knows their control step", "binned actions",
                           "order confidence")  # fmt: skip
    if plan.confidence == "ordinal" and not model.time_ordered:
        raise BurnishError(
            "ordinal confidence with FAST tokens, which have no order", "binned actions", "confidence max"
        )
