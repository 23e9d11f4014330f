"""Scalar products of many tensors: each number is read once, sums are added in float64, nothing large is made.

`torch.dot` writes nothing in between, where multiplying and summing would write everything once more. Tensors are cut
into parts, so that partial sums in float32 stay short and 32-bit indices of the libraries below are never exceeded.
"""

from collections.abc import Iterable, Mapping, Sequence

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
