"""Gradients of many tensors in one flat buffer, a layer's beside one another: an edit is then a few large operations.

On a CPU, `torch.dot` on such a buffer is several times faster than multiplying and summing tensor by tensor (or
`torch._foreach_mul`), because nothing is written in between. No operation here waits for the device.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
        self._make_chunks()

    def _make_chunks(self) -> None:
        largest = _CPU_CHUNK if self.device.type == "cpu" else max(self._group_sizes)
        self._chunks, group_of_chunk = [], []
        for number, size in enumerate(self._group_sizes):
            full, rest = divmod(size, largest)
            self._chunks += [largest] * full + [rest] * (rest > 0)
            group_of_chunk += [number] * (full + (rest > 0))
        self._group_of_chunk = torch.tensor(group_of_chunk, device=self.device)

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

    def by_group(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The L groups' parts of a buffer [P], sharing its memory."""
        return flat.split(self._group_sizes)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """[L] float64: inner product of two buffers [P] in each group."""
        pairs = zip(a.split(self._chunks), b.split(self._chunks), strict=True)
        partial = torch.stack([torch.dot(x, y) for x, y in pairs]).double()
        total = torch.zeros(len(self.groups), dtype=torch.float64, device=self.device)
        return total.index_add_(0, self._group_of_chunk, partial)

    def scale_(self, flat: Tensor, factors: Tensor) -> Tensor:
        """Multiply each group of a buffer [P] by its factor [L], in place."""
        for part, factor in zip(self.by_group(flat), factors.to(flat.dtype).unbind(), strict=True):
            part.mul_(factor)
        return flat

    def add_(self, flat: Tensor, other: Tensor, factors: Tensor) -> Tensor:
        """Add `other` [P] times its group's factor [L] to `flat` [P], in place."""
        parts = zip(self.by_group(flat), self.by_group(other), factors.to(flat.dtype).unbind(), strict=True)
        for part, added, factor in parts:
            part.addcmul_(added, factor)
        return flat

    def clear_(self, flat: Tensor, groups: Tensor) -> Tensor:
        """Write zeros over the groups that are True in `groups` [L], whatever they hold, in place."""
        if self.device.type != "cpu" or bool(groups.any()):  # on a GPU it is cheaper to write than to ask
            for part, gone in zip(self.by_group(flat), groups.unbind(), strict=True):
                part.masked_fill_(gone, 0.0)
        return flat
