"""Reads finished artefacts back and checks every element against its inputs, with arithmetic of its own."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.weights.adapters import open_source
from burnish.weights.delta import Delta, Difference
from burnish.weights.match import Change, Vector
from burnish.weights.merge import RECORD, make_block, make_streams
from burnish.weights.operators import OPERATORS
from burnish.weights.record import check_merge
from burnish.weights.rounding import healthy, narrowed, refuse_odd, unequal, widened
from burnish.weights.sources import Checkpoint, locate
from burnish.weights.tensorfile import FLOATS, TensorInfo, blocks, pieces, whole_digest
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
        merged = os.path.lexists(path / RECORD)
        compare: _Extracted | _Merged = _Merged(path, pool.map) if merged else _Extracted(path)
        jobs = [
            (name, *block)
            for name, info in compare.tensors.items() for piece in pieces(info.size) for block in blocks(*piece)
        ]  # fmt: skip
        found = list(pool.map(lambda job: compare.unequal(*job), jobs))
    return {"elements": sum(stop - start for _, start, stop in jobs), "unequal": sum(found)}


def _check_there(
    names: Iterable[str], there: Mapping[str, TensorInfo], of: Mapping[str, TensorInfo], path: Path
) -> None:
    """Raise BurnishError where `there`, the tensors at `path`, lacks one of `names`, or has another shape than `of`."""
    lacking = sorted(set(names) - set(there))
    if lacking:
        raise BurnishError(f"{path} lacks '{lacking[0]}' ({len(lacking)} in all)", "the tensors that were recorded")
    other = next((name for name in names if there[name].shape != of[name].shape), None)
    if other is not None:
        raise BurnishError(f"'{other}' in {path} has shape {list(there[other].shape)}", f"{list(of[other].shape)}")


class _Extracted:
    def __init__(self, path: Path):
        self.delta = Delta(path)
        if self.delta.meta.get("control_vector"):
            raise BurnishError(f"{path} is a control vector, made to differ from its parents", "an extracted delta")
        base = Checkpoint(locate(self.delta.meta["base"]["path"]))
        self.tuned, self.control = (
            open_source(self.delta.meta[who]["path"], base, self.delta.meta.get("rename", []))
            for who in ("tuned", "control")
        )
        entries = self.delta.tensors.items()
        recorded = {name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in entries}
        for source in (self.tuned, self.control):
            _check_there(recorded, source.tensors, recorded, source.path)
        self.tensors = {name: self.tuned.tensors[name] for name in self.delta.tensors}
        other = next((name for name, info in self.tensors.items() if info.dtype not in FLOATS), None)
        if other is not None:
            raise BurnishError(f"'{other}' in {self.tuned.path} is {self.tensors[other].dtype}", "floating point")

    def unequal(self, name: str, start: int, stop: int) -> int:
        parents = (self.control, self.tuned)
        control, tuned = (parent.values(name, start, stop, np.empty(stop - start)) for parent in parents)
        if not (healthy(control) and healthy(tuned)):
            refuse_odd(name, {self.control.path: control, self.tuned.path: tuned})
        delta = self.delta.healthy_values(name, start, stop, np.empty(stop - start))
        reached = control + delta
        dtype = self.tensors[name].dtype
        zeros = (tuned == 0) & (reached == 0)  # no addition gives the sign of -0.0 to 0.0
        return int((unequal(narrowed(reached, dtype), narrowed(tuned, dtype)) & ~zeros).sum())


class _Merged:
    def __init__(self, path: Path, each: Callable[..., Iterable[str]]):
        self.record = read_summary(path / RECORD, "a folder that `burnish weights merge` wrote")
        check_merge(self.record, path / RECORD)
        self.output, self.base = Checkpoint(path), Checkpoint(locate(self.record["base"]["path"]))
        self.states: dict[str, Any] = {}
        self.vectors = [Vector(self._open(entry), entry["weight"]) for entry in self.record["deltas"]]
        names = list(self.record["tensors"])
        for source in (self.output, self.base):
            _check_there(names, source.tensors, self.output.tensors, source.path)
        extra = sorted(set(self.output.tensors) - set(names))
        if extra:
            raise BurnishError(f"{path} has the extra tensor '{extra[0]}'", "the tensors that were recorded")
        self._check_changes()
        found, before = list(each(self.output.digest, names)), list(each(self.base.digest, names))
        if whole_digest(dict(zip(names, before, strict=True))) != self.record["base"]["digest"]:
            raise BurnishError(f"{self.base.path} is another base now", self.record["base"]["digest"])
        damaged = [n for n, d in zip(names, found, strict=True) if d != self.record["tensors"][n]["digest"]]
        if damaged:
            raise BurnishError(f"'{damaged[0]}' in {path} was changed or damaged ({len(damaged)} tensors)",
                               "the checksums of its capability.json", "merge again")  # fmt: skip
        self.tensors: dict[str, TensorInfo] = self.output.tensors

    def _check_changes(self) -> None:
        for name, entry in self.record["tensors"].items():
            for number, own, _ in entry["weights"]:
                source = self.vectors[number].source
                if isinstance(source, Difference):
                    found = source.tuned.tensors[own].shape if own in source.tuned.tensors else None
                else:
                    found = tuple(source.tensors[own]["shape"]) if own in source.tensors else None
                if found != self.output.tensors[name].shape:
                    raise BurnishError(f"'{own}' in {source.path} does not fit '{name}'", "what was recorded",
                                       "merge again")  # fmt: skip

    def _open(self, entry: dict[str, Any]) -> Delta | Difference:
        if not entry["stored"]:
            return Difference(self.base, entry["path"], None)
        delta = Delta(entry["path"])
        if delta.digest != entry["digest"]:
            raise BurnishError(f"{delta.path} is another delta now", f"digest {entry['digest']}")
        return delta

    def unequal(self, name: str, start: int, stop: int) -> int:
        got, wanted = self.output.read(name, start, stop), self.base.read(name, start, stop)
        dtype, before = self.tensors[name].dtype, self.base.tensors[name].dtype
        if dtype in FLOATS and not healthy(widened(got, dtype)):
            refuse_odd(name, {self.base.path: widened(wanted, before), self.output.path: widened(got, dtype)})
        if self.record["tensors"][name]["weights"]:
            wanted = narrowed(self._merged(name, start, stop, widened(wanted, before)), dtype)
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
        operator = OPERATORS.get(self.record["operator"])
        options = operator.read_options(self.record["options"], self.record["operator"])
        block = make_block(changes, self.vectors, start, base, deltas)
        if operator.prepare is not None and name not in self.states:
            self.states[name] = operator.prepare(make_streams(self.base, name, changes), **options)
        block.state = self.states.get(name)
        return operator.apply(block, **options)
