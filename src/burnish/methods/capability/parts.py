"""What of a policy a task vector covers, matrix by matrix and a block of rows at a time.

Nothing as large as the policy is made on the way: the start is kept once, the vector stays in its file (on a GPU: in
pinned memory of the host, in its stored type), and the product of an adapter's factors exists in blocks alone.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from burnish.methods.capability.regularise import ELEMENTWISE, coefficients, elementwise, products
from burnish.methods.products import part_size
from burnish.weights.delta import Delta


class Vector:
    """The numbers of a task vector as float32 tensors on `device`.

    Args:
        delta: where they are stored.
        names: tensors that will be asked for; they are held against their checksums now.
        device: of the policy.
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
    """Part of a penalty's gradient: that of rows first:last of the parameter `name`.

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
    """A parameter that is trained as it is. D is what it has moved since `setup`."""

    def __init__(self, name: str, parameter: nn.Parameter, vector: Vector, own: str):
        self.name, self.parameter, self.vector, self.own = name, parameter, vector, own
        self.start = parameter.detach().clone()

    def products(self) -> Tensor:
        """See `regularise.products`, of the whole parameter."""
        return torch.stack([products(gamma, moved) for *_, gamma, moved in self._blocks()]).sum(0)

    def pieces(self, kind: str) -> Iterator[Piece]:
        """Value and gradient of a penalty."""
        if kind in ELEMENTWISE:
            for first, last, gamma, moved in self._blocks():
                value, pull = elementwise(kind, gamma, moved)
                yield Piece(self.name, first, last, pull, value, gamma)
            return
        value, a, b = coefficients(kind, self.products())
        for first, last, gamma, moved in self._blocks():
            yield Piece(self.name, first, last, gamma.mul(a).add_(moved.mul_(b)), value * (first == 0), gamma)

    def _blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        now, start = rows_of(self.parameter.detach()), rows_of(self.start)
        for first, last in row_blocks(now):
            here, gamma = now[first:last], self.vector.rows(self.own, first, last)
            yield first, last, gamma.view_as(here), here - start[first:last]

    def project_out(self, grad: Tensor) -> None:
        """Take the part along gamma out of a gradient in place: g - <g, gamma> gamma / |gamma|^2.

        A plain SGD step then leaves <gamma, D> as it is. Adam rescales coordinates one by one, so under it this holds
        only roughly.
        """
        rows, square = rows_of(grad), self.vector.square(self.own)
        if square == 0:
            return
        blocks = row_blocks(rows)
        along = [torch.dot(rows[a:b].reshape(-1), self.vector.rows(self.own, a, b).reshape(-1)) for a, b in blocks]
        share = torch.stack(along).double().sum() / square
        for first, last in blocks:
            rows[first:last].sub_(self.vector.rows(self.own, first, last).view_as(rows[first:last]).mul_(share))


class Product:
    """A layer with LoRA or DoRA. D is the whole product s B A (with DoRA: the effective weight less the frozen one).

    What the paper means by regularising A alone cannot be told from what is published, and a difference of two A
    depends on an arbitrary choice of basis.
    """

    def __init__(self, name: str, layer: nn.Module, vector: Vector, own: str):
        self.layer, self.vector, self.own = layer, vector, own
        self.scale = float(layer.scaling["default"])
        self.dora = bool(layer.use_dora["default"])
        self.names = {part: f"{name}.{part}.default.weight" for part in ("lora_A", "lora_B", "lora_magnitude_vector")}

    @property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r]."""
        return self.layer.lora_A["default"].weight.detach(), self.layer.lora_B["default"].weight.detach()

    def products(self) -> Tensor:
        """See `regularise.products`. Of LoRA from r x r products; of DoRA block by block."""
        if self.dora:
            return torch.stack([products(gamma, moved) for _, _, gamma, moved, _ in self._blocks()]).sum(0)
        down, up = self._matrices
        along = self.scale * (self._times_down(down) * up).sum(dtype=torch.float64)
        moved = self.scale**2 * ((up.T @ up) * (down @ down.T)).sum(dtype=torch.float64)
        return torch.stack([along, along.new_tensor(self.vector.square(self.own)), moved.clamp_min(0)])

    def pieces(self, kind: str) -> Iterator[Piece]:
        """Value and gradients of a penalty."""
        down, up = self._matrices
        if not self.dora and kind not in ELEMENTWISE:
            value, a, b = (one.float() for one in coefficients(kind, self.products()))
            to_up = a * self._times_down(down) + b * self.scale * up @ (down @ down.T)
            to_down = a * self._times_up(up) + b * self.scale * (up.T @ up) @ down
            yield Piece(self.names["lora_B"], 0, len(up), self.scale * to_up, value.double())
            yield Piece(self.names["lora_A"], 0, len(down), self.scale * to_down, value.double() * 0)
            return
        whole = None if kind in ELEMENTWISE else coefficients(kind, self.products())
        to_down, total = torch.zeros_like(down), torch.zeros((), dtype=torch.float64, device=down.device)
        for first, last, gamma, moved, row in self._blocks():
            if whole is None:
                value, pull = elementwise(kind, gamma, moved)
                total += value
            else:
                pull = gamma.mul(whole[1]).add_(moved, alpha=float(whole[2]))
            if row is not None:  # as peft does, the norm takes no gradient
                updated, norm, magnitude = row
                yield Piece(self.names["lora_magnitude_vector"], first, last, (pull * updated).sum(1) / norm, total * 0)
                pull = pull * (magnitude / norm)[:, None]
            yield Piece(self.names["lora_B"], first, last, self.scale * (pull @ down.T), total * 0)
            to_down.addmm_(up[first:last].T, pull, alpha=self.scale)
        yield Piece(self.names["lora_A"], 0, len(down), to_down, total if whole is None else whole[0])

    def _blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]]:
        """(first row, last row, gamma, D, DoRA's updated rows with their norms and magnitudes) of every block."""
        down, up = self._matrices
        frozen = self.layer.get_base_layer().weight.detach()
        for first, last in row_blocks(frozen):
            gamma, moved, row = self.vector.rows(self.own, first, last), self.scale * (up[first:last] @ down), None
            if self.dora:
                updated = moved.add_(frozen[first:last])
                norm = updated.norm(dim=1)
                magnitude = self.layer.lora_magnitude_vector["default"].weight.detach()[first:last]
                row, moved = (updated, norm, magnitude), updated * (magnitude / norm)[:, None] - frozen[first:last]
            yield first, last, gamma, moved, row

    def _times_down(self, down: Tensor) -> Tensor:
        """gamma A^T [out, r]."""
        factors = self.vector.factors(self.own)
        if factors is not None:
            return torch.stack([u @ (v @ down.T) for u, v in factors]).sum(0)
        frozen = self.layer.get_base_layer().weight
        return torch.cat([self.vector.rows(self.own, a, b) @ down.T for a, b in row_blocks(frozen)])

    def _times_up(self, up: Tensor) -> Tensor:
        """B^T gamma [r, in]."""
        factors = self.vector.factors(self.own)
        if factors is not None:
            return torch.stack([(up.T @ u) @ v for u, v in factors]).sum(0)
        frozen, total = self.layer.get_base_layer().weight, up.new_zeros(up.shape[1], self.vector.shape(self.own)[1])
        for first, last in row_blocks(frozen):
            total.addmm_(up[first:last].T, self.vector.rows(self.own, first, last))
        return total


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor itself, or a scalar as its one row."""
    return tensor if tensor.ndim else tensor.view(1)


def row_blocks(tensor: Tensor) -> list[tuple[int, int]]:
    """(first, last) of blocks of rows of about as many numbers as `products.part_size`, at least one row each."""
    step = max(1, part_size(tensor.device) // max(1, tensor[0].numel() if len(tensor) else 1))
    return [(first, min(first + step, len(tensor))) for first in range(0, len(tensor), step)]


def total_products(parts: Mapping[str, Whole | Product]) -> Tensor:
    """See `regularise.products`, over everything that the vector covers."""
    return torch.stack([part.products() for part in parts.values()]).sum(0)
