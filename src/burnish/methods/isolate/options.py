"""What can be chosen, checked once, and the named methods that fill it in."""

from dataclasses import dataclass, replace
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import check, refuse_unknown
from burnish.methods.isolate.layout import GRANULARITIES

CHOICES = {
    "rule": ("none", "freeze", "lora", "l2sp", "penalty", "replay", "replace", "conflict", "always", "soft"),
    "protect": ("robot", "questions", "self", "answers", "random"),
    "distance": ("w2", "normalised", "bures", "tokens"),
    "granularity": GRANULARITIES,
    "optimiser": ("plain", "first_moment", "preconditioned"),
    "tokens": ("apart", "pooled"),
}
EDITS = ("conflict", "always", "soft", "replace")


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
            questions: the same on a question batch. self: distance of the robot batch's states from the frozen base's
            on robot inputs, so no question is needed. answers: the loss on answers itself. random: a random direction.
        distance: w2 (the paper), normalised, bures, or tokens (to the frozen base, token by token, without an anchor).
        granularity: what is projected as one: tensor, layer (the paper) or global.
        strength: for "soft", share that is removed.
        optimiser: plain (Adam rescales the edited gradient); first_moment (Adam's second moment sees the unedited
            one); preconditioned (the same, and the projection is in Adam's metric).
        restore: this much of the protected loss's own gradient is added to the edited one.
        symmetric: what `restore` adds is first projected against the task gradient where they conflict (PCGrad).
        directions: so many parts of the batch are protected apart from each other.
        share: of the robot batch's size: how many samples the protected gradient (or the replay) takes. On robot
            inputs, 1 shares the training forward, less runs a forward of its own.
        every: steps after which the protected gradient is taken anew.
        turns: questions asked about each image, in one sequence.
        weight: of penalty, replay, replace and l2sp.
        rank: for bures, leading eigenvectors of the anchor; 0 means all.
        tokens: image and text tokens apart, or pooled.
        answers: whether answers count among the text tokens of questions.
    """

    rule: str = "none"
    protect: str = "robot"
    distance: str = "w2"
    granularity: str = "layer"
    strength: float = 0.5
    optimiser: str = "plain"
    restore: float = 0.0
    symmetric: bool = False
    directions: int = 1
    share: float = 1.0
    every: int = 1
    turns: int = 1
    weight: float = 1.0
    rank: int = 0
    tokens: str = "apart"
    answers: bool = False

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
        return self.edits or self.rule == "penalty"

    @property
    def needs_anchor(self) -> bool:
        """Whether statistics of the frozen base are compared with."""
        return self.uses_source and self.protect in ("robot", "questions", "self") and self.distance != "tokens"

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
    "pcgrad": {"rule": "conflict", "protect": "answers", "granularity": "global", "share": 0.25, "turns": 4,
               "restore": 1.0, "symmetric": True},
    "random": {"rule": "conflict", "protect": "random"},
}  # fmt: skip
"""Named methods. Sources: aegis arXiv:2604.16067 (batch and tokens as the readable text suggests), stop_gradient and
insulate arXiv:2505.23705, l2sp arXiv:1802.01483, pcgrad arXiv:2001.06782, agem arXiv:1812.00420."""

AUTO = "l2sp"
"""What `method: auto` means, with a question folder and without; docs/methods/isolate.md has the evidence."""


def resolve(method: str, given: dict[str, Any], questions: str) -> tuple[str, Options]:
    """The method's name (auto replaced) and its options with those of the recipe on top.

    Raises:
        BurnishError: an unknown method or option, a value out of range, or no questions where they are needed.
    """
    if method == "auto":
        method = AUTO
    if method not in METHODS:
        raise BurnishError(f"isolate: method '{method}'", f"auto or one of {', '.join(METHODS)}")
    refuse_unknown(Options, given, "isolate")
    options = replace(Options(), **{**METHODS[method], **given})
    check(options, "isolate")
    _check(method, options, questions)
    return method, options


def _check(method: str, options: Options, questions: str) -> None:
    for key, choices in CHOICES.items():
        if getattr(options, key) not in choices:
            raise BurnishError(f"isolate: {key} is '{getattr(options, key)}'", f"one of {', '.join(choices)}")
    ranges = {"strength": (0, 1), "share": (1e-9, 1), "every": (1, 1 << 30), "directions": (1, 64), "turns": (1, 64),
              "weight": (0, 1e9), "restore": (0, 1e9), "rank": (0, 1 << 30)}  # fmt: skip
    for key, (low, high) in ranges.items():
        if not low <= getattr(options, key) <= high:
            raise BurnishError(f"isolate: {key} is {getattr(options, key)}", f"{low:g} to {high:g}")
    if options.asks and not questions:
        raise BurnishError(f"isolate: method '{method}' needs a question folder", "questions: FOLDER or language.root",
                           "burnish questions --help, or method: auto")  # fmt: skip
    several = options.rule in ("conflict", "always", "soft") and options.protect != "random"
    if options.directions > 1 and (not several or options.restore or options.optimiser == "preconditioned"):
        raise BurnishError("isolate: directions is above 1 with an option that takes one direction",
                           "rule conflict, always or soft, no restore, optimiser plain or first_moment")  # fmt: skip
