"""The seat of a training method: the hooks that the loop calls, in this order."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from burnish.core.registry import Registry
from burnish.core.types import Batch, PolicyLoss

if TYPE_CHECKING:
    from burnish.train.loop import Run


class Objective(nn.Module):
    """A method. Subclass, override what you need, register under a name; a run lists it in `objectives:`.

    It is a module, so parameters it owns (a projector, say) are trained, synchronised between ranks and saved
    with the run; they never reach the exported policy. Buffers are saved too; any other state goes through torch's
    `get_extra_state` and `set_extra_state` and must be JSON-able. docs/add_a_method.md has a whole example.
    """

    def setup(self, run: "Run") -> None:
        """Called once before the first step: build projector, anchor, reference cache.

        The policy then holds the weights it starts from, also in a run that resumes from a checkpoint.
        """

    def watch(self, run: "Run") -> AbstractContextManager[Any]:
        """Open around the policy's own forward of a step; `run.policy.capture(layers)` fits here."""
        return nullcontext()

    def loss(self, run: "Run", batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        """Added loss terms by name, each a scalar with gradient; runs inside the step's one forward."""
        return {}

    def edit_gradients(self, run: "Run", batch: Batch, grads: dict[str, Tensor]) -> dict[str, float]:
        """Edit or replace entries of `grads`, between backward (all ranks averaged) and clipping; returns figures.

        Names are the policy's own, and objectives.<objective>.<name> for parameters of methods. Whatever is drawn
        here comes from `run.shared_generator`, so that ranks stay equal. `batch` is the last micro-batch.
        """
        return {}

    def metrics(self) -> dict[str, float]:
        """Figures to log at this step."""
        return {}


OBJECTIVES: Registry[type[Objective]] = Registry("objective", room="burnish.methods", module="objective")
