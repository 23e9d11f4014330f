"""What Adam makes of an edited gradient: the variants that correct it, and the leak that is left.

Adam divides every entry by the root of its second moment, so a gradient that is orthogonal to o gives a step that is
not. Both hooks below are torch's own (`Optimizer.register_step_pre_hook` and `_post_hook`). What is as large as all
weights is made part by part.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from burnish.methods.gradients import Layout, Vector, local, parts
from burnish.methods.isolate.project import Direction


class AdamWatch:
    """Keeps an eye on AdamW from just before to just after a step.

    Args:
        parameters: the edited ones by name, in the policy.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], layout: Layout):
        self.optimizer, self.parameters, self.layout = optimizer, parameters, layout
        self.beta1, self.beta2 = optimizer.param_groups[0]["betas"]
        self.eps = optimizer.param_groups[0]["eps"]
        self._route: tuple[Vector, Tensor, Tensor, bool] | None = None
        self._direction: Direction | None = None
        self.leak: Tensor | None = None
        """[L] cosine of the last measured step and the protected gradient; positive raises the protected loss."""
        optimizer.register_step_pre_hook(lambda *_: self._enter())
        optimizer.register_step_post_hook(lambda *_: self._leave())

    def route(self, edited: Vector, direction: Direction, factor: Tensor, clipped: bool = True) -> None:
        """For the next step: Adam's first moment is to see `edited` [P], its second edited + factor o, before the edit.

        With `clipped`, clipping of the edited gradient also shrinks what the second moment sees. Not so where the edit
        was made in the metric of that moment, which must then be the one that Adam divides by.
        """
        self._route = direction.vector, factor, self.layout.dot(edited, edited).sum().sqrt(), clipped

    def measure(self, direction: Direction) -> None:
        """For the next step: compare it with the protected gradient."""
        self._direction = direction

    def metric(self, gradient: Vector, step: int) -> Iterator[Tensor]:
        """Parts of [P]: 1 / (sqrt(v) + eps) as Adam has it after seeing `gradient`, not yet clipped, as step `step`."""
        moments = self._second_moments()
        for number, part in enumerate(gradient):
            second = part.square()
            if moments is not None:
                second = self.beta2 * moments[number] + (1 - self.beta2) * second
            else:
                second = (1 - self.beta2) * second
            yield 1 / ((second / (1 - self.beta2**step)).sqrt_().add_(self.eps))

    def _second_moments(self) -> Vector | None:
        """Adam's, once it has made them; zeros for a parameter that no step has reached."""
        state = self.optimizer.state
        reached = {n: state[p] for n, p in self.parameters.items() if "exp_avg_sq" in state.get(p, {})}
        return self.layout.parts({n: local(one["exp_avg_sq"]) for n, one in reached.items()}) if reached else None

    @torch.no_grad()
    def _enter(self) -> None:
        if self._route is not None:
            self._correct(*self._route)
            self._route = None

    def _correct(self, direction: Vector, factor: Tensor, edited_norm: Tensor, clipped: bool) -> None:
        """Shift v so that Adam's own v <- beta2 v + (1 - beta2) edited^2 ends at beta2 v + (1 - beta2) plain^2."""
        moments = self._second_moments()
        if moments is None:  # the very first step makes the state; from the second on it is exact
            return
        # What Adam will see now: another method may have put gradients of its own in place of the edited ones.
        seen = self.layout.parts(
            {n: local(p.grad).contiguous() for n, p in self.parameters.items() if p.grad is not None}
        )
        norm = self.layout.dot(seen, seen).sum().sqrt()
        shrunk = (norm / edited_norm.clamp_min(1e-30)).clamp(1e-30, 1.0)
        before, added = (1.0, factor * shrunk) if clipped else ((1 / shrunk).float(), factor)
        ratio = (1 - self.beta2) / self.beta2
        for moment, part, o, f in zip(moments, seen, direction, self.layout.each(added.float()), strict=True):
            square = part.square()
            shift = (part * before).addcmul_(o, f).square_().sub_(square).mul_(ratio)
            # Rounding must not take the result below zero, whose root is NaN.
            torch.maximum(moment.add_(shift), square.mul_(-ratio * (1 - 1e-5)), out=moment)

    @torch.no_grad()
    def _leave(self) -> None:
        if self._direction is None:
            return
        along = self.layout.dot(self._moves(), self._direction.vector)
        scale = (self.layout.dot(self._moves(), self._moves()) * self._direction.square).sqrt()
        self.leak = torch.where(scale > 0, along / scale, 0.0)
        self._direction = None

    def _moves(self) -> Iterator[Tensor]:
        """Parts of [P]: by how much the step has moved the weights, weight decay included, from what Adam now holds."""
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        for name in self.layout.names:
            parameter = self.parameters[name]
            state = self.optimizer.state.get(parameter)
            if parameter.grad is None or not state:  # not stepped
                yield from (torch.zeros_like(part) for part in parts([local(parameter)]))
                continue
            lr, decay = groups[parameter]["lr"], groups[parameter]["weight_decay"]
            one, two = 1 - self.beta1 ** state["step"], (1 - self.beta2 ** state["step"]).sqrt()
            each = (parts([local(tensor)]) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]))
            for weight, first, second in zip(*each, strict=True):
                step = first / one / (second.sqrt() / two).add_(self.eps)
                yield step.add_(weight, alpha=decay).mul_(-lr / (1 - lr * decay))
