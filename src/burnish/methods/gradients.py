"""Gradients of many tensors as one vector [P], edited where they lie or handed on as they come.

Nothing of that size is made beside them. A vector is the list of parts that `products.parts` cuts, in the order of a
`Layout`'s names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from burnish.methods import products

Vector = list[Tensor]
"""[P]: flat float32 parts that share memory with tensors."""
GRANULARITIES = ("tensor", "layer", "global")
_LAYER = re.compile(r"^(.*?\blayers\.)(\d+)\.")


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
    return found[1] + found[2] if found else "other"


class Layout:
    """Which parameters a vector consists of, and in which of L groups each of them is.

    Args:
        shapes: parameter name to shape (where weights are sharded, that of this rank's rows).
        granularity: tensor, layer or global.
        device: of the vectors.
        dots: scalar products, see `products.dots`; a run's own are over all ranks.

    Attributes:
        names: parameters in the order of a vector.
        groups: names of the groups.
        places: for each name its parts of a vector.
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
        self._number: list[int] = []
        self.places: dict[str, slice] = {}
        for name, size in self._sizes.items():
            first = len(self._number)
            self._number += [self.groups.index(found[name])] * max(1, -(-size // largest))
            self.places[name] = slice(first, len(self._number))
        self._group = torch.tensor(self._number, device=self.device)

    def parts(self, tensors: Mapping[str, Tensor]) -> Vector:
        """[P] that shares memory with contiguous `tensors` by parameter name; zeros where one is missing."""
        return products.parts([
            tensors[name] if name in tensors else torch.zeros(self._sizes[name], device=self.device)
            for name in self.names
        ])  # fmt: skip

    def dots_of(self, name: str, tensor: Tensor, vector: Vector) -> Tensor:
        """float64 [L, 2]: products of one parameter's tensor with its place in `vector`, and with itself."""
        place, cut = self.places[name], products.parts([tensor])
        return products.dots(cut, [vector[place], cut], self._group[place], len(self.groups))

    def dot(self, one: Iterable[Tensor], other: Iterable[Tensor]) -> Tensor:
        """[L] float64: inner product of two vectors in each group."""
        return self.dots(one, [other])[0]

    def dots(self, one: Iterable[Tensor], others: Sequence[Iterable[Tensor]]) -> list[Tensor]:
        """[L] float64 for each of `others`: its inner product with `one`, which is read from memory only once."""
        return list(self._dots(one, others, self._group, len(self.groups)).unbind(1))

    def add_(self, vector: Vector, other: Vector, factors: Tensor) -> None:
        """Add `other` times its group's factor [L] to `vector`, in place; a factor of 0 leaves a group's bits alone."""
        if self.device.type == "cpu":  # numbers that are known need no tensor, and some parts no work
            known = factors.tolist()
            for part, added, number in zip(vector, other, self._number, strict=True):
                if known[number]:
                    part.add_(added, alpha=known[number])
            return
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


def stream_gradients(
    loss: Tensor, parameters: Sequence[nn.Parameter], take: Callable[[int, Tensor], None], retain_graph: bool = False
) -> None:
    """Backward of `loss` that hands each gradient to `take(index, gradient)` when it is there, and keeps none.

    No `.grad` is touched, and the hooks that synchronise ranks are left alone. What is not reached is not handed on.
    """

    def hook(index: int) -> Callable[[Tensor], Tensor]:
        def hand_on(gradient: Tensor) -> Tensor:
            take(index, gradient)
            return gradient.new_zeros(()).expand_as(gradient)  # autograd collects these until its end

        return hand_on

    handles = [parameter.register_hook(hook(index)) for index, parameter in enumerate(parameters)]
    try:
        torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()


def of_next_layers(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's gradients under the names of the layer before it, the first one's under the last one's.

    What lies outside of layers, or has no counterpart of its shape, is left out.
    """
    found = {name: match for name in gradients if (match := _LAYER.match(name))}
    last = {match[1]: 0 for match in found.values()}
    for match in found.values():
        last[match[1]] = max(last[match[1]], int(match[2]))
    moved = {}
    for name, match in found.items():
        number = (int(match[2]) + 1) % (last[match[1]] + 1)
        other = gradients.get(f"{match[1]}{number}{name[match.end(2) :]}")
        if other is not None and other.shape == gradients[name].shape:
            moved[name] = other
    return moved


def stop_decay(optimizer: torch.optim.Optimizer, protected: Mapping[str, nn.Parameter]) -> None:
    """Take weight decay off protected weights: it pulls towards zero and so away from their start.

    Adapters keep it, as they start from zero.
    """
    inside = {id(parameter) for name, parameter in protected.items() if ".lora_" not in name}
    freed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"] if id(p) in inside]
    gone = {id(parameter) for parameter in freed}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    if freed:
        optimizer.add_param_group({"params": freed, "weight_decay": 0.0})
