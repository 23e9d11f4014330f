"""Gradients of many tensors as one vector [P], edited where they lie: nothing of that size is made beside them.

A vector is the list of parts that `products.parts` cuts, in the order of a `Layout`'s names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from burnish.methods import products

Vector = list[Tensor]
"""[P]: flat float32 parts that share memory with tensors."""
GRANULARITIES = ("tensor", "layer", "global")
_LAYER = re.compile(r"^(.*?\blayers\.\d+)\.")


def group_of(name: str, granularity: str) -> str:
    """The group of a parameter: its own name, the block it lies in ("other" outside of all blocks), or "all".

    A block is what `layers.<number>` in the name says, so the blocks of vision tower and language model are apart
    and adapters (LoRA's A and B) belong to the block that they adapt.
    """
    if granularity == "global":
        return "all"
    if granularity == "tensor":
        return name
    found = _LAYER.match(name)
    return found[1] if found else "other"


class Layout:
    """Which parameters a vector consists of, and in which of L groups each of them is.

    Args:
        shapes: parameter name to shape.
        granularity: tensor, layer or global.
        device: of the vectors.
        dots: scalar products, see `products.dots`; a run's own are over all ranks.

    Attributes:
        names: parameters in the order of a vector.
        groups: names of the groups.
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], granularity: str, device: torch.device | str = "cpu",
        dots: Callable[..., Tensor] = products.dots,
    ):  # fmt: skip
        self.device, self._dots = torch.device(device), dots
        self._sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        found = {name: group_of(name, granularity) for name in shapes}
        self.names, self.groups = list(shapes), list(dict.fromkeys(found.values()))
        largest = products.part_size(self.device)
        self._number = [
            self.groups.index(found[name]) for name, size in self._sizes.items() for _ in range(-(-size // largest))
        ]
        self._group = torch.tensor(self._number, device=self.device)

    def parts(self, tensors: Mapping[str, Tensor]) -> Vector:
        """[P] that shares memory with contiguous `tensors` by parameter name; zeros where one is missing."""
        return products.parts([
            tensors[name] if name in tensors else torch.zeros(self._sizes[name], device=self.device)
            for name in self.names
        ])  # fmt: skip

    def dot(self, one: Iterable[Tensor], other: Iterable[Tensor]) -> Tensor:
        """[L] float64: inner product of two vectors in each group."""
        return self.dots(one, [other])[0]

    def dots(self, one: Iterable[Tensor], others: Sequence[Iterable[Tensor]]) -> list[Tensor]:
        """[L] float64 for each of `others`: its inner product with `one`, which is read from memory only once."""
        return list(self._dots(one, others, self._group, len(self.groups)).unbind(1))

    def add_(self, vector: Vector, other: Vector, factors: Tensor) -> None:
        """Add `other` times its group's factor [L] to `vector`, in place."""
        for part, added, factor in zip(vector, other, self.each(factors.float()), strict=True):
            part.addcmul_(added, factor)

    def clear_(self, vector: Vector, groups: Tensor) -> None:
        """Write zeros over the groups that are True in `groups` [L], whatever they hold, in place."""
        if self.device.type != "cpu" or bool(groups.any()):  # on a GPU it is cheaper to write than to ask
            for part, gone in zip(vector, self.each(groups), strict=True):
                part.masked_fill_(gone, 0.0)

    def each(self, values: Tensor) -> list[Tensor]:
        """For each part of a vector its group's entry of `values` [L]."""
        found = values.unbind()
        return [found[number] for number in self._number]
