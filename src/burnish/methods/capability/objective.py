"""The objective `capability`: fine-tune a merged policy without losing the vector that was merged into it."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.types import Batch, PolicyLoss
from burnish.methods.capability.regularise import PENALTIES, inner_products, penalty, pinned, project_out
from burnish.methods.objective import OBJECTIVES, Objective
from burnish.weights.delta import Delta
from burnish.weights.names import check_patterns, match_names, selected

if TYPE_CHECKING:
    from burnish.methods.objective import Run

KINDS = (*PENALTIES, "gradient")
READINGS = ("auto", "full", "r1", "r2", "r3")


@OBJECTIVES.register("capability")
class Capability(Objective):
    """Adds weight * penalty of the movement away from the start, weighted by a capability vector (see regularise.py).

    Args:
        delta: folder of the vector that was merged.
        kind: l1 (the paper's), projection, cosine, ewc, l2, or gradient, which has no weight and takes the part along
            the vector out of every gradient.
        weight: lambda; the paper's 1e-4 goes with a plain sum over billions of elements and does not carry over to
            other sizes, hence `normalize`.
        normalize: scale the vector to a mean magnitude of 1 and take the mean over elements instead of the sum.
        reading: what moves. full: the parameters themselves. With LoRA or DoRA: r3 (default) the product s B A against
            the whole vector; r1: factor A less its start, against the difference of the two runs' A; r2: factor A
            itself. r1 and r2 follow the paper's remark that only A is regularised; they need a delta of two LoRA
            runs of one rank, and r1 means something only when all three runs started from the same A.
        alpha: the weight the vector was merged with; only the logged retention uses it.
        include, exclude: patterns over the delta's tensor names.
    """

    def __init__(
        self, delta: str, kind: str = "l1", weight: float = 1e-4, normalize: bool = False, reading: str = "auto",
        alpha: float = 1.0, include: Sequence[str] = (), exclude: Sequence[str] = (),
    ):  # fmt: skip
        super().__init__()
        for value, known, name in ((kind, KINDS, "kind"), (reading, READINGS, "reading")):
            if value not in known:
                raise BurnishError(f"objective capability: {name} is '{value}'", f"one of {', '.join(known)}")
        self.weight, self.alpha = _number("weight", weight), _number("alpha", alpha)
        if self.weight < 0 or self.alpha == 0 or not math.isfinite(self.weight + self.alpha):
            raise BurnishError(
                f"objective capability: weight is {weight} and alpha {alpha}", "weight >= 0, alpha not 0, both finite"
            )
        self.path, self.kind, self.reading = delta, kind, reading
        self.normalize, self.include, self.exclude = normalize, include, exclude
        self._figures: dict[str, Tensor] = {}

    def setup(self, run: "Run") -> None:
        delta = Delta(self.path)
        check_patterns(self.include, delta.tensors, "include")
        check_patterns(self.exclude, delta.tensors, "exclude")
        adapters = run.recipe.train.peft.method != "none"
        reading = {"auto": "r3" if adapters else "full"}.get(self.reading, self.reading)
        if (reading == "full") == adapters:
            found = f"objective capability: reading {reading} with train.peft.method {run.recipe.train.peft.method}"
            raise BurnishError(found, "full without adapters, r1, r2 or r3 with them")
        if reading == "r3" and self.kind == "gradient":
            raise BurnishError(
                "objective capability: kind gradient with reading r3", "reading r1 or r2, or another kind"
            )
        trained = {name: p for name, p in run.policy.named_parameters() if p.requires_grad}
        names = self._names(delta, trained, reading)
        self.names = list(names)
        self.gammas = [self._gamma(delta, own, reading).to(run.device) for own in names.values()]
        self._check_shapes(trained, reading)
        mean = sum(g.abs().sum() for g in self.gammas) / sum(g.numel() for g in self.gammas)
        if not mean > 0:
            raise BurnishError(f"{self.path} is zero on everything that is trained", "a vector that is not")
        self.mean = mean if self.normalize else torch.ones_like(mean)
        if self.normalize:
            self.gammas = [g / mean for g in self.gammas]
        self.scale = self.weight / sum(g.numel() for g in self.gammas) if self.normalize else self.weight
        self.square = torch.stack([g.square().sum() for g in self.gammas]).sum()
        self._moved = self._movement(run, trained, reading)
        self._has_pins = self.kind == "l1" and reading != "r3" and self.weight > 0

    def _names(self, delta: Delta, trained: dict[str, nn.Parameter], reading: str) -> dict[str, str]:
        """Trained parameter to the delta's tensor that belongs to it."""
        wanted = [name for name in delta.tensors if selected(name, self.include, self.exclude)]
        suffix = "" if reading == "full" else ".lora_A.default"
        plain = {name.replace(f"{suffix}.weight", ".weight") if suffix else name: name for name in trained
                 if suffix in name}  # fmt: skip
        aliases = {**{name: name for name in wanted}, **{a: o for a, o in delta.meta["tied"].items() if o in wanted}}
        found = match_names(aliases, plain)
        names = {plain[found[name]]: own for name, own in aliases.items() if found[name] in plain}
        if not names:
            raise BurnishError(f"no tensor of {self.path} is trained", "a delta of this policy, and no train.freeze "
                               "over all of it")  # fmt: skip
        return names

    def _gamma(self, delta: Delta, name: str, reading: str) -> Tensor:
        if reading in ("full", "r3"):
            return torch.from_numpy(delta.whole(name)).float()
        if delta.tensors[name]["form"] != "lowrank" or len(delta.updates(name)) != 2:
            raise BurnishError(f"reading {reading}: {self.path} does not hold the factors of two LoRA runs",
                               "a low-rank delta of tuned and control", "reading r3")  # fmt: skip
        tuned, control = delta.updates(name)
        if tuned.down.shape != control.down.shape:
            raise BurnishError(f"reading {reading}: '{name}' has factors of two ranks", "one rank", "reading r3")
        return torch.from_numpy(tuned.down - control.down).float()

    def _check_shapes(self, trained: dict[str, nn.Parameter], reading: str) -> None:
        for name, gamma in zip(self.names, self.gammas, strict=True):
            if reading != "r3" and trained[name].shape != gamma.shape:
                raise BurnishError(f"{self.path}: the vector has shape {list(gamma.shape)} at '{name}'",
                                   f"{list(trained[name].shape)}, as the policy")  # fmt: skip

    def _movement(self, run: "Run", trained: dict[str, nn.Parameter], reading: str) -> Callable[[], list[Tensor]]:
        """A function that gives D with gradient: how far each parameter (or product) has moved."""
        live = [trained[name] for name in self.names]
        if reading == "r2":
            return lambda: live
        if reading in ("full", "r1"):
            start = [p.detach().clone() for p in live]
            return lambda: [p - s for p, s in zip(live, start, strict=True)]
        layers = [run.policy.get_submodule(name.removesuffix(".lora_A.default.weight")) for name in self.names]
        return lambda: [layer.get_delta_weight("default") if not layer.use_dora["default"] else _dora(layer)
                        for layer in layers]  # fmt: skip

    def loss(self, run: "Run", batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        if self.weight == 0 or self.kind == "gradient":
            return {}
        moved = self._moved()
        value = penalty(self.kind, self.gammas, moved)
        self._figures["capability_penalty"] = value.detach()
        return {"capability": self.scale * value}

    def edit_gradients(self, run: "Run", batch: Batch, grads: dict[str, Tensor]) -> dict[str, float]:
        here = [k for k, name in enumerate(self.names) if name in grads]
        found, gammas = [grads[self.names[k]] for k in here], [self.gammas[k] for k in here]
        if self.kind == "gradient":
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
            figures = {
                "capability_distance": distance,
                "capability_cosine": along / (distance * self.square.sqrt()).clamp_min(1e-12),
                "capability_retained": 1 + along / (self.alpha * self.square * self.mean),
            }
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
