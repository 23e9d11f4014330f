"""Gradients of many tensors as one vector [P], edited where they lie or handed on as they come.

Nothing of that size is made beside them. A vector is the list of parts that `parts` cuts, in the order of a
`Layout`'s names. Each number is read
once, sums are added in float64; parts keep partial sums in float32 short and below 32-bit indices.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

PART_CPU = 1 << 18
"""Numbers in one partial sum on a CPU: two such parts stay in its cache."""
PART = 1 << 24
"""The same elsewhere, where a sum is a tree."""


def parts(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors of one device as flat parts that share their memory, in order."""
    flat = [tensor.view(-1) for tensor in (tensors.values() if isinstance(tensors, Mapping) else tensors)]
    size = part_size(flat[0].device) if flat else PART
    cut: list[Tensor] = []
    for tensor in flat:
        cut += tensor.split(size) if tensor.numel() > size else (tensor,)
    return cut


def part_size(device: torch.device) -> int:
    """Numbers of a part on this device, at most."""
    return PART_CPU if device.type == "cpu" else PART


@torch.no_grad()
def dots(one: Iterable[Tensor], others: Sequence[Iterable[Tensor]], group: Tensor, count: int) -> Tensor:
    """Scalar products of one vector with several others, each the parts of `parts`, apart for groups of parts.

    Args:
        one: parts; may be made as they are asked for.
        others: as many parts each, of the same sizes and type.
        group: int64 [number of parts], the group of each part, on the parts' device.
        count: number of groups, L.

    Returns:
        float64 [L, len(others)]; the host never waits for the device.
    """
    total = torch.zeros(count, len(others), dtype=torch.float64, device=group.device)
    partial: Tensor | None = None
    for number, (part, *rest) in enumerate(zip(one, *others, strict=True)):
        if partial is None:  # one room for all: parts that are made on the way would leave a gap around each scalar
            partial = part.new_empty(len(group), len(others))
        for at, other in enumerate(rest):
            torch.dot(part, other, out=partial[number, at])
    return total if partial is None else total.index_add_(0, group, partial.double())


def dot(one: Mapping[str, Tensor] | Sequence[Tensor], other: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """float64 scalar product of two collections of equal shapes, by name or in order."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        other = {name: other[name] for name in one}
    first, second = parts(one), parts(other)
    device = first[0].device if first else torch.device("cpu")
    return dots(first, [second], torch.zeros(len(first), dtype=torch.int64, device=device), 1)[0, 0]


def sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each rank holds some rows."""
    if type(tensor) in (Tensor, nn.Parameter):  # most are, and DTensor takes its time to import
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor, without gradient and sharing its memory; the whole one where it is not sharded."""
    found = tensor.detach()
    return found.to_local() if sharded(found) else found


def rows(tensor: Tensor) -> tuple[int, int]:
    """First and last of the whole tensor's rows that `local` gives; a scalar has one."""
    count = len(tensor) if tensor.ndim else 1
    if not sharded(tensor):
        return 0, count
    axis = next(axis for axis, placement in enumerate(tensor.placements) if placement.is_shard())
    step = -(-count // tensor.device_mesh.size(axis))  # as torch.chunk cuts
    first = min(step * tensor.device_mesh.get_local_rank(axis), count)
    return first, min(first + step, count)


def own_rows(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what `local` would give, were it sharded as `like` is."""
    return tensor[slice(*rows(like))] if sharded(like) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the rows of all ranks, without gradient; where it is sharded, every rank must ask."""
    found = tensor.detach()
    return found.full_tensor() if sharded(found) else found


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
        dots: scalar products, see `dots`; a run's own are over all ranks.

    Attributes:
        names: parameters in the order of a vector.
        groups: names of the groups.
        places: for each name its parts of a vector.
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], granularity: str, device: torch.device | str = "cpu",
        dots: Callable[..., Tensor] = dots,
    ):  # fmt: skip
        self.device, self._dots = torch.device(device), dots
        self._sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        found = {name: group_of(name, granularity) for name in shapes}
        self.names, self.groups = list(shapes), list(dict.fromkeys(found.values()))
        largest = part_size(self.device)
        self._number: list[int] = []
        self.places: dict[str, slice] = {}
        for name, size in self._sizes.items():
            first = len(self._number)
            self._number += [self.groups.index(found[name])] * max(1, -(-size // largest))
            self.places[name] = slice(first, len(self._number))
        self._group = torch.tensor(self._number, device=self.device)

    def parts(self, tensors: Mapping[str, Tensor]) -> Vector:
        """[P] that shares memory with contiguous `tensors` by parameter name; zeros where one is missing."""
        return parts([
            tensors[name] if name in tensors else torch.zeros(self._sizes[name], device=self.device)
            for name in self.names
        ])  # fmt: skip

    def dots_of(self, name: str, tensor: Tensor, vector: Vector) -> Tensor:
        """float64 [L, 2]: products of one parameter's tensor with its place in `vector`, and with itself."""
        place, cut = self.places[name], parts([tensor])
        return dots(cut, [vector[place], cut], self._group[place], len(self.groups))

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
