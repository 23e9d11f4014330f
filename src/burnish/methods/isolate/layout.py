"""Gradients of many tensors as one vector [P], a layer's beside one another, so that an edit is a few cheap operations.

A vector is either one flat buffer or a list of pieces that lie where the tensors lie. On a GPU the buffer wins: few
kernels. On a CPU the pieces do: `torch.dot` reads each number once and writes nothing in between (multiplying and
summing, or `torch._foreach_mul`, write everything once more), and copying into a buffer would cost as much as the
edit itself. No operation here waits for the device.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Vector = Tensor | list[Tensor]
"""[P]: `Layout.flatten`'s buffer or `Layout.pieces`' list."""
GRANULARITIES = ("tensor", "layer", "global")
_LAYER = re.compile(r"^(.*?\blayers\.\d+)\.")
_CPU_CHUNK = 1 << 18
"""Numbers in one partial sum on a CPU. Partial sums are added up in float64; on a GPU cuBLAS sums a layer as a tree."""


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
    """Where each parameter lies in a flat buffer [P].

    Args:
        shapes: parameter name to shape.
        granularity: tensor, layer or global.
        device: of the buffers.

    Attributes:
        names: parameters in the order of the buffer.
        groups: names of the L groups.
        size: P.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], granularity: str, device: torch.device | str = "cpu"):
        members: dict[str, list[str]] = {}
        for name in shapes:
            members.setdefault(group_of(name, granularity), []).append(name)
        self.device = torch.device(device)
        self.groups = list(members)
        self.names = [name for group in members.values() for name in group]
        self._shapes = [torch.Size(shapes[name]) for name in self.names]
        self._sizes = [shape.numel() for shape in self._shapes]
        self._group_sizes = [sum(torch.Size(shapes[n]).numel() for n in group) for group in members.values()]
        self.size = sum(self._sizes)
        self._make_chunks([number for number, group in enumerate(members.values()) for _ in group])

    def _make_chunks(self, group_of_name: list[int]) -> None:
        largest = _CPU_CHUNK if self.device.type == "cpu" else max(self._group_sizes)
        self._chunks, groups = _cut(self._group_sizes, range(len(self.groups)), largest)
        self._group_of_chunk = torch.tensor(groups, device=self.device)
        _, self._groups_of_pieces = _cut(self._sizes, group_of_name, _CPU_CHUNK)
        self._group_of_piece = torch.tensor(self._groups_of_pieces, device=self.device)

    def pieces(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """[P] as float32 pieces that share memory with contiguous `tensors` by parameter name; zeros where one is
        missing."""
        found = []
        for name, size in zip(self.names, self._sizes, strict=True):
            whole = tensors[name].view(-1) if name in tensors else torch.zeros(size, device=self.device)
            found += whole.split(_CPU_CHUNK) if size > _CPU_CHUNK else [whole]
        return found

    def flatten(self, tensors: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """[P] float32 with `tensors` by parameter name; zeros where one is missing."""
        with torch.no_grad():
            if self.names == list(tensors):
                parts = [tensor.reshape(-1) for tensor in tensors.values()]
            else:
                parts = [
                    tensors[name].reshape(-1) if name in tensors else torch.zeros(size, device=self.device)
                    for name, size in zip(self.names, self._sizes, strict=True)
                ]
            if any(part.dtype is not torch.float32 for part in parts):
                parts = [part.float() for part in parts]
            return torch.cat(parts, out=out)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters' parts of a buffer [P], sharing its memory."""
        parts = zip(self.names, flat.split(self._sizes), self._shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def dot(self, a: Vector, b: Vector) -> Tensor:
        """[L] float64: inner product of two vectors [P] of one kind in each group."""
        return self.dots(a, [b])[0]

    def dots(self, vector: Vector, others: Sequence[Vector]) -> list[Tensor]:
        """[L] float64 for each of `others`: its inner product with `vector`, which is read from memory only once."""
        flat = isinstance(vector, Tensor)
        split = [one.split(self._chunks) if flat else one for one in (vector, *others)]
        partial = torch.stack([torch.dot(part, x) for part, *rest in zip(*split, strict=True) for x in rest])
        total = torch.zeros(len(self.groups), len(others), dtype=torch.float64, device=self.device)
        total.index_add_(0, self._group_of_chunk if flat else self._group_of_piece,
                         partial.double().view(-1, len(others)))  # fmt: skip
        return list(total.unbind(1))

    def scale_(self, vector: Vector, factors: Tensor) -> Vector:
        """Multiply each group of a vector [P] by its factor [L], in place."""
        for part, factor in zip(*self._parts(vector, factors.float()), strict=True):
            part.mul_(factor)
        return vector

    def add_(self, vector: Vector, other: Vector, factors: Tensor) -> Vector:
        """Add `other` [P] times its group's factor [L] to `vector` [P] of the same kind, in place."""
        parts, each = self._parts(vector, factors.float())
        for part, added, factor in zip(parts, self._parts(other, factors)[0], each, strict=True):
            part.addcmul_(added, factor)
        return vector

    def clear_(self, vector: Vector, groups: Tensor) -> Vector:
        """Write zeros over the groups that are True in `groups` [L], whatever they hold, in place."""
        if self.device.type != "cpu" or bool(groups.any()):  # on a GPU it is cheaper to write than to ask
            for part, gone in zip(*self._parts(vector, groups), strict=True):
                part.masked_fill_(gone, 0.0)
        return vector

    def _parts(self, vector: Vector, values: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Parts of a vector, none of them in two groups, and for each its group's entry of `values` [L]."""
        each = values.unbind()
        if isinstance(vector, Tensor):
            return vector.split(self._group_sizes), each
        return vector, [each[number] for number in self._groups_of_pieces]


def _cut(sizes: Sequence[int], groups: Sequence[int], largest: int) -> tuple[list[int], list[int]]:
    """Sizes of at most `largest` that add up to `sizes`, and the group of each."""
    cut, group_of = [], []
    for size, group in zip(sizes, groups, strict=True):
        full, rest = divmod(size, largest)
        cut += [largest] * full + [rest] * (rest > 0)
        group_of += [group] * (full + (rest > 0))
    return cut, group_of
