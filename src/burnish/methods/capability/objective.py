"""The objective `capability`: fine-tune a merged policy without losing the task vector that was merged into it.

CapVector calls it a capability vector (Song et al. 2026, arXiv 2605.10903).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.options import option, read_options
from burnish.core.types import Batch
from burnish.methods.capability.parts import (
    ELEMENTWISE,
    PENALTIES,
    Piece,
    Product,
    Vector,
    Whole,
    all_products,
    of_one_rank,
    pinned,
    rows_of,
)
from burnish.methods.gradients import local
from burnish.methods.objective import OBJECTIVES, Extra, Objective, Run, num_bytes
from burnish.methods.start import Start
from burnish.policies.base import Policy
from burnish.weights.delta import Delta
from burnish.weights.names import check_patterns, match_names, selected

KINDS = (*PENALTIES, "gradient")
_A = ".lora_A.default.weight"


@dataclass
class Options:
    """What is held, and how fast."""

    delta: str = option("", "folder of the task vector that was merged", path=True)
    kind: str = option(
        "l1", "the paper's, another penalty, or gradient: no penalty, gradients lose their part along the vector",
        choices=KINDS,
    )  # fmt: skip
    weight: float = option(1e-4, "lambda (paper; there with a plain sum over billions of elements)", least=0)
    gradient_norm_ratio: float = option(
        0.0, "above 0, instead of weight: norm of the penalty's gradient over that of the loss's, kept at every step",
        least=0,
    )  # fmt: skip
    alpha: float = option(1.1, "weight the vector was merged with, for the logged retention")
    include: list[str] = option([], "patterns over the vector's tensor names; empty takes all")
    exclude: list[str] = option([], "patterns over the vector's tensor names")


@OBJECTIVES.register("capability")
class Capability(Objective):
    """Adds weight * penalty of the movement away from the start, weighted by a task vector (see parts.py).

    The penalty's gradient is added to the finished gradients block by block, so that beside plain training nothing is
    held but the start. What moves are the parameters themselves; with LoRA or DoRA the whole product s B A.
    """

    def __init__(self, **options: Any):
        super().__init__()
        numbers = {name: _number(name, options[name]) for name in ("weight", "alpha") if name in options}
        self.options = read_options(Options, options | numbers, "objective capability")
        if not self.options.delta:
            raise BurnishError("objective capability: no delta", "the folder of the vector that was merged")
        if self.options.alpha == 0:
            raise BurnishError("objective capability: alpha is 0", "the weight the vector was merged with")
        self._figures: dict[str, Tensor] = {}

    def cost(self, recipe: RecipeConfig, policy: Policy) -> Extra:
        """The start of what is trained and in the vector."""
        if recipe.train.peft.method != "none":
            return Extra()
        self.adapters = False
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        return Extra(num_bytes(trained[name] for name in self._names(Delta(self.options.delta), trained)))

    def setup(self, run: Run) -> None:
        options, delta = self.options, Delta(self.options.delta)
        check_patterns(options.include, delta.tensors, "include")
        check_patterns(options.exclude, delta.tensors, "exclude")
        self.adapters = run.recipe.train.peft.method != "none"
        if self.adapters and options.kind == "gradient":
            raise BurnishError(f"objective capability: kind gradient with train.peft.method "
                               f"{run.recipe.train.peft.method}", "another kind, or whole weights")  # fmt: skip
        trained = {name: p for name, p in run.policy.named_parameters() if p.requires_grad}
        names = self._names(delta, trained)
        for name, own in names.items():
            shape = run.policy.get_submodule(name.removesuffix(_A)).get_base_layer().weight.shape if self.adapters \
                else trained[name].shape  # fmt: skip
            if list(shape) != delta.tensors[own]["shape"]:
                raise BurnishError(f"{options.delta}: the vector has shape {delta.tensors[own]['shape']} at '{name}'",
                                   f"{list(shape)}, as the policy")  # fmt: skip
        self.square = sum(delta.tensors[own]["norm"] ** 2 for own in names.values())
        if not self.square > 0:
            raise BurnishError(f"{options.delta} is zero on everything that is trained", "a vector that is not")
        self._covered, self._vector = names, Vector(delta, names.values(), run.device)

    def begin(self, run: Run) -> None:
        self._total = run.total if run.sharded else of_one_rank
        start = Start({} if self.adapters else {name: local(run.trained[name]) for name in self._covered})
        self.parts: dict[str, Whole | Product] = {}
        for name, own in self._covered.items():
            if self.adapters:
                name = name.removesuffix(_A)
                layer = run.policy.get_submodule(name)
                self.parts[f"{name}{_A}"] = Product(name, layer, self._vector, own, self._total)
            else:
                self.parts[name] = Whole(name, run.trained[name], self._vector, own, start.kept(name))

    def _names(self, delta: Delta, trained: dict[str, nn.Parameter]) -> dict[str, str]:
        """Trained parameter (factor A of an adapter) to the delta's tensor that belongs to it."""
        wanted = [name for name in delta.tensors if selected(name, self.options.include, self.options.exclude)]
        suffix = ".lora_A.default" if self.adapters else ""
        plain = {name.replace(f"{suffix}.weight", ".weight"): name for name in trained if suffix in name}
        aliases = {**{name: name for name in wanted}, **{a: o for a, o in delta.meta["tied"].items() if o in wanted}}
        found = match_names(aliases, plain)
        names = {plain[found[name]]: own for name, own in aliases.items()
                 if found[name] in plain and math.prod(delta.tensors[own]["shape"])}  # fmt: skip
        if not names:
            raise BurnishError(f"no tensor of {delta.path} is trained", "a delta of this policy, and no train.freeze "
                               "over all of it")  # fmt: skip
        return names

    @torch.no_grad()
    def edit_gradients(self, run: Run, batch: Batch, grads: dict[str, Tensor]) -> dict[str, float]:
        options, self._figures = self.options, {}
        if options.kind == "gradient":
            for name, part in self.parts.items():
                if name in grads and isinstance(part, Whole):
                    part.project_out(grads[name], self._total)
            return {}
        if options.weight == 0 and options.gradient_norm_ratio == 0:
            return {}
        elementwise = options.kind in ELEMENTWISE
        sums = [None] * len(self.parts) if elementwise else list(run.total(all_products(self.parts)))
        weight = self._weight(run, grads, sums)
        look = options.kind == "l1" and not self.adapters and (run.step + 1) % run.recipe.train.log_every == 0
        # Sums in place: a scalar kept from every block would sit in the gap that the block before left on the heap.
        value, held = (torch.zeros((), dtype=torch.float64, device=run.device) for _ in range(2))
        for piece in self._pieces(grads, sums):
            rows = rows_of(grads[piece.name])[piece.first : piece.last]
            if look and piece.gamma is not None:
                held += pinned(rows, piece.gamma, weight)
            rows.add_(piece.pull.mul_(weight))
            value += piece.value
        value = run.total(value)
        self._figures = {"capability_penalty": value, "loss_capability": weight * value}
        if options.gradient_norm_ratio > 0:
            self._figures["capability_weight"] = weight
        if look:
            count = sum(grads[name].numel() for name in self.parts if name in grads)
            pair = run.total(torch.stack([held, held.new_tensor(count)]))
            self._figures["capability_pinned"] = pair[0] / pair[1].clamp_min(1)
        return {}

    def _pieces(self, grads: dict[str, Tensor], sums: Sequence[Tensor | None]) -> Iterator[Piece]:
        for part, own in zip(self.parts.values(), sums, strict=True):
            for piece in part.pieces(self.options.kind, own):
                if piece.name in grads:
                    yield piece

    def _weight(self, run: Run, grads: dict[str, Tensor], sums: Sequence[Tensor | None]) -> Tensor:
        """Of the penalty: as given, or such that its gradient has the asked share of the loss's norm."""
        ratio = self.options.gradient_norm_ratio
        if ratio == 0:
            return torch.tensor(self.options.weight, dtype=torch.float64, device=run.device)
        square = torch.zeros((), dtype=torch.float64, device=run.device)
        for piece in self._pieces(grads, sums):
            square += piece.pull.square().sum(dtype=torch.float64)
        norm = run.total(square).sqrt()
        reached = [grads[name] for part in self.parts.values() for name in part.names if name in grads]
        return torch.where(norm > 0, ratio * run.norm(reached) / norm.clamp_min(1e-300), 0.0)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Distance moved, its cosine to the vector, and how much of the merged vector is left along its direction."""
        along, _, moved = self._total(all_products(self.parts).sum(0)).tolist()
        distance, size = moved**0.5, self.square**0.5
        figures = {"capability_distance": distance, "capability_cosine": along / max(distance * size, 1e-12),
                   "capability_retained": 1 + along / (self.options.alpha * self.square)}  # fmt: skip
        return {name: float(value) for name, value in {**self._figures, **figures}.items()}


def _number(name: str, value: float | str) -> float:
    """YAML reads 1e-4 (no dot) as a word, which is no reason to refuse it."""
    try:
        return float(value)
    except (ValueError, TypeError) as error:
        raise BurnishError(f"objective capability: {name} is '{value}'", "a number") from error
