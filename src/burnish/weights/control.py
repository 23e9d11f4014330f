"""`burnish capability control`: vectors that a capability vector must beat before it means anything."""

from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed
from burnish.weights.delta import Delta
from burnish.weights.describe import META, NUMBERS
from burnish.weights.engine import Inputs, Plan, Worker, cores, filling, write_summary, write_tensors
from burnish.weights.rounding import dot
from burnish.weights.tensorfile import BLOCK

KINDS = ("permute", "flip", "noise", "rescale")


def control(
    delta: Path | str, kind: str, *, output: Path | str, norm_of: Path | str | None = None, seed: int = 0,
    threads: int = 0, force: bool = False,
) -> Delta:  # fmt: skip
    """Write a control vector made from `delta`.

    Args:
        delta: folder of the delta.
        kind: permute (elements change places within their tensor, within stretches of two million), flip (sign),
            noise (Gaussian with the norm of each tensor), rescale (as it is; for `norm_of`).
        output: folder to write.
        norm_of: a delta whose total norm the result gets; None keeps that of `delta`.
        seed: of permute and noise.
        threads: 0 means one for each core.
        force: replace an existing `output`.
    """
    if kind not in KINDS:
        raise BurnishError(f"control '{kind}'", f"one of {', '.join(KINDS)}")
    source = Delta(delta)
    factor = Delta(norm_of).norm() / source.norm() if norm_of is not None and source.norm() > 0 else 1.0
    job = _Control(source, kind, factor, seed)
    slots = {name: ("F32", tuple(entry["shape"])) for name, entry in source.tensors.items()}
    identity = {"delta": source.digest, "kind": kind, "factor": factor, "seed": seed}
    plan = Plan(Path(output), {NUMBERS: (slots, {"format": "pt"})}, identity, inputs=[source.path])
    if plan.is_done(META, force):
        return Delta(output)
    with filling(plan, force) as part:
        digests = write_tensors(plan, part, job, cores(threads), kind)
        write_summary(part, META, job.meta(digests) | {"identity": plan.seal()})
    return Delta(output)


class _Control:
    """The engine's maker."""

    def __init__(self, delta: Delta, kind: str, factor: float, seed: int):
        self.delta, self.kind, self.factor, self.seed = delta, kind, factor, seed
        dense = {n: (delta.numbers.slots[n].dtype, delta.numbers.slots[n].shape) for n, e in delta.tensors.items()
                 if e["form"] == "dense"}  # fmt: skip
        self.inputs = Inputs(str(delta.path), dense, {n: delta.tensors[n]["digest"] for n in dense})
        self.squares: dict[str, dict[str, float]] = {}

    def piece(self, worker: Worker, name: str, start: int, stop: int) -> np.ndarray:
        raw = self.delta.raw(name, start, stop)
        if raw is not None:
            self.inputs.piece(name, start, raw)
        out = worker.out("F32", stop - start)
        draws = np.random.default_rng(derive_seed(self.seed, self.kind, name, start))
        entry = self.delta.tensors[name]
        spread = self.delta.scale * entry["norm"] / max(1, np.prod(entry["shape"])) ** 0.5
        factor = -self.factor if self.kind == "flip" else self.factor
        for at in range(start, stop, BLOCK):
            end = min(at + BLOCK, stop)
            if self.kind == "noise":
                value = draws.normal(scale=spread, size=end - at)
            else:
                value = self.delta.fill(name, at, end, worker.double(0, end - at), worker.narrow)
            out[at - start : end - start] = value * factor
        if self.kind == "permute":
            out[:] = out[draws.permutation(out.size)]
        self.squares.setdefault(name, {})[str(start)] = dot(out.astype(np.float64), out.astype(np.float64))
        return out

    def release(self, name: str, start: int, stop: int) -> None:
        self.delta.release(name, start, stop)

    def finished(self, name: str) -> dict[str, Any]:
        if name in self.inputs.shapes:
            self.inputs.finish(name)
        return {"squares": self.squares[name]}

    def restore(self, name: str, facts: dict[str, Any]) -> None:
        self.squares[name] = facts["squares"]

    def meta(self, digests: dict[str, str]) -> dict[str, Any]:
        tensors = {
            name: {
                "dtype": entry["dtype"], "shape": entry["shape"], "group": entry["group"], "form": "dense",
                "digest": digests[name], "norm": sum(self.squares[name].values()) ** 0.5,
            }
            for name, entry in self.delta.tensors.items()
        }  # fmt: skip
        made = {"kind": self.kind, "of": self.delta.digest, "seed": self.seed, "factor": self.factor}
        return {**self.delta.meta, "tensors": tensors, "low": "", "low_elements": 0, "dtype": "F32", "scale": 1.0,
                "geometry": {}, "control_vector": made}  # fmt: skip
