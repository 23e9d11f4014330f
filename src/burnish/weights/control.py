"""Controls: vectors that a task vector must beat before it means anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from burnish.core.options import check_value
from burnish.core.seeding import derive_seed
from burnish.weights.delta import FORMAT, KIND, META, NUMBERS, Delta
from burnish.weights.rounding import Buffers, dot
from burnish.weights.tensorfile import PIECE, Digests, TensorInfo, blocks
from burnish.weights.writer import Plan, cores, output_folder, write_summary, write_tensors

Kind = Literal["permute", "flip", "noise", "rescale"]


def control(
    delta: Path | str, kind: Kind, *, output: Path | str, norm_of: Path | str | None = None, seed: int = 0,
    force: bool = False,
) -> Delta:  # fmt: skip
    """Write a control vector made from `delta`.

    Args:
        kind: permute (elements change places within their tensor, within stretches of two million), flip (sign),
            noise (Gaussian with the norm of each tensor), rescale (as it is; for `norm_of`).
        norm_of: a delta whose total norm the result gets; None keeps that of `delta`.
        seed: of permute and noise.
        force: replace an existing `output`.
    """
    check_value(kind, {"choices": get_args(Kind)}, "--kind")
    source = Delta(delta)
    factor = Delta(norm_of).norm() / source.norm() if norm_of is not None and source.norm() > 0 else 1.0
    job = _Control(source, kind, factor, seed)
    tensors = {name: TensorInfo("F32", tuple(entry["shape"])) for name, entry in source.tensors.items()}
    identity = {"delta": source.digest, "kind": kind, "factor": factor, "seed": seed}
    plan = Plan(Path(output), {NUMBERS: (tensors, {"format": "pt"})}, identity, META, KIND, inputs=[source.path])
    if not force and plan.is_done():
        return Delta(output)
    with output_folder(plan, force) as folder:
        digests = write_tensors(plan, folder, job.compute, cores(0), kind, step=PIECE)
        job.check_inputs()
        write_summary(folder, META, job.meta(digests) | {"identity": plan.seal})
    return Delta(output)


class _Control:
    """Computes whole pieces of the control vector; the draws of one depend on seed, kind, tensor and piece alone."""

    def __init__(self, delta: Delta, kind: str, factor: float, seed: int):
        self.delta, self.kind, self.factor, self.seed = delta, kind, factor, seed
        self.read = Digests()
        self.squares: dict[str, dict[int, float]] = {name: {} for name in delta.tensors}
        self._buffers = Buffers()

    def compute(self, name: str, start: int, stop: int) -> np.ndarray:
        """Stored bits (float32) of a piece."""
        out = np.empty(stop - start, np.float32)
        draws = np.random.default_rng(derive_seed(self.seed, self.kind, name, start))
        entry = self.delta.tensors[name]
        spread = entry["norm"] / max(1, np.prod(entry["shape"])) ** 0.5
        factor = -self.factor if self.kind == "flip" else self.factor
        for at, end in blocks(start, stop):
            value = self.delta.healthy_values(name, at, end, self._buffers(0, end - at), self.read)
            if self.kind == "noise":
                value = draws.normal(scale=spread, size=end - at)
            out[at - start : end - start] = value * factor
        if self.kind == "permute":
            out[:] = out[draws.permutation(out.size)]
        self.squares[name][start] = dot(out.astype(np.float64), out.astype(np.float64))
        return out

    def check_inputs(self) -> None:
        """Refuse a delta that is not as it was written; all of it was read by now."""
        for name in self.read:
            self.delta.check(name, self.read.of(name, self.delta.numbers.tensors[name]))

    def meta(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """delta.json of the control vector."""
        tensors = {
            name: {
                "dtype": entry["dtype"], "shape": entry["shape"], "group": entry["group"], "form": "dense",
                "digest": digests[name], "norm": sum(v for _, v in sorted(self.squares[name].items())) ** 0.5,
            }
            for name, entry in self.delta.tensors.items()
        }  # fmt: skip
        made = {"kind": self.kind, "of": self.delta.digest, "seed": self.seed, "factor": self.factor}
        return {**self.delta.meta, "format": FORMAT, "tensors": tensors, "geometry": {}, "control_vector": made}
