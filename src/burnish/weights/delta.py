"""The delta artefact, a task vector in a folder (CapVector calls it a capability vector), and one made on the fly.

delta.json          sealed metadata, see `Delta.meta`
delta.safetensors   one tensor for each changed tensor; low-rank ones as <name>::<k>.up and <name>::<k>.down
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.weights.adapters import Update, open_source, product_block
from burnish.weights.names import Heads, choose, embodiment
from burnish.weights.record import check_delta
from burnish.weights.rounding import difference, healthy, widen, widened
from burnish.weights.sources import Checkpoint
from burnish.weights.tensorfile import FLOATS, Digests, TensorFile, TensorInfo, whole_digest
from burnish.weights.writer import read_summary

FORMAT = 2
META, NUMBERS, KIND = "delta.json", "delta.safetensors", "task vector"
_HINT = "a folder that `burnish weights extract` wrote"


class Delta:
    """An extracted task vector.

    Attributes:
        meta: content of delta.json. `tensors`: name to {dtype, shape, group, form, digest, norm, ...};
            `base`, `tuned`, `control`: path and digest; `tied`: alias to the tensor it shares; `not_exact`: elements
            for which control + delta is not the tuned model to the last bit.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not os.path.lexists(self.path / META):
            raise BurnishError(f"no delta at {path}", _HINT, "burnish weights extract --help")
        self.meta: dict[str, Any] = read_summary(self.path / META, _HINT)
        if self.meta.get("format") not in (1, FORMAT) or self.meta.get("low"):
            # Format 1 could keep what float32 lacks in a file of its own.
            raise BurnishError(f"{self.path / META} has format {self.meta.get('format')}", f"{FORMAT}",
                               "extract it again, or use the burnish version that wrote it")  # fmt: skip
        check_delta(self.meta, self.path / META)
        self.tensors: dict[str, dict[str, Any]] = self.meta["tensors"]
        self.numbers = TensorFile(self.path / NUMBERS, self.path)
        self._updates: dict[str, list[Update]] = {}
        self._check_names()

    def _check_names(self) -> None:
        expected = {part for name in self.tensors for part in self._parts(name)}
        wrong = sorted(expected ^ set(self.numbers.tensors))
        if wrong:
            what = "lacks" if wrong[0] in expected else "has the extra tensor"
            raise BurnishError(f"{self.path / NUMBERS} {what} '{wrong[0]}'", "the tensors that delta.json lists")
        for name, entry in self.tensors.items():
            if not self._fits(entry, [self.numbers.tensors[part] for part in self._parts(name)]):
                raise BurnishError(f"'{name}' in {self.path / NUMBERS} has another shape or dtype than delta.json says",
                                   f"numbers of the shape {entry['shape']}", "extract it again")  # fmt: skip
            if entry["form"] == "lowrank":  # small, so looked at before anything is written
                self.check(name, whole_digest({p: self.numbers.digest(p) for p in self._parts(name)}))

    @staticmethod
    def _fits(entry: dict[str, Any], stored: list[TensorInfo]) -> bool:
        shapes = [list(info.shape) for info in stored]
        if any(info.dtype not in FLOATS for info in stored):
            return False
        if entry["form"] == "dense":
            return shapes == [entry["shape"]]
        rows, columns = reversed(entry["shape"]) if entry["transposed"] else entry["shape"]
        pairs = zip(shapes[::2], shapes[1::2], strict=True)
        return all(len(up) == len(down) == 2 and up[1] == down[0] and [up[0], down[1]] == [rows, columns]
                   for up, down in pairs)  # fmt: skip

    def _parts(self, name: str) -> list[str]:
        """Names in delta.safetensors that hold `name`."""
        entry = self.tensors[name]
        if entry["form"] == "dense":
            return [name]
        return [f"{name}::{k}.{side}" for k in range(len(entry["scales"])) for side in ("up", "down")]

    def check(self, name: str, digest: str | None = None) -> None:
        """Raise BurnishError unless `digest`, by default that of what the file holds now, is the one of delta.json."""
        if digest is None and self.tensors[name]["form"] == "dense":
            digest = self.numbers.digest(name)
        if digest not in (None, self.tensors[name]["digest"]):
            raise BurnishError(f"'{name}' in {self.path / NUMBERS} was changed or damaged", "the numbers it was "
                               "written with", "extract it again")  # fmt: skip

    def norm(self) -> float:
        """Root of the sum of squares of all elements; what is tied counts once."""
        return math.hypot(*(entry["norm"] for entry in self.tensors.values()))

    @property
    def digest(self) -> str:
        """Identity of the delta."""
        factors = {f"{n}::": f"{e['scales']} {e['transposed']}" for n, e in self.tensors.items() if "scales" in e}
        always = {"low": "", "scale": "1.0"}  # of format 1, so that its digests stay what they were
        return whole_digest({n: e["digest"] for n, e in self.tensors.items()} | factors | always)

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
        info = self.numbers.tensors[part]
        return widened(self.numbers.read(part, 0, info.size), info.dtype).reshape(info.shape)

    def values(self, name: str, start: int, stop: int, out: np.ndarray, digests: Digests | None = None) -> np.ndarray:
        """As `Checkpoint.values`; low-rank tensors were checked when the delta was opened."""
        if self.tensors[name]["form"] == "lowrank":
            out[:] = product_block(self.updates(name), start, stop)
            return out
        bits = self.numbers.read(name, start, stop)
        if digests is not None:
            digests.add(name, start, bits)
        return widen(bits, self.numbers.tensors[name].dtype, out)

    def healthy_values(
        self, name: str, start: int, stop: int, out: np.ndarray, digests: Digests | None = None
    ) -> np.ndarray:
        """As `values`; raises BurnishError for a number that is not finite."""
        found = self.values(name, start, stop, out, digests)
        if not healthy(found):
            raise BurnishError(f"'{name}' in {self.path} holds numbers that are not finite", "a healthy delta",
                               "extract it again")  # fmt: skip
        return found

    def whole(self, name: str) -> np.ndarray:
        """The delta of one tensor as float64 in its shape (for tensors that fit in memory)."""
        if self.tensors[name]["form"] == "dense":
            return self._matrix(name)
        shape = self.tensors[name]["shape"]
        return product_block(self.updates(name), 0, math.prod(shape)).reshape(shape)


class Difference:
    """Stands in for a Delta in `merge`; nothing was recorded about it, so no digest of the base is asked for.

    Args:
        base: the base of the merge.
        tuned: checkpoint or adapter.
        heads, include, exclude: as for `merge`; without `heads` no tensor is chosen, and any may be asked for.
    """

    def __init__(
        self, base: Checkpoint, tuned: Path | str, heads: Heads | None, include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ):  # fmt: skip
        self.base, self.tuned = base, open_source(tuned, base)
        self.path = self.tuned.path
        parents = {"base": base.tensors, "tuned": self.tuned.tensors}
        chosen = choose(parents, include, exclude, heads).chosen if heads else {}
        self.tensors: dict[str, dict[str, Any]] = {
            name: {"dtype": self.tuned.tensors[name].dtype, "shape": list(self.tuned.tensors[name].shape),
                   "group": group} for name, group in chosen.items()
        }  # fmt: skip
        self.meta: dict[str, Any] = {"tied": {}, "embodiment": embodiment(self.path) or embodiment(base.path)}

    def values(
        self, name: str, start: int, stop: int, out: np.ndarray, digests: Digests | None = None,
        base: np.ndarray | None = None, quick: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """As `Checkpoint.values`. Digests are the tuned model's.

        Args:
            base: the base's elements where they are at hand.
            quick: see `rounding.difference`.
        """
        if base is None:
            base = self.base.values(name, start, stop, np.empty(stop - start))
        return difference(self.tuned.values(name, start, stop, out, digests), base, out, quick)
