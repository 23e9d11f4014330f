"""Grid distillation (after 2202.00512): the policy learns to act in K steps of its own sampler, as good as many.

The teacher goes from noise (t = 1) to data (t = 0) in M fine steps, M a multiple of K; x_0, ..., x_K are its points at
the times 1, 1 - 1/K, ..., 0. From each x_k one step of the student, of length 1/K, is to end at x_(k+1). A student
without error walks along the teacher's own points, so all K steps of a chunk are trained at once, on one encoding of
the observation. No action labels enter.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.options import option, read_options
from burnish.core.types import Batch, PolicyLoss
from burnish.methods.objective import OBJECTIVES, Extra, Objective, Run, num_bytes
from burnish.policies.base import Policy, require
from burnish.runtime.executor import Runtime
from burnish.sampling.solvers import Velocity, grid


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

    def choose_trained(self, recipe: RecipeConfig, policy: Policy) -> None:
        require(policy, "runtime", "few_steps")
        for _, parameter in policy.backbone_parameters():
            parameter.requires_grad_(False)

    def cost(self, recipe: RecipeConfig, policy: Policy) -> Extra:
        """The teacher's copy of what is trained, and the student's forward over the steps."""
        return Extra(num_bytes(p for p in policy.parameters() if p.requires_grad), recipe.train.batch_size)

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


def teacher_points(velocity: Velocity, noise: Tensor, steps: int, fine: int) -> Tensor:
    """[B, K + 1, T, A]: where `fine` Euler steps from `noise` [B, T, A] stand after every `fine` / K of them.

    Args:
        steps: K, a divisor of `fine`.
        fine: M.
    """
    points, kept = noise, [noise]
    for number, step in enumerate(grid(fine), 1):
        points = points - step.length * velocity(points, step.time)
        if number % (fine // steps) == 0:
            kept.append(points)
    return torch.stack(kept, 1)


def times(steps: int, like: Tensor) -> Tensor:
    """[B, K] flow times at which the student's steps begin, for points `like` [B, K + 1, T, A]."""
    return like.new_tensor([step.time for step in grid(steps)]).expand(len(like), steps)


def landing_error(points: Tensor, velocities: Tensor) -> Tensor:
    """[B, K, T, A]: where the student's steps end minus where they should.

    Args:
        points: [B, K + 1, T, A] of the teacher.
        velocities: [B, K, T, A] of the student at the first K of them.
    """
    return points[:, :-1] - velocities / velocities.shape[1] - points[:, 1:]
