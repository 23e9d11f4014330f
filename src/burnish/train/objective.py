"""The seat of a training method: five hooks that the loop calls, in this order."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from burnish.core.registry import Registry
from burnish.core.types import Batch, PolicyLoss

if TYPE_CHECKING:
    from burnish.train.loop import Run


class Objective(nn.Module):
    """A method. Subclass, override what you need, register under a name; a run lists it in `objectives:`.

    It is a module, so parameters it owns (a projector, say) are trained, synchronised between ranks and saved
    with the run; they never reach the exported policy.
    """

    def setup(self, run: "Run") -> None:
        """Called once before the first step: build projector, anchor, reference cache."""

    def loss(self, run: "Run", batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        """Added loss terms by name, each a scalar with gradient; runs inside the step's one forward."""
        return {}

    def edit_gradients(self, run: "Run", batch: Batch, grads: dict[str, Tensor]) -> dict[str, float]:
        """Edit `grads` in place, between backward (all ranks already averaged) and clipping; returns figures."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Figures to log at this step."""
        return {}


OBJECTIVES: Registry[type[Objective]] = Registry("objective")
