"""What Adam makes of an edited gradient: the variants that mend it, and the leak that is left.

Adam divides every entry by the root of its second moment, so a gradient that is orthogonal to o gives a step that is
not. Both hooks below are torch's own (`Optimizer.register_step_pre_hook` and `_post_hook`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from burnish.methods.isolate.layout import Layout


class AdamWatch:
    """Keeps an eye on AdamW from just before to just after a step.

    Args:
        optimizer: torch's AdamW of the run.
        parameters: the edited ones by name, in the policy.
        layout: of their gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], layout: Layout):
        self.optimizer, self.parameters, self.layout = optimizer, parameters, layout
        self.beta2 = optimizer.param_groups[0]["betas"][1]
        self.eps = optimizer.param_groups[0]["eps"]
        self._plain: Tensor | None = None
        self._before: Tensor | None = None
        self._direction: Tensor | None = None
        self.leak: Tensor | None = None
        """[L] cosine of the last measured step and the protected gradient; positive raises the protected loss."""
        optimizer.register_step_pre_hook(lambda *_: self._enter())
        optimizer.register_step_post_hook(lambda *_: self._leave())

    def route(self, plain: Tensor, edited: Tensor, clipped: bool = True) -> None:
        """For the next step: Adam's second moment is to see `plain` [P], its first moment the edited gradient [P].

        With `clipped`, clipping of the edited gradient also shrinks what the second moment sees. Not so where the edit
        was made in the metric of that moment, which must then be the one that Adam divides by.
        """
        self._plain, self._clipped = plain, clipped
        self._edited_norm = edited.norm()

    def measure(self, direction: Tensor) -> None:
        """For the next step: compare it with the protected gradient `direction` [P]."""
        self._direction = direction

    def metric(self, gradient: Tensor, step: int) -> Tensor:
        """[P]: 1 / (sqrt(v) + eps) as Adam has it after seeing `gradient` [P], not yet clipped, as step `step`."""
        second = self._second_moments()
        second = gradient.square() if second is None else self.layout.flatten(second)
        if second is not None:
            second = self.beta2 * second + (1 - self.beta2) * gradient.square()
        return 1 / ((second / (1 - self.beta2**step)).sqrt_().add_(self.eps))

    def _second_moments(self) -> dict[str, Tensor] | None:
        state = self.optimizer.state
        found = {n: state[p]["exp_avg_sq"] for n, p in self.parameters.items() if "exp_avg_sq" in state.get(p, {})}
        return found or None

    @torch.no_grad()
    def _enter(self) -> None:
        if self._plain is not None:
            self._correct()
            self._plain = None
        if self._direction is not None:
            self._before = self.layout.flatten({name: p.data for name, p in self.parameters.items()})

    def _correct(self) -> None:
        """Shift v so that Adam's own v <- beta2 v + (1 - beta2) edited^2 ends at beta2 v + (1 - beta2) plain^2."""
        moments = self._second_moments()
        if moments is None:  # the very first step makes the state; from the second on it is exact
            return
        # What Adam will see now: another method may have put gradients of its own in place of the edited ones.
        seen = self.layout.flatten({n: p.grad for n, p in self.parameters.items() if p.grad is not None})
        clipped = (seen.norm() / self._edited_norm.clamp_min(1e-30)).clamp_max(1.0) if self._clipped else 1.0
        edited = seen.square()
        ratio = (1 - self.beta2) / self.beta2
        shift = self.layout.views((self._plain * clipped).square_().sub_(edited).mul_(ratio))
        # Rounding must not take the result below zero, whose root is NaN.
        least = self.layout.views(edited.mul_(-ratio * (1 - 1e-5)))
        for name, moment in moments.items():
            moment.add_(shift[name]).copy_(torch.maximum(moment, least[name]))

    @torch.no_grad()
    def _leave(self) -> None:
        if self._direction is None or self._before is None:
            return
        layout = self.layout
        moved = layout.flatten({name: p.data for name, p in self.parameters.items()}).sub_(self._before)
        scale = (layout.dot(moved, moved) * layout.dot(self._direction, self._direction)).sqrt()
        along = layout.dot(moved, self._direction)
        self.leak = torch.where(scale > 0, along / scale, 0.0)
        self._before = self._direction = None
