"""Grid distillation (after 2202.00512): the policy learns to act in K steps of its own sampler, as good as many."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.options import option, read_options
from burnish.core.types import Batch, PolicyLoss
from burnish.methods.few_steps.landing import landing_error, teacher_points, times
from burnish.methods.objective import OBJECTIVES, Objective, Run
from burnish.policies.base import Policy, require
from burnish.runtime.executor import Runtime

if TYPE_CHECKING:
    from burnish.core.config import RecipeConfig


@dataclass(frozen=True)
class FewStepsOptions:
    """What the objective does."""

    steps: int = option(2, "K, Euler steps that the policy is to need; its config then says so", least=1, most=64)
    teacher_steps: int = option(16, "Euler steps of the teacher, a multiple of `steps`", least=2, most=1024)


@OBJECTIVES.register("few_steps")
class FewSteps(Objective):
    """Teaches a flow-matching policy to land in K Euler steps where a frozen copy of its start lands in many.

    The result is an ordinary folder of the same type whose config has K steps. Only the action expert and the
    projections around it are trained: the vision-language model, with what it knows of language, stays bit for bit.
    `train.imitation_weight: 0` trains on this alone, and then actions in the data have no effect.

    Args:
        **options: fields of FewStepsOptions.

    Raises:
        BurnishError: teacher steps that are no multiple of the steps, more than once.
    """

    def __init__(self, **options: Any):
        super().__init__()
        self.options = read_options(FewStepsOptions, options, "few_steps")
        steps, fine = self.options.steps, self.options.teacher_steps
        if fine % steps or fine == steps:
            found = f"few_steps: teacher_steps {fine} for {steps} steps"
            raise BurnishError(found, "a multiple of the steps, and more than those", f"teacher_steps: {8 * steps}")
        self._gap: Tensor | None = None

    def choose_trained(self, recipe: "RecipeConfig", policy: Policy) -> None:
        require(policy, "runtime", "few_steps")
        for _, parameter in policy.backbone_parameters():
            parameter.requires_grad_(False)

    def setup(self, run: Run) -> None:
        policy = run.policy
        # What is not trained stays as it is, and one of each is enough. In a list, so that the copy is neither trained
        # nor saved with the run.
        frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
        teacher = copy.deepcopy(policy, frozen).eval().requires_grad_(False)
        self._teacher = [Runtime(teacher, solver=self._solve)]
        policy.set_steps(self.options.steps)

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        policy, (teacher,), K = run.policy, self._teacher, self.options.steps
        noise = policy.draw(len(batch["task"]), run.generator).to(policy.device).noise
        points = teacher.sample(teacher.encode(batch), noise)
        found = policy.velocity(batch, points[:, :-1], times(K, points))
        error = landing_error(points, found)[..., : policy.action_dim].square().mean()
        self._gap = error.detach()
        return {"few_steps": error}

    def metrics(self) -> dict[str, float]:
        """Root mean square of how far one step lands from where it should, in normalised actions."""
        return {} if self._gap is None else {"few_steps_gap": float(self._gap.sqrt())}

    def _solve(self, velocity: Any, noise: Tensor) -> Tensor:
        with torch.no_grad():
            return teacher_points(velocity, noise, self.options.steps, self.options.teacher_steps)
