"""Edits of a task gradient g against a direction o that is to be protected (AEGIS, arXiv:2604.16067, Eq. 12-14).

A step of -lr g changes the protected loss by -lr <g, o>, so g harms it where <g, o> < 0. What an edit promises holds
on the batch that gave o, to first order, and under plain SGD; `metric` carries it over to a preconditioned step.

Shapes: P numbers of all edited parameters, L groups (see `Layout`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.methods.gradients import Layout, Vector

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
