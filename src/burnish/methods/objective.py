"""The seat of a training method: what a method is (`Objective`), and what it may see of a run (`Run`)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from burnish.core.config import RecipeConfig
from burnish.core.registry import Registry
from burnish.core.types import Batch, PolicyLoss
from burnish.data.loader import RobotData
from burnish.policies.base import Policy

Tensors = Mapping[str, Tensor] | Sequence[Tensor]
"""Contiguous tensors by name or in order."""


class Run(Protocol):
    """What a method may see of a run. The loop's own class fulfils it; methods never import that one.

    Attributes:
        recipe: the whole recipe.
        policy: the policy in training; its verbs may be called inside `Objective.loss`.
        data: the robot's frames; `data.meta` is LeRobot's metadata (fps, features, stats, tasks).
        objectives: all methods of the run by name.
        trained: trained parameters by name, those of methods as "objectives.<objective>.<parameter>" (from
            `Objective.begin` on: while methods are set up, the policy's alone). Sharded, they are DTensors:
            `methods.gradients.local` has this rank's rows.
        average: moving average of the trained parameters (`shadow`, by the same names), or None; from `begin` on.
        optimizer: torch's AdamW over `trained`.
        step: optimiser steps done.
        number: of the micro-batch under way, counted since the run began over all steps and ranks: what is drawn or
            chosen for it follows from the run's seed and this alone, however many ranks there are.
        sharded: whether every rank holds some rows of each parameter, gradient and moment (FSDP2).
        device: where parameters and batches live.
        generator: for draws about this rank's batch, on `device`; reseeded at every step from seed, rank and step.
        shared_generator: the same on every rank: for draws in `edit_gradients`, or ranks would drift apart.
        accelerator: accelerate's (`num_processes`, `process_index`, `reduce`, `gather`, `scaler`).
        output: the run folder.
        parent_hash: of the weights that the run starts from, see core.provenance.weights_hash.
        progress: whether to show progress bars.
    """

    recipe: RecipeConfig
    policy: Policy
    data: RobotData
    objectives: "dict[str, Objective]"
    trained: dict[str, nn.Parameter]
    average: Any
    optimizer: torch.optim.Optimizer
    step: int
    number: int
    sharded: bool
    device: torch.device
    generator: torch.Generator
    shared_generator: torch.Generator
    accelerator: Accelerator
    output: Path
    parent_hash: str
    progress: bool

    def dot(self, one: Tensors, other: Tensors) -> Tensor:
        """Scalar product of two collections of equal names or order and shapes: a float64 scalar on the device.

        Weights and gradients may be shards; this and `norm` and `dots` are over the whole, with one reduction over
        ranks. Sums that a method forms itself are over this rank's rows, and go through `total`.
        """
        ...

    def total(self, partial: Tensor) -> Tensor:
        """Sums over this rank's rows to those over all rows; the argument itself where nothing is sharded."""
        ...

    def inner_backward(self) -> AbstractContextManager[Any]:
        """Open around `torch.autograd.grad` inside `Objective.loss`, or sharded weights would be put away too early."""
        ...

    def stream_gradients(
        self, loss: Tensor, names: Sequence[str], take: Callable[[int, Tensor], None], retain_graph: bool = False
    ) -> None:
        """Hand `take(index, gradient)` the gradient of `loss` for each of these trained parameters that it reaches.

        No `.grad` is touched. Sharded, gradients are this rank's rows and averaged over ranks; otherwise they are whole
        and of this rank's loss alone. May be called inside `Objective.loss` and inside `ask`.
        """
        ...

    def holding(self, values: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        """Inside, sharded parameters hold other values (this rank's rows by name); for `Objective.loss`."""
        ...

    def ask[T](self, call: Callable[..., T], *args: Any) -> T:
        """`call(*args)` with whole weights, from outside of `Objective.loss`; sharded, every rank must ask."""
        ...

    def norm(self, tensors: Tensors) -> Tensor:
        """Euclidean norm of a collection: a float64 scalar on the device."""
        ...

    def dots(self, one: Iterable[Tensor], others: Sequence[Iterable[Tensor]], group: Tensor, count: int) -> Tensor:
        """float64 [groups, others]: many scalar products with one reduction over ranks, see methods.gradients.dots."""
        ...

    def say(self, lines: list[str]) -> None:
        """Log warnings, on the first rank only."""
        ...


class Extra(NamedTuple):
    """What a method takes of memory beside plain training.

    Attributes:
        kept: bytes from step to step, or beside the gradients: a reference, an anchor, a protected gradient.
        samples: whose activations are there together with those of the imitation batch, as many as make it smaller or
            larger with it.
        fixed: the same, of samples whose number stays where a batch is taken in pieces.
    """

    kept: int = 0
    samples: int = 0
    fixed: int = 0


def num_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(p.numel() * p.element_size() for p in parameters)


def thaw(recipe: RecipeConfig) -> str:
    """The flag under which a backbone is trained that the recipe freezes, or else the policy's config."""
    field = next((name for name in ("freeze", "train_only") if getattr(recipe.train, name)), "")
    return f"--train.{field}='[]'" if field else "--policy.overrides.train_expert_only=false"


class Objective(nn.Module):
    """A method. Subclass, override what you need, register under a name; a run lists it in `objectives:`.

    It is a module, so parameters it owns (a projector, say) are trained, synchronised between ranks and saved
    with the run; they never reach the exported policy. Buffers are saved too; any other state goes through torch's
    `get_extra_state` and `set_extra_state` and must be JSON-able. docs/add_a_method.md has a whole example.

    Attributes:
        needs_full_gradients: whether `edit_gradients` needs whole tensors. Elementwise edits and `run.dot` do not;
            a method that does is refused where gradients are shards.
    """

    needs_full_gradients = False
    reads_moments = False
    """Whether it reads AdamW's moments, which then are in float32."""

    def choose_trained(self, recipe: RecipeConfig, policy: Policy) -> None:
        """Called once, before the optimiser is made: the place to switch `requires_grad` of the policy's parameters.

        Adapters are in place and the recipe's patterns have been applied.
        """

    def setup(self, run: Run) -> None:
        """Called once before the first step, on a complete run: build projector, anchor, reference cache.

        The policy then holds the weights it starts from, also in a run that resumes from a checkpoint. Parameters that
        are made here are trained from the first step.
        """

    def cost(self, recipe: RecipeConfig, policy: Policy) -> Extra:
        """For `burnish method cost`, where nothing is loaded: `policy` has shapes alone, `choose_trained` is done."""
        return Extra()

    def begin(self, run: Run) -> None:
        """Called once after `setup`, when `run.trained` holds the tensors that the steps train, still at their start.

        The place to keep parameters, or copies of them: where weights are sharded, those of `setup` are gone by now.
        """

    def watch(self, run: Run) -> AbstractContextManager[Any]:
        """Open around the policy's own forward of a step; `run.policy.capture(layers)` fits here."""
        return nullcontext()

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        """Added loss terms by name, each a scalar with gradient; runs inside the step's one forward."""
        return {}

    def edit_gradients(self, run: Run, batch: Batch, grads: dict[str, Tensor]) -> dict[str, float]:
        """Edit or replace entries of `grads`, between backward (all ranks averaged) and clipping; returns figures.

        Names are the policy's own, and objectives.<objective>.<name> for parameters of methods. Whatever is drawn
        here comes from `run.shared_generator`, so that ranks stay equal. `batch` is the last micro-batch.
        """
        return {}

    def end(self, run: Run) -> None:
        """Called once after the last step, whether all are done or the time is over, before its `metrics`."""

    def metrics(self) -> dict[str, float]:
        """Figures to log at this step."""
        return {}


OBJECTIVES: Registry[type[Objective]] = Registry("objective", room="burnish.methods", module="objective", by_path=True)
