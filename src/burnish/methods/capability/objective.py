"""The objective `capability`: fine-tune a merged policy without losing the task vector that was merged into it.

CapVector calls it a capability vector (Song et al. 2026, arXiv 2605.10903).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.options import option, read_options
from burnish.core.types import Batch, PolicyLoss
from burnish.methods.capability.regularise import PENALTIES, inner_products, penalty, pinned, project_out
from burnish.methods.objective import OBJECTIVES, Objective, Run
from burnish.weights.delta import Delta
from burnish.weights.names import check_patterns, match_names, selected

KINDS = (*PENALTIES, "gradient")


@dataclass
class Options:
    """What is held, and how fast."""

    delta: str = option("", "folder of the task vector that was merged")
    kind: str = option(
        "l1", "the paper's, another penalty, or gradient: no penalty, gradients lose their part along the vector",
        choices=KINDS,
    )  # fmt: skip
    weight: float = option(
        1e-4, "lambda (paper; there with a plain sum over billions of elements, see normalize)", least=0
    )
    normalize: bool = option(False, "scale the vector to mean magnitude 1; mean over elements instead of the sum")
    alpha: float = option(1.0, "weight the vector was merged with, for the logged retention")
    include: list[str] = option([], "patterns over the vector's tensor names; empty takes all")
    exclude: list[str] = option([], "patterns over the vector's tensor names")


@OBJECTIVES.register("capability")
class Capability(Objective):
    """Adds weight * penalty of the movement away from the start, weighted by a task vector (see regularise.py).

    What moves are the parameters themselves; with LoRA or DoRA the whole product s B A, since what the paper means by
    regularising A alone cannot be told from what is published.

    Args:
        options: fields of `Options`.
    """

    needs_full_gradients = True  # sums over a matrix, in penalties as in gradients

    def __init__(self, **options: Any):
        super().__init__()
        # YAML reads 1e-4 (no dot) as a word, which is no reason to refuse it.
        numbers = {name: _number(name, options[name]) for name in ("weight", "alpha") if name in options}
        self.options = read_options(Options, options | numbers, "objective capability")
        if not self.options.delta:
            raise BurnishError("objective capability: no delta", "the folder of the vector that was merged")
        if self.options.alpha == 0:
            raise BurnishError("objective capability: alpha is 0", "the weight the vector was merged with")
        self._figures: dict[str, Tensor] = {}

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
        self.names = list(names)
        self.gammas = [torch.from_numpy(delta.whole(own)).float().to(run.device) for own in names.values()]
        for name, gamma in zip(self.names, self.gammas, strict=True):
            if not self.adapters and trained[name].shape != gamma.shape:
                raise BurnishError(f"{options.delta}: the vector has shape {list(gamma.shape)} at '{name}'",
                                   f"{list(trained[name].shape)}, as the policy")  # fmt: skip
        count = sum(g.numel() for g in self.gammas)
        mean = sum(g.abs().sum() for g in self.gammas) / count
        if not mean > 0:
            raise BurnishError(f"{options.delta} is zero on everything that is trained", "a vector that is not")
        self.mean = mean if options.normalize else torch.ones_like(mean)
        if options.normalize:
            self.gammas = [g / mean for g in self.gammas]
        self.scale = options.weight / count if options.normalize else options.weight
        self.square = torch.stack([g.square().sum() for g in self.gammas]).sum()
        self._moved = self._movement(run, trained)
        self._has_pins = options.kind == "l1" and not self.adapters and options.weight > 0

    def _names(self, delta: Delta, trained: dict[str, nn.Parameter]) -> dict[str, str]:
        """Trained parameter (factor A of an adapter) to the delta's tensor that belongs to it."""
        wanted = [name for name in delta.tensors if selected(name, self.options.include, self.options.exclude)]
        suffix = ".lora_A.default" if self.adapters else ""
        plain = {name.replace(f"{suffix}.weight", ".weight"): name for name in trained if suffix in name}
        aliases = {**{name: name for name in wanted}, **{a: o for a, o in delta.meta["tied"].items() if o in wanted}}
        found = match_names(aliases, plain)
        names = {plain[found[name]]: own for name, own in aliases.items() if found[name] in plain}
        if not names:
            raise BurnishError(f"no tensor of {delta.path} is trained", "a delta of this policy, and no train.freeze "
                               "over all of it")  # fmt: skip
        return names

    def _movement(self, run: Run, trained: dict[str, nn.Parameter]) -> Callable[[], list[Tensor]]:
        """A function that gives D with gradient: how far each parameter (or product) has moved."""
        if not self.adapters:
            now = [trained[name] for name in self.names]
            start = [p.detach().clone() for p in now]
            return lambda: [p - s for p, s in zip(now, start, strict=True)]
        layers = [run.policy.get_submodule(name.removesuffix(".lora_A.default.weight")) for name in self.names]
        return lambda: [layer.get_delta_weight("default") if not layer.use_dora["default"] else _dora(layer)
                        for layer in layers]  # fmt: skip

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        if self.options.weight == 0 or self.options.kind == "gradient":
            return {}
        moved = self._moved()
        value = penalty(self.options.kind, self.gammas, moved)
        self._figures["capability_penalty"] = value.detach()
        return {"capability": self.scale * value}

    def edit_gradients(self, run: Run, batch: Batch, grads: dict[str, Tensor]) -> dict[str, float]:
        here = [k for k, name in enumerate(self.names) if name in grads]
        found, gammas = [grads[self.names[k]] for k in here], [self.gammas[k] for k in here]
        if self.options.kind == "gradient":
            for k, grad in zip(here, project_out(found, gammas), strict=True):
                grads[self.names[k]] = grad
        if self._has_pins and (run.step + 1) % run.recipe.train.log_every == 0:
            with torch.no_grad():
                moved = self._moved()
                share = pinned(found, gammas, [moved[k] for k in here], self.scale)
            return {"capability_pinned": float(share)}
        return {}

    def metrics(self) -> dict[str, float]:
        """Distance moved, its cosine to the vector, and how much of the merged vector is left along its direction."""
        with torch.no_grad():
            moved = [d.detach().float() for d in self._moved()]
            along = inner_products(self.gammas, moved).sum()
            distance = torch.stack(torch._foreach_norm(moved)).norm()
            figures = {"capability_distance": distance,
                       "capability_cosine": along / (distance * self.square.sqrt()).clamp_min(1e-12),
                       "capability_retained": 1 + along / (self.options.alpha * self.square * self.mean)}  # fmt: skip
        return {name: float(value) for name, value in {**self._figures, **figures}.items()}


def _number(name: str, value: float | str) -> float:
    """YAML reads 1e-4 (no dot) as a word, which is no reason to refuse it."""
    try:
        return float(value)
    except (ValueError, TypeError) as error:
        raise BurnishError(f"objective capability: {name} is '{value}'", "a number") from error


def _dora(layer: nn.Module) -> Tensor:
    """Effective weight less the frozen one; as peft does, the norm takes no gradient."""
    weight = layer.get_base_layer().weight
    updated = weight + layer.get_delta_weight("default")
    norm = updated.detach().norm(dim=1, keepdim=True)
    return layer.lora_magnitude_vector["default"].weight.view(-1, 1) / norm * updated - weight
