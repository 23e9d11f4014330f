"""`burnish capability unmerge`: take the deltas of a merged checkpoint away again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.weights.delta import Delta
from burnish.weights.engine import Inputs, Plan, Worker, cores, filling, read_summary, write_tensors
from burnish.weights.merge import RECORD, UNDONE, companions, finish_folder, take_away
from burnish.weights.sources import Stored
from burnish.weights.sparse import SparseFile
from burnish.weights.tensorfile import BLOCK, UNDO, Checkpoint


def unmerge(
    merged: Path | str, *, output: Path | str, deltas: Sequence[Path | str] = (), threads: int = 0, force: bool = False
) -> dict[str, Any]:
    """Write the base of a merged checkpoint to the folder `output`.

    Args:
        merged: a folder that `merge` wrote with operator task or linear.
        deltas: where its deltas lie now, in their order; empty means where they were.
        threads: 0 means one for each core.
        force: replace an existing `output`.

    Returns:
        `tensors` and `equal`: how many there are and how many equal the base bit for bit. Rounding of the merge loses
        the last bit of some elements, so that is all of them only after `merge --undoable`.

    Raises:
        BurnishError: no merge record, changed weights or deltas, an operator that cannot be undone.
    """
    path = Path(merged)
    record = read_summary(path / RECORD, "a folder that `burnish capability merge` wrote")
    if record["operator"] not in UNDONE:
        raise BurnishError(f"{path} was merged with '{record['operator']}'",
                           f"{' or '.join(UNDONE)}, which can be taken back")  # fmt: skip
    if not all(entry["stored"] for entry in record["deltas"]):
        raise BurnishError(f"{path} was merged from tuned models, not from deltas", "a delta to take away",
                           "extract one first, then merge it")  # fmt: skip
    job = _Unmerging(Stored(Checkpoint(path)), record, [Delta(p) for p in deltas] or _recorded(record))
    files = {
        job.merged.checkpoint.place(file): (
            {n: (job.base_dtype(n), s.shape) for n, s in file.slots.items()}, file.metadata,
        )
        for file in job.merged.checkpoint.files
    }  # fmt: skip
    inputs = [path, *(delta.path for delta in job.deltas)]
    plan = Plan(Path(output), files, {"merged": record}, companions(job.merged.checkpoint), inputs)
    with filling(plan, force) as part:
        digests = write_tensors(plan, part, job, cores(threads), "unmerging")
        finish_folder(part, Path(output), job.merged.checkpoint)
    equal = sum(digest == record["tensors"][name]["base_digest"] for name, digest in digests.items())
    return {"tensors": len(digests), "equal": equal, "undoable": record["undoable"]}


def _recorded(record: dict[str, Any]) -> list[Delta]:
    return [Delta(entry["path"]) for entry in record["deltas"]]


class _Unmerging:
    """The engine's maker: the merge backwards."""

    def __init__(self, merged: Stored, record: dict[str, Any], deltas: list[Delta]):
        self.merged, self.record, self.deltas = merged, record, deltas
        if len(deltas) != len(record["deltas"]):
            raise BurnishError(f"{len(deltas)} deltas", f"{len(record['deltas'])}, as were merged")
        for delta, entry in zip(deltas, record["deltas"], strict=True):
            if delta.digest != entry["digest"]:
                raise BurnishError(f"{delta.path} is not the delta that was merged", f"digest {entry['digest']}",
                                   "--delta with the right folder")  # fmt: skip
        if set(record["tensors"]) != set(merged.slots):
            raise BurnishError(f"{merged.checkpoint.path} has other tensors than were merged", "an untouched folder")
        expected = {name: entry["digest"] for name, entry in record["tensors"].items()}
        self.inputs = Inputs(f"the merged {merged.checkpoint.path}", merged.slots, expected)
        self.undo = SparseFile(merged.checkpoint.path / UNDO)

    def base_dtype(self, name: str) -> str:
        return self.record["tensors"][name]["base_dtype"]

    def weights(self, name: str) -> list[list[Any]]:
        """As merged; a linear merge had scaled them to sum 1."""
        used = self.record["tensors"][name]["weights"]
        if self.record["operator"] == "linear" and used:
            total = sum(entry["weight"] for entry in self.record["deltas"])
            return [[k, own, weight / total] for k, own, weight in used]
        return used

    def piece(self, worker: Worker, name: str, start: int, stop: int) -> np.ndarray:
        raw, used = self.merged.raw(name, start, stop), self.weights(name)
        self.inputs.piece(name, start, raw)
        if not used:
            return raw
        base_dtype, dtype = self.base_dtype(name), self.merged.slots[name][0]
        out = worker.out(base_dtype, stop - start)
        for at in range(start, stop, BLOCK):
            end = min(at + BLOCK, stop)
            added = []
            for index, (k, own, weight) in enumerate(used):
                delta = self.deltas[k].fill(own, at, end, worker.double(index + 1, end - at), worker.narrow)
                added.append(np.multiply(delta, weight, out=delta))
            bits = out[at - start : end - start]
            bits[:] = take_away(worker, raw[at - start : end - start], dtype, added, base_dtype)
            positions, values = self.undo.between(name, at, end)
            bits[positions] = values
        return out

    def release(self, name: str, start: int, stop: int) -> None:
        self.merged.release(name, start, stop)
        for k, own, _ in self.record["tensors"][name]["weights"]:
            self.deltas[k].release(own, start, stop)

    def finished(self, name: str) -> dict[str, Any]:
        self.inputs.finish(name)
        return {}

    def restore(self, name: str, facts: dict[str, Any]) -> None:
        """Nothing to take back."""
