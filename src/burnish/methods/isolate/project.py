"""Edits of a task gradient g against a direction o that is to be protected (AEGIS, arXiv:2604.16067, Eq. 12-14).

A step of -lr g changes the protected loss by -lr <g, o>, so g harms it where <g, o> < 0. What an edit promises holds
on the batch that gave o, to first order, and under plain SGD; `metric` carries it over to a preconditioned step.

Shapes: P numbers of all edited parameters, L groups (see `Layout`).

Adam divides every entry by the root of its second moment, so a gradient that is orthogonal to o gives a step that is
not: `AdamWatch` measures that leak or corrects it, part by part, in torch's own hooks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.methods.gradients import Layout, Vector, local, parts

_SMALLEST = 1e-30


@dataclass(frozen=True)
class Edited:
    """What an edit did.

    Args:
        cosine: [L] float64, of g and o in each group.
        removed: [L] float64, fraction of the squared norm of g that was removed.
        size: [L] float64, squared norm of g.
    """

    cosine: Tensor
    removed: Tensor
    size: Tensor

    @property
    def removed_overall(self) -> Tensor:
        """Scalar: fraction of the squared norm of the whole gradient that was removed."""
        return (self.removed * self.size).sum() / self.size.sum().clamp_min(_SMALLEST)

    @property
    def conflict_rate(self) -> Tensor:
        """Scalar: share of the groups in which something was taken away (in Adam's metric the norm may even grow)."""
        return (self.removed != 0).double().mean()


class Direction:
    """What is protected: one direction [P] and its squared norm [L] in each group, computed when first asked for.

    A group that is zero, holds NaN or infinity, or is too small for its square to be a float32 (norm below 1e-15)
    is cleared: it protects nothing, and spoils nothing. No epsilon is added to the squared norm anywhere: that would
    silently undo the projection of small gradients.

    Args:
        vector: [P]; taken over and cleaned.
    """

    def __init__(self, vector: Vector, layout: Layout):
        self._vector, self._layout = vector, layout
        self._square: Tensor | None = None

    @property
    def square(self) -> Tensor:
        """[L] squared norm of each group."""
        if self._square is None:
            self._clean(self._layout.dot(self._vector, self._vector))
        return self._square

    @property
    def vector(self) -> Vector:
        """[P], cleaned."""
        if self._square is None:
            self._clean(self._layout.dot(self._vector, self._vector))
        return self._vector

    def along(self, gradient: Vector) -> Tensor:
        """[L]: inner product with `gradient`, 0 where there is no direction."""
        if self._square is None:  # both in one pass over the memory
            along, square = self._layout.dots(self._vector, [gradient, self._vector])
            self._clean(square)
        else:
            along = self._layout.dot(self._vector, gradient)
        return torch.where(self.square > 0, along, 0.0)

    def _clean(self, square: Tensor) -> None:
        absent = ~(square.isfinite() & (square > _SMALLEST))
        self._layout.clear_(self._vector, absent)
        self._square = torch.where(absent, 0.0, square)


def edit(
    gradient: Vector, direction: Direction, layout: Layout, rule: str = "conflict", strength: float = 1.0,
    metric: Callable[[], Iterable[Tensor]] | None = None, measure: bool = True,
) -> tuple[Tensor, Edited | None]:  # fmt: skip
    """Project `gradient` in place.

    Args:
        gradient: [P], overwritten.
        rule: "conflict" removes the component along o where it harms (the paper); "always" removes it in any case;
            "soft" removes the share `strength` of what "conflict" removes.
        strength: 0 to 1, for "soft".
        metric: gives the parts of a positive [P], the diagonal D of a preconditioner. Then <g, D o> takes the place of
            <g, o>, and it is the preconditioned step D g' (Adam's, say) that does no harm; None is 1.
        measure: also compute what `Edited` holds; None stands in its place otherwise.

    Returns:
        The factor [L] float64 of each group, g' = g - factor o, and what that did.
    """

    def measured() -> Iterable[Tensor]:
        """Parts of D o, made again each time: together they are as large as all gradients."""
        return o if metric is None else (d * part for d, part in zip(metric(), o, strict=True))

    if metric is None:
        along, length, o = direction.along(gradient), direction.square, direction.vector
    else:
        o = direction.vector
        along, length = layout.dots(measured(), [gradient, o])
    factor = torch.where(length > 0, along / length, 0.0)
    if rule != "always":
        factor = factor.clamp_max(0.0) * (strength if rule == "soft" else 1.0)
    figures = None
    if measure:
        size, norm = layout.dot(gradient, gradient), direction.square
        cross = along if metric is None else layout.dot(gradient, o)
        scale = (size * (norm if metric is None else layout.dot(measured(), measured()))).sqrt()
        figures = Edited(_ratio(along, scale), _ratio(factor * (2 * cross - factor * norm), size), size)
    layout.add_(gradient, o, -factor)  # without conflict the factor is 0, and g keeps its bits
    return factor, figures


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)


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
