"""Reads finished artefacts back and checks every element against its inputs, with arithmetic of its own."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.weights.delta import Delta
from burnish.weights.difference import Difference
from burnish.weights.engine import cores, read_summary
from burnish.weights.extract import open_parent
from burnish.weights.merge import RECORD, named_block, stream
from burnish.weights.operators import OPERATORS, Streams
from burnish.weights.rounding import Narrow, narrowed, unequal, widened
from burnish.weights.sources import Stored
from burnish.weights.tensorfile import BLOCK, Checkpoint, pieces, tensor_digest, whole_digest


def verify(path: Path | str, threads: int = 0) -> dict[str, Any]:
    """Check a delta or a merged checkpoint against the files it was made from.

    A delta: control + delta gives the tuned model. A merged checkpoint: checksums; tensors without a delta equal the
    base's; all others equal the operator in float64, rounded once.

    Returns:
        elements: how many were compared.
        unequal: how many differ (bits of the stored dtype).

    Raises:
        BurnishError: a parent is gone or is not the recorded one, or the artefact is damaged.
    """
    path = Path(path)
    compare = _Merged(path, cores(threads)) if (path / RECORD).is_file() else _Extracted(path)
    with ThreadPoolExecutor(cores(threads)) as pool:
        found = list(pool.map(lambda job: compare.unequal(*job), compare.jobs()))
    return {"elements": sum(stop - start for _, start, stop in compare.jobs()), "unequal": int(sum(found))}


class _Compare:
    """Pieces to compare; `unequal` counts the elements of one that differ."""

    def __init__(self, slots: dict[str, tuple[str, tuple[int, ...]]]):
        self.slots = slots

    def jobs(self) -> list[tuple[str, int, int]]:
        return [(n, a, b) for n, (_, shape) in self.slots.items() for a, b in pieces(int(np.prod(shape)))]

    def unequal(self, name: str, start: int, stop: int) -> int:
        raise NotImplementedError


def _check_there(names: Iterable[str], there: Iterable[str], path: Path | str) -> None:
    lacking = sorted(set(names) - set(there))
    if lacking:
        raise BurnishError(f"{path} lacks '{lacking[0]}' ({len(lacking)} in all)", "the tensors that were recorded")


class _Extracted(_Compare):
    def __init__(self, path: Path):
        self.delta = Delta(path)
        if self.delta.meta.get("control_vector"):
            raise BurnishError(f"{path} is a control vector, made to differ from its parents", "an extracted delta")
        base = Stored(Checkpoint(self.delta.meta["base"]["path"]))
        self.tuned, self.control = (
            open_parent(self.delta.meta[who]["path"], base, self.delta.meta["rename"]).source
            for who in ("tuned", "control")
        )
        for who, source in (("tuned", self.tuned), ("control", self.control)):
            _check_there(self.delta.tensors, source.slots, self.delta.meta[who]["path"])
        super().__init__({name: self.tuned.slots[name] for name in self.delta.tensors})

    def unequal(self, name: str, start: int, stop: int) -> int:
        scratch, wrong = Narrow(), 0
        dtype, block = self.slots[name][0], np.empty(BLOCK)
        for at in range(start, stop, BLOCK):
            end = min(at + BLOCK, stop)
            control = self.control.fill(name, at, end, np.empty(end - at), scratch)
            delta = self.delta.fill(name, at, end, block[: end - at], scratch) / self.delta.scale
            tuned = self.tuned.fill(name, at, end, np.empty(end - at), scratch)
            got, wanted = narrowed(control + delta, dtype), narrowed(tuned, dtype)
            zeros = (tuned == 0) & (control + delta == 0)  # no addition gives the sign of -0.0 to 0.0
            wrong += int((unequal(got, wanted) & ~zeros).sum())
        self.delta.release(name, start, stop)
        for source in (self.control, self.tuned):
            source.release(name, start, stop)
        return wrong


class _Merged(_Compare):
    def __init__(self, path: Path, threads: int):
        self.record = read_summary(path / RECORD, "a folder that `burnish capability merge` wrote")
        self.output = Stored(Checkpoint(path))
        self.base = Stored(Checkpoint(self.record["base"]["path"]))
        self.deltas = [
            Delta(entry["path"])
            if entry["stored"]
            else Difference(self.base, entry["path"], "skip", self.record["include"], self.record["exclude"])
            for entry in self.record["deltas"]
        ]
        for delta, entry in zip(self.deltas, self.record["deltas"], strict=True):
            if isinstance(delta, Delta) and delta.digest != entry["digest"]:
                raise BurnishError(f"{delta.path} is another delta now", f"digest {entry['digest']}")
        for source in (self.output, self.base):
            _check_there(self.record["tensors"], source.slots, source.checkpoint.path)
        with ThreadPoolExecutor(threads) as pool:
            names = list(self.record["tensors"])
            found = list(pool.map(lambda n: tensor_digest(self.output.checkpoint, n), names))
            before = list(pool.map(lambda n: tensor_digest(self.base.checkpoint, n), names))
        if whole_digest(dict(zip(names, before, strict=True))) != self.record["base"]["digest"]:
            raise BurnishError(f"{self.base.checkpoint.path} is another base now", self.record["base"]["digest"])
        damaged = [n for n, d in zip(names, found, strict=True) if d != self.record["tensors"][n]["digest"]]
        if damaged:
            raise BurnishError(f"'{damaged[0]}' in {path} was changed or damaged ({len(damaged)} tensors)",
                               "the checksums of its capability.json", "merge again")  # fmt: skip
        super().__init__(self.output.slots)

    def unequal(self, name: str, start: int, stop: int) -> int:
        got, raw = self.output.raw(name, start, stop), self.base.raw(name, start, stop)
        used = self.record["tensors"][name]["weights"]
        if not used:
            wrong = int(unequal(got, raw).sum())
        else:
            wanted = np.concatenate([
                self._expected(name, used, at, min(at + BLOCK, stop)) for at in range(start, stop, BLOCK)
            ] or [np.empty(0)])  # fmt: skip
            wrong = int(unequal(narrowed(wanted, self.slots[name][0]), got).sum())
        self.output.release(name, start, stop)
        self.base.release(name, start, stop)
        return wrong

    def _expected(self, name: str, used: list, start: int, stop: int) -> np.ndarray:
        """The merged values as float64."""
        base = widened(self.base.raw(name, start, stop), self.base.slots[name][0])
        deltas = [
            self.deltas[k].fill(own, start, stop, np.empty(stop - start), Narrow()) for k, own, _ in used
        ]  # fmt: skip
        weights = [weight for _, _, weight in used]
        if self.record["operator"] == "task":
            for weight, delta in zip(weights, deltas, strict=True):
                base = base + weight * delta
            return base
        how, options = OPERATORS.get(self.record["operator"]), self.record["options"]
        state = how.prepare(self._streams(name, used, weights), **options) if how.prepare is not None else None
        own = [entry["weight"] for entry in self.record["deltas"]]
        block = named_block([(n, w, own[k]) for k, n, w in used], sum(own), start, base, deltas)
        block.state = state
        how.apply(block, **options)
        return block.base

    def _streams(self, name: str, used: list, weights: list[float]) -> Streams:
        size = int(np.prod(self.base.slots[name][1]))
        deltas = [stream(self.deltas[k].fill, own, size) for k, own, _ in used]
        return Streams(stream(self.base.fill, name, size), deltas, weights, size)
