"""The delta artefact: a folder with delta.json (what, from whom, checksums) and delta.safetensors (the numbers).

delta.json          sealed metadata, see `Delta.meta`
delta.safetensors   one tensor for each changed tensor; low-rank ones as <name>::<k>.up and <name>::<k>.down
low.safetensors     what float32 could not hold of some elements, so that control + delta is the tuned model exactly
"""

from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.weights.describe import FORMAT, LOW, META, NUMBERS
from burnish.weights.engine import read_summary
from burnish.weights.rounding import Narrow, widened
from burnish.weights.sources import Update, product_block
from burnish.weights.sparse import SparseFile
from burnish.weights.tensorfile import TensorFile, tensor_digest, whole_digest

_HINT = "a folder that `burnish capability extract` wrote"


class Delta:
    """An extracted capability vector.

    Attributes:
        meta: content of delta.json. `tensors`: name to {dtype, shape, group, form, digest, norm, ...};
            `base`, `tuned`, `control`: path and digest; `tied`: alias to the tensor it shares; `scale`: a factor on
            everything; `not_exact`: elements for which control + delta is not the tuned model to the last bit.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not (self.path / META).is_file():
            raise BurnishError(f"no delta at {path}", _HINT, "burnish capability extract --help")
        self.meta: dict[str, Any] = read_summary(self.path / META, _HINT)
        if self.meta.get("format") != FORMAT:
            raise BurnishError(f"{self.path / META} has format {self.meta.get('format')}", f"{FORMAT}",
                               "the burnish version that wrote it")  # fmt: skip
        self.tensors: dict[str, dict[str, Any]] = self.meta["tensors"]
        self.scale: float = self.meta["scale"]
        self.numbers = TensorFile(self.path / NUMBERS)
        self.low = SparseFile(self.path / LOW)
        self._updates: dict[str, list[Update]] = {}
        self._check_names()

    def _check_names(self) -> None:
        expected = {part for name in self.tensors for part in self.parts(name)}
        wrong = sorted(expected ^ set(self.numbers.slots))
        if wrong:
            what = "lacks" if wrong[0] in expected else "has the extra tensor"
            raise BurnishError(f"{self.path / NUMBERS} {what} '{wrong[0]}'", "the tensors that delta.json lists")
        if self.meta["low"] != self.low.digest():
            raise BurnishError(f"{self.path / LOW} is missing or was changed", "the file it was written with")
        for name, entry in self.tensors.items():
            if entry["form"] == "lowrank":  # small, so looked at before anything is written
                self.check(name, whole_digest({p: tensor_digest(self.numbers, p) for p in self.parts(name)}))

    def parts(self, name: str) -> list[str]:
        """Names in delta.safetensors that hold `name`."""
        entry = self.tensors[name]
        if entry["form"] == "dense":
            return [name]
        return [f"{name}::{k}.{side}" for k in range(len(entry["scales"])) for side in ("up", "down")]

    def check(self, name: str, digest: str) -> None:
        """Raise BurnishError unless `digest` is the one of delta.json."""
        if digest != self.tensors[name]["digest"]:
            raise BurnishError(f"'{name}' in {self.path / NUMBERS} was changed or damaged", "the numbers it was "
                               "written with", "extract it again")  # fmt: skip

    def check_numbers(self, name: str) -> None:
        """Read all of a dense tensor and raise BurnishError unless it is as it was written."""
        if self.tensors[name]["form"] == "dense":
            self.check(name, tensor_digest(self.numbers, name))

    def norm(self) -> float:
        """Root of the sum of squares of all elements, scale included; what is tied counts once."""
        return abs(self.scale) * sum(entry["norm"] ** 2 for entry in self.tensors.values()) ** 0.5

    @property
    def digest(self) -> str:
        """Identity of the delta."""
        factors = {f"{n}::": f"{e['scales']} {e['transposed']}" for n, e in self.tensors.items() if "scales" in e}
        return whole_digest({n: e["digest"] for n, e in self.tensors.items()} | factors | {"low": self.meta["low"],
                            "scale": repr(self.scale)})  # fmt: skip

    def updates(self, name: str) -> list[Update]:
        """The exact low-rank form of a tensor whose form is "lowrank"."""
        if name not in self._updates:
            entry, found = self.tensors[name], []
            for k, scale in enumerate(entry["scales"]):
                up, down = (self._matrix(f"{name}::{k}.{side}") for side in ("up", "down"))
                found.append(Update(up, down, scale, transposed=entry["transposed"]))
            self._updates[name] = found
        return self._updates[name]

    def _matrix(self, part: str) -> np.ndarray:
        slot = self.numbers.slots[part]
        return widened(self.numbers.raw(part, 0, slot.size), slot.dtype).reshape(slot.shape)

    def raw(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Stored bits of a dense tensor, None for a low-rank one."""
        return self.numbers.raw(name, start, stop) if self.tensors[name]["form"] == "dense" else None

    def fill(self, name: str, start: int, stop: int, out: np.ndarray, scratch: Narrow) -> np.ndarray:
        """Put elements start:stop (at most a block) of the delta, scale included, into float64 `out`."""
        raw = self.raw(name, start, stop)
        if raw is None:
            out[:] = product_block(self.updates(name), start, stop)
        else:
            scratch.widen(raw, self.numbers.slots[name].dtype, out)
            positions, values = self.low.between(name, start, stop)
            out[positions] += values
        if self.scale != 1.0:
            np.multiply(out, self.scale, out=out)
        return out

    def whole(self, name: str) -> np.ndarray:
        """The delta of one tensor as float64 in its shape (for tensors that fit in memory)."""
        shape = tuple(self.tensors[name]["shape"])
        size = int(np.prod(shape))
        if self.tensors[name]["form"] == "lowrank":
            value = product_block(self.updates(name), 0, size)
        else:
            value = widened(self.numbers.raw(name, 0, size), self.numbers.slots[name].dtype)
            positions, values = self.low.between(name, 0, size)
            value[positions] += values
        return (self.scale * value).reshape(shape)

    def release(self, name: str, start: int, stop: int) -> None:
        if self.tensors[name]["form"] == "dense":
            self.numbers.release(name, start, stop)
