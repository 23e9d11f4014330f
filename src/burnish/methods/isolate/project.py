"""Edits of a task gradient g against a direction o that is to be protected (AEGIS, arXiv:2604.16067, Eq. 12-14).

A step of -lr g changes the protected loss by -lr <g, o>, so g harms it where <g, o> < 0. What an edit promises holds
on the batch that gave o, to first order, and under plain SGD; `metric` carries it over to a preconditioned step.

Shapes: P numbers of all edited parameters, L groups (see `Layout`), K directions. A vector [P] is a buffer or pieces.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.methods.isolate.layout import Layout, Vector

KINDS = ("conflict", "always", "soft")
_ROUNDS = 64
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Rule:
    """What is taken out of a gradient.

    Args:
        kind: "conflict" removes the component along o where it harms (the paper); "always" removes it in any case;
            "soft" removes the share `strength` of what "conflict" removes.
        strength: 0 to 1, for "soft".
    """

    kind: str = "conflict"
    strength: float = 0.5


@dataclass(frozen=True)
class Edited:
    """An edited gradient and what was done to it.

    Args:
        gradient: [P].
        cosine: [L] float64, of g and o in each group (of the worst direction where there are several).
        shed: [L] float64, share of the squared norm of g that was removed.
        size: [L] float64, squared norm of g.
    """

    gradient: Vector
    cosine: Tensor
    shed: Tensor
    size: Tensor

    @property
    def shed_overall(self) -> Tensor:
        """Scalar: share of the squared norm of the whole gradient that was removed."""
        return (self.shed * self.size).sum() / self.size.sum().clamp_min(_SMALLEST)

    @property
    def firing(self) -> Tensor:
        """Scalar: share of the groups in which something was taken away (in Adam's metric the norm may even grow)."""
        return (self.shed != 0).double().mean()


class Direction:
    """What is protected: one direction [P] and its squared norm [L] in each group, computed when first asked for.

    A group that is zero, holds NaN or infinity, or is too small for its square to be a float32 (norm below 1e-15)
    is cleared: it protects nothing, and spoils nothing. No epsilon is added to the squared norm anywhere: that would
    silently undo the projection of small gradients.

    Args:
        vector: [P]; taken over and cleaned.
        layout: its layout.
    """

    def __init__(self, vector: Vector, layout: Layout):
        self._vector, self._layout = vector, layout
        self._square: Tensor | None = None

    @property
    def square(self) -> Tensor:
        """[L] squared norm of each group."""
        self._settle()
        return self._square

    @property
    def vector(self) -> Vector:
        """[P], cleaned."""
        self._settle()
        return self._vector

    @property
    def flat(self) -> Tensor:
        """[P] as one buffer."""
        return self.vector if isinstance(self.vector, Tensor) else torch.cat(self.vector)

    def along(self, gradient: Vector) -> Tensor:
        """[L]: inner product with `gradient`, 0 where there is no direction."""
        if self._square is None:  # both in one pass over the memory
            along, square = self._layout.dots(self._vector, [gradient, self._vector])
            self._clean(square)
        else:
            along = self._layout.dot(self._vector, gradient)
        return torch.where(self._square > 0, along, 0.0)

    def _settle(self) -> None:
        if self._square is None:
            self._clean(self._layout.dot(self._vector, self._vector))

    def _clean(self, square: Tensor) -> None:
        absent = ~(square.isfinite() & (square > _SMALLEST))
        self._layout.clear_(self._vector, absent)
        self._square = torch.where(absent, 0.0, square)

    def unit(self, layout: Layout) -> Tensor:
        """[P], a buffer: every group scaled to norm 1 (or zero where there is no direction)."""
        inverse = torch.where(self.square > 0, self.square.clamp_min(_SMALLEST).rsqrt(), 0.0)
        return layout.scale_(self.flat.clone(), inverse)


def edit(gradient: Vector, direction: Direction, layout: Layout, rule: Rule = Rule(),
         metric: Tensor | None = None, measure: bool = True) -> Edited | None:  # fmt: skip
    """Project `gradient` in place.

    Args:
        gradient: [P], overwritten.
        direction: what to protect, a vector of the same kind.
        layout: their layout.
        rule: what to remove.
        metric: positive [P], a buffer, as the others are then: the diagonal D of a preconditioner. Then <g, D o> takes
            the place of <g, o>, and it is the preconditioned step D g' (Adam's, say) that does no harm; None is 1.
        measure: also compute what `Edited` holds; None is returned otherwise.
    """
    if metric is None:
        along, length, o = direction.along(gradient), direction.square, direction.vector
        measured = o
    else:
        o = direction.vector
        measured = metric * o
        along, length = layout.dots(measured, [gradient, o])
    coefficient = torch.where(length > 0, along / length, 0.0)
    if rule.kind != "always":
        coefficient = coefficient.clamp_max(0.0) * (rule.strength if rule.kind == "soft" else 1.0)
    figures = None
    if measure:
        size, norm = layout.dot(gradient, gradient), direction.square
        cross = along if metric is None else layout.dot(gradient, o)
        scale = (size * (norm if metric is None else layout.dot(measured, measured))).sqrt()
        removed = coefficient * (2 * cross - coefficient * norm)
        figures = Edited(gradient, _ratio(along, scale), _ratio(removed, size), size)
    layout.add_(gradient, o, -coefficient)  # without conflict the factor is 0, and g keeps its bits
    return figures


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)


def orthonormal(directions: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """QR of K directions in each group.

    Args:
        directions: [K, P], each from `Direction.unit`.

    Returns:
        Q [K, P] with orthonormal rows in each group, and the factor R [L, K, K] float64 with <direction_k, x> =
        sum_j R[l, j, k] <Q_j, x>. A direction that depends on earlier ones gives a zero row.
    """
    count = len(directions)
    basis = directions.clone()
    factor = torch.zeros(len(layout.groups), count, count, dtype=torch.float64, device=directions.device)
    for k in range(count):
        for _ in range(2):  # the second pass mends what the rounding of the first leaves
            for j in range(k):
                along = layout.dot(basis[j], basis[k])
                factor[:, j, k] += along
                layout.add_(basis[k], basis[j], -along)
        norm = layout.dot(basis[k], basis[k]).sqrt()
        kept = norm > 1e-4  # less is left only of a direction that the others span, and that is rounding
        factor[:, k, k] = torch.where(kept, norm, 0.0)
        layout.scale_(basis[k], torch.where(kept, 1 / norm.clamp_min(1e-30), 0.0))
    return basis, factor


def edit_several(gradient: Tensor, basis: Tensor, factor: Tensor, layout: Layout, rule: Rule = Rule()) -> Edited:
    """Project `gradient` in place against K directions at once.

    "always" removes the whole span. "conflict" gives the nearest gradient that harms none of the K: for one direction
    the paper's rule, for several the quadratic program of GEM (arXiv:1706.08840). "soft" goes the share `strength` of
    that way.

    Args:
        gradient: [P], overwritten.
        basis, factor: from `orthonormal`.
    """
    inside = torch.stack([layout.dot(gradient, row) for row in basis], dim=-1)  # [L, K]: g as the basis sees it
    size = layout.dot(gradient, gradient)
    along = torch.einsum("ljk,lj->lk", factor, inside)
    if rule.kind == "always":
        change = -inside
    else:
        change = (nearest_harmless(inside, factor) - inside) * (rule.strength if rule.kind == "soft" else 1.0)
    for row, factors in zip(basis, change.unbind(-1), strict=True):
        layout.add_(gradient, row, factors)
    removed = -(change * (2 * inside + change)).sum(-1)
    return Edited(gradient, _ratio(along.amin(-1), size.sqrt()), _ratio(removed, size), size)


def nearest_harmless(inside: Tensor, factor: Tensor) -> Tensor:
    """The point [L, K] nearest to `inside` [L, K] whose product with no column of `factor` [L, K, K] is negative.

    Hildreth's coordinate ascent on the multipliers of the K constraints finds those that are active, and one exact
    solve on them gives the point. Works on all groups at once and never waits for the device.
    """
    gram = factor.mT @ factor
    along = torch.einsum("ljk,lj->lk", factor, inside)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    multiplier = torch.zeros_like(along)
    for _ in range(_ROUNDS):
        for k in range(along.shape[-1]):
            others = (gram[:, k] * multiplier).sum(-1) - diagonal[:, k] * multiplier[:, k]
            best = (-(along[:, k] + others) / diagonal[:, k].clamp_min(_SMALLEST)).clamp_min(0.0)
            multiplier[:, k] = torch.where(diagonal[:, k] > 0, best, 0.0)
    active = multiplier > 1e-9 * (1 + along.abs())
    system = torch.where(active[:, :, None] & active[:, None, :], gram, 0.0) + torch.diag_embed((~active).double())
    solved, failed = torch.linalg.solve_ex(system, torch.where(active, -along, 0.0))
    good = (failed[:, None] == 0) & (solved.isfinite() & (solved >= 0)).all(-1, keepdim=True)
    return inside + torch.einsum("ljk,lk->lj", factor, torch.where(good, solved, multiplier))
