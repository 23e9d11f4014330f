"""What can be chosen, checked once, and the named methods that fill it in."""

from dataclasses import dataclass, replace
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import check, option, refuse_unknown
from burnish.methods.gradients import GRANULARITIES

EDITS = ("conflict", "always", "soft", "replace")
RULES = ("none", "freeze", "lora", "l2sp", "penalty", "replay", *EDITS)
PROTECT = ("robot", "questions", "self", "answers", "random")
OPTIMISERS = ("plain", "first_moment", "preconditioned")


@dataclass
class Inputs:
    """Where questions and anchor come from."""

    questions: str = option(
        "", "question folder, see `burnish data questions`; empty takes the recipe's language.root", path=True
    )
    anchor: str = option(
        "", "file of `burnish method isolate anchor`; empty builds the anchor before the first step", path=True
    )
    anchor_samples: int = option(3000, "questions or robot frames to build it from (the paper's number)", least=1)


@dataclass(frozen=True)
class Options:
    """Everything that `isolate` can do; `METHODS` are points in this space.

    Args:
        rule: what is done for the backbone.
            none: nothing. freeze: it is not trained (stop-gradient). lora: it learns through the recipe's adapters
            only. l2sp: pulled to its start. penalty: the protected loss is added, times `weight`. replay: the loss on
            questions is added, times `share` (so that a question counts as much as a frame) and `weight`. replace: its
            gradient is that of the questions alone, times `weight` (knowledge insulation with question data).
            conflict, always, soft: the task gradient is projected against the gradient of the protected loss.
        protect: whose gradient is protected. robot: distance of the robot batch's states from the anchor (the paper).
            questions: the same on a question batch. self: distance (tokens) of the robot batch's states from the frozen
            base's on robot inputs, so no question is needed. answers: the loss on answers itself. random: a random
            direction.
    """

    rule: str = option("none", "what is done for the backbone", choices=RULES)
    protect: str = option("robot", "whose gradient is protected", choices=PROTECT)
    distance: str = option(
        "w2", "from the anchor (w2 is the paper's), or token by token from the frozen base without an anchor",
        choices=("w2", "normalised", "tokens"),
    )  # fmt: skip
    granularity: str = option("layer", "what is projected as one (layer is the paper's)", choices=GRANULARITIES)
    strength: float = option(0.5, "for soft, share that is removed", least=0, most=1)
    optimiser: str = option(
        "plain", "plain: Adam rescales the edited gradient; first_moment: its second moment sees the unedited one; "
        "preconditioned: the same, and the projection is in Adam's metric", choices=OPTIMISERS,
    )  # fmt: skip
    share: float = option(
        1.0, "of the robot batch's size: samples of the protected gradient (or the replay); on robot inputs, 1 shares "
        "the training forward, less runs a forward of its own", above=0, most=1,
    )  # fmt: skip
    every: int = option(1, "steps after which the protected gradient is taken again", least=1)
    turns: int = option(1, "questions asked about each image, in one sequence", least=1, most=64)
    weight: float = option(1.0, "of penalty, replay, replace and l2sp", least=0)
    tokens: str = option("apart", "image and text tokens apart, or pooled", choices=("apart", "pooled"))
    answers: bool = option(False, "whether answers count among the text tokens of questions")
    control: str = option(
        "", "in place of the protected direction, for comparison: shuffled gives each layer the next one's gradient, "
        "wrong_anchor builds the anchor from noise in place of pictures", choices=("", "shuffled", "wrong_anchor"),
    )  # fmt: skip

    @property
    def edits(self) -> bool:
        """Whether gradients are edited against a protected direction."""
        return self.rule in EDITS

    @property
    def asks(self) -> bool:
        """Whether question batches are needed during training."""
        return self.rule == "replay" or (self.uses_source and self.protect in ("questions", "answers"))

    @property
    def uses_source(self) -> bool:
        """Whether the protected loss is computed at all."""
        return (self.edits and self.protect != "random") or self.rule == "penalty"

    @property
    def needs_anchor(self) -> bool:
        """Whether statistics of the frozen base are compared with."""
        return self.uses_source and self.protect in ("robot", "questions") and self.distance != "tokens"

    @property
    def shares_forward(self) -> bool:
        """Whether the protected loss is read off the training forward."""
        return self.uses_source and self.protect in ("robot", "self") and self.share >= 1


METHODS: dict[str, dict[str, Any]] = {
    "naive": {},
    "stop_gradient": {"rule": "freeze"},
    "lora": {"rule": "lora"},
    "l2sp": {"rule": "l2sp", "weight": 0.05},
    "penalty": {"rule": "penalty", "protect": "questions", "distance": "normalised", "share": 0.25, "weight": 0.1},
    "self_penalty": {"rule": "penalty", "protect": "self", "distance": "tokens", "weight": 0.1},
    "replay": {"rule": "replay", "share": 0.05, "turns": 4},
    "insulate": {"rule": "replace", "protect": "answers", "share": 0.25, "turns": 4},
    "aegis": {"rule": "conflict", "tokens": "pooled"},
    "question_anchor": {"rule": "conflict", "protect": "questions", "share": 0.25, "every": 4},
    "self_anchor": {"rule": "conflict", "protect": "self", "distance": "tokens", "every": 8},
    "agem": {"rule": "conflict", "protect": "answers", "granularity": "global", "share": 0.25, "turns": 4},
    "random": {"rule": "conflict", "protect": "random"},
    "shuffled": {"rule": "conflict", "tokens": "pooled", "control": "shuffled"},
    "wrong_anchor": {"rule": "conflict", "tokens": "pooled", "control": "wrong_anchor"},
}
"""Named methods. Sources: aegis arXiv:2604.16067 (batch and tokens as the readable text suggests), stop_gradient and
insulate arXiv:2505.23705, l2sp arXiv:1802.01483, agem arXiv:1812.00420."""

AUTO = "l2sp"
"""What `method: auto` means, with a question folder and without; docs/methods/isolate.md has the evidence."""


def resolve(method: str, given: dict[str, Any]) -> tuple[str, Options]:
    """The method's name (auto replaced) and its options with those of the recipe on top."""
    method = AUTO if method == "auto" else method
    if method not in METHODS:
        raise BurnishError(f"isolate: method '{method}'", f"auto or one of {', '.join(METHODS)}")
    refuse_unknown(Options, given, "isolate")
    options = replace(Options(), **{**METHODS[method], **given})
    check(options, "isolate")
    if options.protect == "self" and options.distance != "tokens":
        raise BurnishError(f"isolate: protect is self and distance {options.distance}", "distance tokens")
    if options.control == "wrong_anchor" and not options.needs_anchor or options.control and not options.edits:
        raise BurnishError(f"isolate: control {options.control} with method {method}",
                           "a method that projects" + " against an anchor" * (options.control == "wrong_anchor"),
                           "method: aegis or question_anchor")  # fmt: skip
    return method, options
