"""What of a policy a task vector covers, matrix by matrix and a block of rows at a time.

Nothing as large as the policy is made on the way: the start is kept once, the vector stays in its file (on a GPU: in
pinned memory of the host, in its stored type), and the product of an adapter's factors exists in blocks alone.

Where weights are sharded, all of it is over this rank's rows: products and values are to be added up over ranks.

The penalties at the end keep a merged vector gamma while the policy is fine-tuned.
D is how far each parameter has moved from the merged model. The paper asks for <gamma, D> = 0 in a matrix (eq. 6) but
adds the weighted L1 (eq. 7), which is another thing: it pins every coordinate whose loss gradient is below
weight * |gamma|, whatever its direction, and only bounds the inner product from above.

    l1          sum |gamma_ij D_ij|            (CapVector, arXiv:2605.10903, eq. 7)
    ewc         sum |gamma_ij| D_ij^2
    projection  sum_p <gamma_p / |gamma_p|, D_p>^2        (eq. 6, squared)
    cosine      sum_p |<gamma_p, D_p>| / (|gamma_p| |D_p|)
    l2          sum D_ij^2                     (gamma plays no part: the control)

The first two are sums over elements. The others follow from three scalar products of a matrix, and their gradient is
a gamma + b D; with D = s B A of an adapter neither needs the product itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from burnish.methods.gradients import local, own_rows, part_size, rows, whole
from burnish.weights.delta import Delta


def of_one_rank(partial: Tensor) -> Tensor:
    """The sum over ranks, where every rank holds all rows."""
    return partial


class Vector:
    """The numbers of a task vector as float32 tensors on `device`.

    Args:
        names: tensors that will be asked for; they are held against their checksums now.
    """

    def __init__(self, delta: Delta, names: Iterable[str], device: torch.device):
        self.delta, self.device = delta, device
        self._host: dict[str, Tensor] = {}
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name in set(names):
            entry = delta.tensors[name]
            delta.check(name)
            if entry["form"] == "lowrank":
                turned = [(u.down.T, u.up.T) if u.transposed else (u.up, u.down) for u in delta.updates(name)]
                scales = [update.scale for update in delta.updates(name)]
                factors = zip(scales, turned, strict=True)
                self._factors[name] = [(self._place(scale * up), self._place(down)) for scale, (up, down) in factors]
            elif device.type == "cuda":
                self._host[name] = self._stored(name, 0, math.prod(entry["shape"])).pin_memory()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.delta.tensors[name]["shape"])

    def square(self, name: str) -> float:
        """|gamma|^2, as recorded."""
        return self.delta.tensors[name]["norm"] ** 2

    def factors(self, name: str) -> list[tuple[Tensor, Tensor]] | None:
        """(up [rows, r], down [r, columns]) whose products add up to the tensor; None for one that is stored whole."""
        return self._factors.get(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first:last; a scalar has one."""
        shape = self.shape(name)
        if name in self._factors:
            return torch.stack([up[first:last] @ down for up, down in self._factors[name]]).sum(0)
        width = math.prod(shape[1:])
        start, stop = first * width, last * width
        host = self._host.get(name)
        stored = self._stored(name, start, stop) if host is None else host[start:stop]
        return stored.to(self.device, torch.float32, non_blocking=True).view(last - first, *shape[1:])

    def _stored(self, name: str, start: int, stop: int) -> Tensor:
        bits, dtype = self.delta.numbers.read(name, start, stop), self.delta.numbers.tensors[name].dtype
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16) if dtype == "BF16" else torch.from_numpy(bits)

    def _place(self, matrix: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(matrix, np.float32)).to(self.device)


class Piece(NamedTuple):
    """Part of a penalty's gradient: that of rows first:last of the parameter `name`, as this rank counts them.

    Attributes:
        value: what the penalty gains there, float64.
        gamma: the vector's rows, where a parameter is trained as it is.
    """

    name: str
    first: int
    last: int
    pull: Tensor
    value: Tensor
    gamma: Tensor | None = None


class Whole:
    """A parameter that is trained as it is. D is what it has moved since `start`, which is its value now if None."""

    def __init__(self, name: str, parameter: nn.Parameter, vector: Vector, own: str, start: Tensor | None = None):
        self.name, self.parameter, self.vector, self.own = name, parameter, vector, own
        self.names, self.offset = (name,), rows(parameter)[0]
        self.start = local(parameter).clone() if start is None else start

    def products(self) -> Tensor:
        total = torch.zeros(3, dtype=torch.float64, device=self.start.device)
        for *_, gamma, moved in self._blocks():
            total += products(gamma, moved)
        return total

    def pieces(self, kind: str, sums: Tensor | None = None) -> Iterator[Piece]:
        """Value and gradient of a penalty; `sums` are `products` over all ranks."""
        if kind in ELEMENTWISE:
            for first, last, gamma, moved in self._blocks():
                value, pull = elementwise(kind, gamma, moved)
                yield Piece(self.name, first, last, pull, value, gamma)
            return
        value, a, b = coefficients(kind, self.products() if sums is None else sums)
        for first, last, gamma, moved in self._blocks():
            once = value * (first + self.offset == 0)
            yield Piece(self.name, first, last, gamma.mul(a).add_(moved.mul_(b)), once, gamma)

    def _blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        now, start = rows_of(local(self.parameter)), rows_of(self.start)
        for first, last in row_blocks(now):
            here, gamma = now[first:last], self.vector.rows(self.own, first + self.offset, last + self.offset)
            yield first, last, gamma.view_as(here), here - start[first:last]

    def project_out(self, grad: Tensor, total: Callable[[Tensor], Tensor] = of_one_rank) -> None:
        """Take the part along gamma out of a gradient in place: g - <g, gamma> gamma / |gamma|^2.

        A plain SGD step then leaves <gamma, D> as it is. Adam rescales coordinates one by one, so under it this holds
        only roughly. `total` adds up over ranks.
        """
        mine, square, offset = rows_of(grad), self.vector.square(self.own), self.offset
        if square == 0:
            return
        blocks = [(a, b, self.vector.rows(self.own, a + offset, b + offset)) for a, b in row_blocks(mine)]
        along = [torch.dot(mine[a:b].reshape(-1), gamma.reshape(-1)).double() for a, b, gamma in blocks]
        share = total(_added(along, grad.device)) / square
        for first, last, gamma in blocks:
            mine[first:last].sub_(gamma.view_as(mine[first:last]).mul_(share))


class Product:
    """A matrix with an adapter, of which A and B (and DoRA's magnitude) are trained. D is what the adapter adds to it.

    LoRA's is s B A; DoRA's the whole change of the weight, diag(m / |W + s B A|) (W + s B A) - W with norms by row.
    What the paper means by regularising A alone cannot be told from what is published, and a difference of two A
    depends on an arbitrary choice of basis.

    Sharded, rows of B, W and m are this rank's, and A is gathered; `total` adds up over ranks.
    """

    def __init__(self, name: str, layer: nn.Module, vector: Vector, own: str,
                 total: Callable[[Tensor], Tensor] = of_one_rank):  # fmt: skip
        self.vector, self.own, self._total = vector, own, total
        self.scale = float(layer.scaling["default"])
        self.dora = bool(layer.use_dora["default"])
        self._frozen = layer.get_base_layer().weight
        self._down, self._up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        self._magnitude = layer.lora_magnitude_vector["default"].weight if self.dora else None
        self._first, self._last = rows(self._up)
        parts = ("lora_A", "lora_B", "lora_magnitude_vector")
        self.names = tuple(f"{name}.{part}.default.weight" for part in parts)

    @property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and this rank's rows of B [out, r]."""
        return whole(self._down), local(self._up)

    def products(self) -> Tensor:
        """See `products`. Of LoRA from r x r products; of DoRA block by block."""
        if self.dora:
            return _added([products(gamma, moved) for _, _, gamma, moved, _ in self._blocks()], self._up.device)
        down, up = self._matrices
        along = self.scale * (self._times_down(down) * up).sum(dtype=torch.float64)
        moved = self.scale**2 * ((up.T @ up) * (down @ down.T)).sum(dtype=torch.float64)
        square = along.new_tensor(self.vector.square(self.own)) * (self._first == 0)
        return torch.stack([along, square, moved.clamp_min(0)])

    def pieces(self, kind: str, sums: Tensor | None = None) -> Iterator[Piece]:
        """Value and gradients of a penalty; `sums` are `products` over all ranks."""
        down, up = self._matrices
        name_down, name_up, name_magnitude = self.names
        found = None
        if kind not in ELEMENTWISE:
            found = coefficients(kind, self.products() if sums is None else sums)
        first_rank = self._first == 0
        if not self.dora and found is not None:
            value, a, b = (one.float() for one in found)
            to_up = a * self._times_down(down) + b * self.scale * up @ (down @ down.T)
            to_down = a * self._times_up(up) + b * self.scale * (up.T @ up) @ down
            yield Piece(name_up, 0, len(up), self.scale * to_up, value.double() * first_rank)
            yield self._piece_of_down(self.scale * to_down, value.double() * 0)
            return
        to_down, total = torch.zeros_like(down), torch.zeros((), dtype=torch.float64, device=down.device)
        for first, last, gamma, moved, row in self._blocks():
            if found is None:
                value, pull = elementwise(kind, gamma, moved)
                total += value
            else:
                pull = gamma.mul(found[1]).add_(moved, alpha=float(found[2]))
            if row is not None:  # as peft does, the norm takes no gradient
                updated, norm, magnitude = row
                yield Piece(name_magnitude, first, last, (pull * updated).sum(1) / norm, total * 0)
                pull = pull * (magnitude / norm)[:, None]
            yield Piece(name_up, first, last, self.scale * (pull @ down.T), total * 0)
            to_down.addmm_(up[first:last].T, pull, alpha=self.scale)
        yield self._piece_of_down(to_down, total if found is None else found[0] * first_rank)

    def _piece_of_down(self, pull: Tensor, value: Tensor) -> Piece:
        """Of what this rank's rows of B pull at all of A: what all ranks' do at its own rows."""
        pull = own_rows(self._total(pull), self._down)
        return Piece(self.names[0], 0, len(pull), pull, value)

    def _blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]]:
        """(first row, last row, gamma, D, DoRA's updated rows with their norms and magnitudes) of every block."""
        down, up = self._matrices
        frozen = local(self._frozen)
        for first, last in row_blocks(frozen):
            gamma, moved, row = self._gamma(first, last), self.scale * (up[first:last] @ down), None
            if self.dora:
                updated = moved.add_(frozen[first:last])
                norm = updated.norm(dim=1)
                magnitude = local(self._magnitude)[first:last]
                row, moved = (updated, norm, magnitude), updated * (magnitude / norm)[:, None] - frozen[first:last]
            yield first, last, gamma, moved, row

    def _gamma(self, first: int, last: int) -> Tensor:
        return self.vector.rows(self.own, first + self._first, last + self._first)

    def _times_down(self, down: Tensor) -> Tensor:
        """gamma A^T [out, r]."""
        factors = self.vector.factors(self.own)
        if factors is not None:
            return torch.stack([u[self._first : self._last] @ (v @ down.T) for u, v in factors]).sum(0)
        blocks = [self._gamma(a, b) @ down.T for a, b in row_blocks(local(self._frozen))]
        return torch.cat(blocks) if blocks else down.new_zeros(0, len(down))

    def _times_up(self, up: Tensor) -> Tensor:
        """B^T gamma [r, in]."""
        factors = self.vector.factors(self.own)
        if factors is not None:
            return torch.stack([(up.T @ u[self._first : self._last]) @ v for u, v in factors]).sum(0)
        total = up.new_zeros(up.shape[1], self.vector.shape(self.own)[1])
        for first, last in row_blocks(local(self._frozen)):
            total.addmm_(up[first:last].T, self._gamma(first, last))
        return total


def _added(sums: list[Tensor], device: torch.device) -> Tensor:
    """The sum of float64 tensors of a shape; a zero where this rank has no rows."""
    return torch.stack(sums).sum(0) if sums else torch.zeros((), dtype=torch.float64, device=device)


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor itself, or a scalar as its one row."""
    return tensor if tensor.ndim else tensor.view(1)


def row_blocks(tensor: Tensor) -> list[tuple[int, int]]:
    """(first, last) of blocks of rows of about as many numbers as `gradients.part_size`, at least one row each."""
    step = max(1, part_size(tensor.device) // max(1, tensor[0].numel() if len(tensor) else 1))
    return [(first, min(first + step, len(tensor))) for first in range(0, len(tensor), step)]


def all_products(parts: Mapping[str, Whole | Product]) -> Tensor:
    """float64 [parts, 3], see `products`; where weights are sharded, over this rank's rows."""
    return torch.stack([part.products().expand(3) for part in parts.values()])


ELEMENTWISE = ("l1", "ewc")
PENALTIES = (*ELEMENTWISE, "projection", "cosine", "l2")
_TINY = 1e-12


def products(gamma: Tensor, moved: Tensor) -> Tensor:
    """float64 [3]: <gamma, D>, |gamma|^2 and |D|^2 of a block; those of a matrix are the sums over its blocks."""
    g, d = gamma.reshape(-1), moved.reshape(-1)
    return torch.stack([torch.dot(g, d), torch.dot(g, g), torch.dot(d, d)]).double()


def elementwise(kind: str, gamma: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """(value, gradient by D) of a block under a penalty of ELEMENTWISE; the value is float64."""
    size = gamma.abs()
    if kind == "l1":
        return torch.dot(size.reshape(-1), moved.abs().reshape(-1)).double(), size.mul_(moved.sign())
    pull = size.mul_(moved)
    return torch.dot(pull.reshape(-1), moved.reshape(-1)).double(), pull.mul_(2.0)


def coefficients(kind: str, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(value, a, b) of a matrix under another penalty, float64: its gradient by D is a gamma + b D.

    Args:
        kind: projection, cosine or l2.
        sums: see `products`, of the whole matrix. A vector of zeros has no direction, and at D = 0 the cosine has no
            value: both count as 0, with gradient 0.
    """
    along, square, moved = sums
    nothing = torch.zeros_like(along)
    if kind == "l2":
        return moved, nothing, nothing + 2
    if kind == "projection":
        safe = square.masked_fill(square == 0, 1.0)
        return along.square() / safe, 2 * along / safe, nothing
    both = (square * moved).sqrt()
    alive = both > _TINY
    safe = both.clamp_min(_TINY)
    value, a = along.abs() / safe, along.sign() / safe
    b = -along.abs() / (safe * moved.clamp_min(_TINY))
    return value * alive, a * alive, b * alive


def pinned(grad: Tensor, gamma: Tensor, weight: Tensor | float) -> Tensor:
    """How many coordinates the L1 penalty holds fast: |loss gradient| below weight * |gamma| (scalar)."""
    return (grad.abs() < weight * gamma.abs()).sum()
