"""What delta.json says about an extracted delta."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish import __version__
from burnish.weights.names import embodiment
from burnish.weights.sources import Stored
from burnish.weights.sparse import SparseFile
from burnish.weights.tensorfile import TensorFile, tensor_digest, whole_digest

if TYPE_CHECKING:
    from burnish.weights.extract import Extraction

FORMAT = 1
META, NUMBERS, LOW = "delta.json", "delta.safetensors", "low.safetensors"
_NOISE = {"BF16": 2.0**-14 * 0.541 / 12, "F16": 2.0**-20 * 0.541 / 12}
"""Mean squared rounding error over squared value. A rounding step is 2^-7 (2^-10) of the leading power of two and the
error of a step is uniform (its square over 12); 0.541 averages 1 / mantissa^2 over evenly spread exponents."""
_TRAINING = ("train", "data", "language")


def describe(job: "Extraction", part: Path, digests: dict[str, str]) -> dict[str, Any]:
    """The metadata of a finished extraction whose files lie in `part`."""
    numbers = TensorFile(part / NUMBERS)
    tensors = {name: _dense(job, name, digests[name]) for name in job.dense}
    tensors |= {name: _low_rank(job, name, numbers, digests) for name in job.lowrank}
    hashes = _parent_hashes(job)
    meta = {
        "format": FORMAT,
        "burnish": __version__,
        "scale": 1.0,
        "dtype": job.dtype,
        "tensors": dict(sorted(tensors.items())),
        "tied": job.tied,
        "skipped": job.choice.skipped,
        "key_map": {
            who: {new: old for new, old in parent.source.names.items() if new != old}
            for who, parent in job.parents.items() if isinstance(parent.source, Stored)
        },
        "rename": job.rules,
        "low": SparseFile(part / LOW).digest(),
        "low_elements": job.low.total,
        "not_exact": int(_sum(job, "not_exact")),
        "embodiment": embodiment(job.parents["tuned"].path) or embodiment(job.parents["base"].path),
        **{who: {"path": str(parent.path.absolute()), "digest": whole_digest(hashes[who])}
           for who, parent in job.parents.items()},
    }  # fmt: skip
    meta["base"]["tensors"] = hashes["base"]
    meta["training"] = {who: facts for who in ("tuned", "control") if (facts := _training(job.parents[who].path))}
    return meta | {"geometry": _geometry(job), "rounding_noise": _noise(job)}


def _dense(job: "Extraction", name: str, digest: str) -> dict[str, Any]:
    total = {key: sum(piece[key] for piece in job.sums[name].values()) for key in ("delta", "tuned", "control")}
    dtype, shape = job.tuned.slots[name]
    return {
        "dtype": dtype, "shape": list(shape), "group": job.choice.chosen[name], "form": "dense", "digest": digest,
        "norm": math.sqrt(total["delta"]), "norm_tuned": math.sqrt(total["tuned"]),
    }  # fmt: skip


def _low_rank(job: "Extraction", name: str, numbers: TensorFile, digests: dict[str, str]) -> dict[str, Any]:
    entry = job.lowrank[name]
    sides = [f"{name}::{k}.{side}" for k in range(len(entry["scales"])) for side in ("up", "down")]
    ups = [entry["scales"][k] * job.factors[f"{name}::{k}.up"] for k in range(len(entry["scales"]))]
    downs = [job.factors[f"{name}::{k}.down"] for k in range(len(entry["scales"]))]
    # |sum U D|^2 = sum over pairs of tr(U_i D_i D_j' U_j'), so the product itself is never built.
    squared = sum(((u.T @ v) * (d @ e.T)).sum() for u, d in zip(ups, downs, strict=True)
                  for v, e in zip(ups, downs, strict=True))  # fmt: skip
    return {
        "dtype": "F32", "shape": list(job.base.slots[name][1]), "group": job.choice.chosen[name],
        "form": "lowrank", "rank": sum(d.shape[0] for d in downs), **entry,
        "digest": whole_digest({side: digests[side] for side in sides}), "norm": math.sqrt(max(0.0, float(squared))),
    }  # fmt: skip


def _parent_hashes(job: "Extraction") -> dict[str, dict[str, str]]:
    """Digest of every tensor of every parent; those that were not read for the delta are read now."""
    hashes: dict[str, dict[str, str]] = {}
    for who, parent in job.parents.items():
        if who == "control" and not job.three:
            hashes[who] = hashes["base"]
        elif isinstance(parent.source, Stored):
            known = job.inputs[who].digests
            hashes[who] = {
                name: known[name] if name in known else tensor_digest(parent.source.checkpoint, stored)
                for name, stored in parent.source.names.items()
            }
        else:
            hashes[who] = {"base": whole_digest(hashes["base"]), "adapter": parent.adapter.digest}
    return hashes


def _sum(job: "Extraction", key: str) -> float:
    return sum(piece[key] for found in job.sums.values() for piece in found.values())


def _geometry(job: "Extraction") -> dict[str, float]:
    """Angles between the two fine-tunes as seen from the base; empty when the control is the base."""
    if not job.three or not job.dense:
        return {}
    size = {key: math.sqrt(_sum(job, key)) for key in ("delta", "control_task", "tuned_task")}

    def cosine(dot: float, a: float, b: float) -> float:
        return dot / (a * b) if a > 0 and b > 0 else 0.0

    return {
        "norm_over_control_task": size["delta"] / size["control_task"] if size["control_task"] > 0 else 0.0,
        "cosine_of_tasks": cosine(_sum(job, "tasks_dot"), size["control_task"], size["tuned_task"]),
        "cosine_to_control_task": cosine(_sum(job, "delta_dot"), size["control_task"], size["delta"]),
    }


def _noise(job: "Extraction") -> float:
    """Estimated share of the delta's norm that is rounding of half-precision parents."""
    noise = 0.0
    for who, source in (("tuned", job.tuned), ("control", job.control)):
        for name in job.dense:
            factor = _NOISE.get(source.slots[name][0], 0.0)
            noise += factor * sum(piece[who] for piece in job.sums[name].values())
    size = _sum(job, "delta")
    return math.sqrt(noise / size) if size > 0 else 0.0


def _training(path: Path) -> dict[str, Any]:
    """The settings of the run that made a policy folder, where it lies in one (runs/NAME/policy)."""
    file = path.parent / "train.json"
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text())
        recipe = {section: facts["recipe"][section] for section in _TRAINING}
        return {"steps": facts["steps"], "data_hash": facts["data_hash"], "recipe": recipe,
                "objectives": facts["recipe"]["objectives"]}  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return {}
