"""Reads finished artefacts back and checks every element against its inputs, with arithmetic of its own."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.weights.adapters import open_source
from burnish.weights.delta import Delta
from burnish.weights.difference import Difference
from burnish.weights.match import Change, Vector
from burnish.weights.merge import RECORD, make_block, make_streams
from burnish.weights.operators import OPERATORS
from burnish.weights.rounding import narrowed, unequal, widened
from burnish.weights.sources import Checkpoint, locate
from burnish.weights.tensorfile import TensorInfo, blocks, pieces, whole_digest
from burnish.weights.writer import cores, read_summary


def verify(path: Path | str, threads: int = 0) -> dict[str, int]:
    """Check a delta or a merged checkpoint against the files it was made from.

    A delta: control + delta gives the tuned model. A merged checkpoint: checksums; tensors without a delta equal the
    base's; all others equal the operator in float64, rounded once.

    Args:
        path: folder that `extract` or `merge` wrote.
        threads: 0 means one for each core.

    Returns:
        elements: how many were compared.
        unequal: how many differ (bits of the stored dtype).

    Raises:
        BurnishError: a parent is gone or is not the recorded one, or the artefact is damaged.
    """
    path = Path(path)
    with ThreadPoolExecutor(cores(threads)) as pool:
        compare: _Extracted | _Merged = _Merged(path, pool.map) if (path / RECORD).is_file() else _Extracted(path)
        jobs = [
            (name, *block)
            for name, info in compare.tensors.items() for piece in pieces(info.size) for block in blocks(*piece)
        ]  # fmt: skip
        found = list(pool.map(lambda job: compare.unequal(*job), jobs))
    return {"elements": sum(stop - start for _, start, stop in jobs), "unequal": sum(found)}


def _check_there(names: Iterable[str], there: Iterable[str], path: Path | str) -> None:
    lacking = sorted(set(names) - set(there))
    if lacking:
        raise BurnishError(f"{path} lacks '{lacking[0]}' ({len(lacking)} in all)", "the tensors that were recorded")


class _Extracted:
    def __init__(self, path: Path):
        self.delta = Delta(path)
        if self.delta.meta.get("control_vector"):
            raise BurnishError(f"{path} is a control vector, made to differ from its parents", "an extracted delta")
        base = Checkpoint(locate(self.delta.meta["base"]["path"]))
        self.tuned, self.control = (
            open_source(self.delta.meta[who]["path"], base, self.delta.meta["rename"]) for who in ("tuned", "control")
        )
        for source in (self.tuned, self.control):
            _check_there(self.delta.tensors, source.tensors, source.path)
        self.tensors = {name: self.tuned.tensors[name] for name in self.delta.tensors}

    def unequal(self, name: str, start: int, stop: int) -> int:
        """How many elements of a block differ."""
        control, tuned, delta = (
            source.values(name, start, stop, np.empty(stop - start))
            for source in (self.control, self.tuned, self.delta)
        )
        reached = control + delta
        dtype = self.tensors[name].dtype
        zeros = (tuned == 0) & (reached == 0)  # no addition gives the sign of -0.0 to 0.0
        return int((unequal(narrowed(reached, dtype), narrowed(tuned, dtype)) & ~zeros).sum())


class _Merged:
    def __init__(self, path: Path, each: Callable[..., Iterable[str]]):
        self.record = read_summary(path / RECORD, "a folder that `burnish weights merge` wrote")
        self.output = Checkpoint(path)
        self.base = Checkpoint(self.record["base"]["path"])
        self.states: dict[str, Any] = {}
        self.vectors = [Vector(self._open(entry), entry["weight"]) for entry in self.record["deltas"]]
        for source in (self.output, self.base):
            _check_there(self.record["tensors"], source.tensors, source.path)
        names = list(self.record["tensors"])
        found, before = list(each(self.output.digest, names)), list(each(self.base.digest, names))
        if whole_digest(dict(zip(names, before, strict=True))) != self.record["base"]["digest"]:
            raise BurnishError(f"{self.base.path} is another base now", self.record["base"]["digest"])
        damaged = [n for n, d in zip(names, found, strict=True) if d != self.record["tensors"][n]["digest"]]
        if damaged:
            raise BurnishError(f"'{damaged[0]}' in {path} was changed or damaged ({len(damaged)} tensors)",
                               "the checksums of its capability.json", "merge again")  # fmt: skip
        self.tensors: dict[str, TensorInfo] = self.output.tensors

    def _open(self, entry: dict[str, Any]) -> Delta | Difference:
        if not entry["stored"]:
            return Difference(self.base, entry["path"], "skip", self.record["include"], self.record["exclude"])
        delta = Delta(entry["path"])
        if delta.digest != entry["digest"]:
            raise BurnishError(f"{delta.path} is another delta now", f"digest {entry['digest']}")
        return delta

    def unequal(self, name: str, start: int, stop: int) -> int:
        """How many elements of a block differ."""
        got, wanted = self.output.read(name, start, stop), self.base.read(name, start, stop)
        if self.record["tensors"][name]["weights"]:
            base = widened(wanted, self.base.tensors[name].dtype)
            wanted = narrowed(self._merged(name, start, stop, base), self.tensors[name].dtype)
        return int(unequal(wanted, got).sum())

    def _merged(self, name: str, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """The merged values as float64."""
        changes = [Change(k, self.vectors[k], own, weight, True)
                   for k, own, weight in self.record["tensors"][name]["weights"]]  # fmt: skip
        deltas = [c.vector.source.values(c.name, start, stop, np.empty(stop - start)) for c in changes]
        if self.record["operator"] == "task":
            for change, delta in zip(changes, deltas, strict=True):
                base = base + change.weight * delta
            return base
        operator, options = OPERATORS.get(self.record["operator"]), self.record["options"]
        block = make_block(changes, self.vectors, start, base, deltas)
        if operator.prepare is not None and name not in self.states:
            self.states[name] = operator.prepare(make_streams(self.base, name, changes), **options)
        block.state = self.states.get(name)
        return operator.apply(block, **options)
