"""The one forward of a training step: imitation, language and the added terms of every objective."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.types import Batch, PolicyLoss
from burnish.data.loader import LanguageData, Prefetch, RobotData, pin, to_device
from burnish.methods.gradients import local
from burnish.methods.objective import Objective, Run, thaw
from burnish.policies.base import Policy
from burnish.train.sharded import rows_like

OWN = "objectives."
"""Names of methods' own parameters begin so."""


class Step(nn.Module):
    """Policy and objectives under one roof, so that data-parallel hooks fire once for everything that is trained.

    What it forwards is whatever call it is given, `loss` of a step or another, so that all pass those hooks.
    """

    def __init__(self, policy: Policy, objectives: dict[str, Objective]):
        super().__init__()
        self.policy = policy
        self.objectives = nn.ModuleDict(objectives)

    def forward(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)

    def loss(self, run: Run, batch: Batch, language: Batch | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss (scalar with gradient) and the detached terms by name, "policy" first."""
        weight = run.recipe.train.imitation_weight
        if weight > 0:
            out = self._imitate(run, batch)
        else:
            nothing = batch["action"].new_zeros(len(batch["action"]))
            out = PolicyLoss(nothing.sum(), nothing)
        total, terms = weight * out.total, {"policy": out.total.detach()}
        if len(out.parts) > 1:
            terms |= {f"policy_{name}": value.detach() for name, value in out.parts.items()}
        if language is not None:
            answer_loss = self.policy.language(language).mean
            total = total + run.recipe.language.weight * answer_loss
            terms["language"] = answer_loss.detach()
        for name, objective in run.objectives.items():
            for term, value in objective.loss(run, batch, out).items():
                if term in terms:
                    raise BurnishError(f"objective '{name}' adds a loss called '{term}', a name already taken")
                total = total + value
                terms[term] = value.detach()
        if torch.is_grad_enabled() and not total.requires_grad:
            raise BurnishError("no loss reaches a trained parameter",
                               "demonstrations, language or an objective with a loss",
                               "--train.imitation_weight=1, or an entry in objectives")  # fmt: skip
        return total, terms

    def _imitate(self, run: Run, batch: Batch) -> PolicyLoss:
        with ExitStack() as watching:
            for objective in run.objectives.values():
                watching.enter_context(objective.watch(run))
            return self.policy.loss(batch, self.policy.draw(len(batch["action"]), run.generator))

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters to train. The policy's keep the policy's names; others are objectives.<objective>.<name>."""
        return {
            name.removeprefix("policy."): parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }


def gradients(trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients that exist, by parameter name; where they are sharded, this rank's rows."""
    return {name: local(p.grad) for name, p in trained.items() if p.grad is not None}


def write_back(trained: dict[str, nn.Parameter], grads: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Take over entries of `grads` that a method replaced, instead of editing those of `before`, or made."""
    for name, grad in grads.items():
        if grad is before.get(name):
            continue
        parameter = trained[name]
        mine = local(parameter)
        if grad.shape != mine.shape:
            raise BurnishError(f"edited gradient of '{name}' has shape {tuple(grad.shape)}", f"{tuple(mine.shape)}")
        parameter.grad = rows_like(parameter, grad.to(mine))


@torch.no_grad()
def clip(trained: dict[str, nn.Parameter], max_norm: float, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Total norm of all gradients (scalar tensor, no host wait); scales them down to `max_norm` where that is not 0.

    `total` makes sums over all ranks of those over their rows, where gradients are sharded.
    """
    grads = list(gradients(trained).values())
    norm = torch.nn.utils.get_total_norm(grads)
    if total is not None:
        norm = total(norm.double().square()).sqrt().to(norm)
    if max_norm > 0:  # as torch.nn.utils.clip_grads_with_norm_, which wants the parameters
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Streams:
    """The robot stream and, where the language loss has weight, the language stream, prepared ahead of the step."""

    def __init__(self, run: Run):
        recipe, first, every = run.recipe, run.number_of(0), run.accelerator.num_processes
        self.device, self.data = run.device, run.data
        sources: list[RobotData | LanguageData] = [run.data]
        if recipe.language.weight > 0:
            knows = [p.requires_grad for _, p in run.policy.backbone_parameters()]
            if knows and not any(knows):
                raise BurnishError(f"language.weight is {recipe.language.weight} and the language model is not trained",
                                   "a trained one, or the weight 0", thaw(recipe))  # fmt: skip
            sources.append(LanguageData(Path(recipe.language.root), recipe.language.batch_size, recipe.train.seed,
                                        turns=recipe.language.turns))  # fmt: skip
        self.sources = sources
        # Ranks take turns at the batches of one order, so that it is the same for any number of them.
        self.k, self._number = 0, lambda k: first + k * every
        run.data.start_decoders()
        self.queues = [Prefetch(self._maker(source), 0, recipe.data.workers) for source in sources]

    def _maker(self, source: RobotData | LanguageData):
        # On the CPU the images become floats in the thread; on a GPU they travel as bytes and become floats there.
        if self.device.type == "cpu":
            return lambda k: source.finish(source.raw(self._number(k)), self._number(k))
        if self.device.type == "cuda":
            return lambda k: pin(source.raw(self._number(k)))
        return lambda k: source.raw(self._number(k))

    def next(self) -> tuple[Batch, Batch | None]:
        """The next robot batch and language batch (None without that stream), on the device."""
        batches = [next(queue) for queue in self.queues]
        if self.device.type != "cpu":
            number = self._number(self.k)
            batches = [s.finish(to_device(b, self.device), number) for s, b in zip(self.sources, batches, strict=True)]
        self.k += 1
        return batches[0], batches[1] if len(batches) > 1 else None

    @property
    def waited(self) -> float:
        """Seconds that the step has stood still for data."""
        return sum(queue.waited for queue in self.queues)

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.data.close()
