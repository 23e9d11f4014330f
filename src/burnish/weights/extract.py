"""Extraction: the difference of two fine-tunes (or of one and the base) as a delta.

Whatever else differs between two runs (seed, steps, data, batch size) is in it as well, and no arithmetic takes it out.
"""

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from burnish import __version__
from burnish.core.errors import BurnishError
from burnish.core.options import check_value
from burnish.core.reading import read_object
from burnish.core.recipe import flatten
from burnish.weights.adapters import Adapted, open_source
from burnish.weights.delta import FORMAT, KIND, META, NUMBERS, Delta
from burnish.weights.names import Choice, Heads, choose, embodiment, same_robot
from burnish.weights.rounding import Buffers, difference, dot, healthy, narrow, refuse_odd, unequal, widen
from burnish.weights.sources import Checkpoint, locate
from burnish.weights.tensorfile import DTYPES, Digests, TensorInfo, whole_digest
from burnish.weights.writer import Plan, cores, output_folder, write_summary, write_tensors

log = logging.getLogger("burnish")

DeltaDtype = Literal["auto", "fp64", "fp32", "bf16", "fp16"]
Parents = dict[str, Checkpoint | Adapted]
"""base, tuned and control; the base itself where no control was given."""
_NOISE = {"BF16": 2.0**-14 * 0.541 / 12, "F16": 2.0**-20 * 0.541 / 12}
"""Mean squared rounding error over squared value. A rounding step is 2^-7 (2^-10) of the leading power of two and the
error of a step is uniform (its square over 12); 0.541 averages 1 / mantissa^2 over evenly spread exponents."""


def extract(
    base: Path | str, tuned: Path | str, control: Path | str | None = None, *, output: Path | str,
    include: Sequence[str] = (), exclude: Sequence[str] = (), heads: Heads = "refuse", dtype: DeltaDtype = "auto",
    rename: Sequence[tuple[str, str]] = (), strict: bool = False, threads: int = 0, force: bool = False,
) -> Delta:  # fmt: skip
    """Write the delta tuned - control (control: the base when not given) to the folder `output`.

    Plain LoRA adapters, two or one against the base, give an exact low-rank delta in factors.

    Args:
        base: what both were tuned from; its digest is what `merge` asks for.
        tuned: checkpoint folder, safetensors file, or peft adapter folder (LoRA, DoRA) of the base.
        control: the same without what `tuned` has learnt; the base when not given.
        output: folder to write; it appears when it is whole.
        include: patterns over tensor names; the others are left out.
        exclude: patterns over tensor names that are left out.
        heads: what to do with action and state heads that are missing in a parent or differ in shape.
        dtype: auto (fp32 for half-precision parents, else fp64, which gives the tuned model back bit for bit), fp64,
            fp32, bf16 or fp16. The difference of two bf16 numbers seldom fits into bf16.
        rename: (pattern, replacement) applied to names of tuned and control.
        strict: refuse two fine-tunes whose recorded runs differ in more than their methods (seed, steps, data, recipe),
            or of which nothing is recorded; without it that is logged as a warning and kept in delta.json.
        threads: 0 means one for each core.
        force: replace an existing `output`.

    Raises:
        BurnishError: names, shapes or files that do not fit, weights that are not finite, too little disk, nothing
            chosen.
    """
    check_value(heads, {"choices": get_args(Heads)}, "--heads")
    check_value(dtype, {"choices": get_args(DeltaDtype)}, "--dtype")
    root = Checkpoint(locate(base))
    parents: Parents = {"base": root, "tuned": open_source(tuned, root, rename)}
    parents["control"] = root if control is None else open_source(control, root, rename)
    unlike = [] if control is None else _compare_runs(parents, strict)
    choice = choose({who: parent.tensors for who, parent in parents.items()}, include, exclude, heads)
    if heads == "refuse":
        _check_robots(parents, choice)
    job = _Extraction(parents, choice, _factors(parents, choice), dtype)
    plan = job.plan(Path(output), [list(rule) for rule in rename])
    if not force and plan.is_done():
        return Delta(output)
    with output_folder(plan, force) as folder:
        digests = write_tensors(plan, folder, job.compute, cores(threads), "extracting")
        asked = {"rename": [list(rule) for rule in rename], "runs_differ": unlike}
        meta = job.meta(digests) | asked | {"identity": plan.seal}
        write_summary(folder, META, meta)
    return Delta(output)


def _compare_runs(parents: Parents, strict: bool) -> list[str]:
    """How the runs behind tuned and control differ; warns of it, or refuses it."""
    paths = parents["tuned"].path, parents["control"].path
    found = differences(*paths)
    if found and strict:
        raise BurnishError(f"{paths[0]} and {paths[1]} are no pair: {'; '.join(found)}", "two runs that differ in "
                           "their methods alone", "train one of them again, or leave out --strict")  # fmt: skip
    if found:
        log.warning("%s and %s differ in more than their methods, which the vector then holds too: %s", *paths,
                    "; ".join(found))  # fmt: skip
    return found


def _check_robots(parents: Parents, choice: Choice) -> None:
    """Padded heads have one shape for every robot, but mean something else on each."""
    head = next((name for name, group in choice.chosen.items() if group == "head"), None)
    robots = {who: embodiment(parent.path) for who, parent in parents.items()}
    for who, robot in robots.items():
        if head is not None and same_robot(robot, robots["base"]) is False:
            raise BurnishError(f"head '{head}' in a difference across robots: {who} {parents[who].path} declares "
                               f"another state or action than the base", "a rule for heads", "--heads skip or keep"
                               )  # fmt: skip


class _Factors:
    """The low-rank form of a delta: its tensors, and the matrices that are stored for them."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.matrices: dict[str, np.ndarray] = {}

    def take(self, sign: float, source: Adapted, choice: Choice) -> None:
        """Add the updates of one adapter."""
        for name, update in source.updates.items():
            if name in choice.chosen:
                entry = self.entries.setdefault(name, {"scales": [], "transposed": update.transposed})
                for side, matrix in (("up", update.up), ("down", update.down)):
                    single = matrix.astype(np.float32)
                    exact = matrix if (matrix != single).any() else single
                    self.matrices[f"{name}::{len(entry['scales'])}.{side}"] = np.ascontiguousarray(exact)
                entry["scales"].append(sign * update.scale)

    def describe(self, name: str, digests: Mapping[str, str]) -> dict[str, Any]:
        """The part of a tensor's entry in delta.json that tells of its factors."""
        entry = self.entries[name]
        pairs = [(f"{name}::{k}.up", f"{name}::{k}.down") for k in range(len(entry["scales"]))]
        downs = [self.matrices[down].astype(np.float64) for _, down in pairs]
        ups = [s * self.matrices[up].astype(np.float64) for s, (up, _) in zip(entry["scales"], pairs, strict=True)]
        # |sum U D|^2 = sum over pairs of tr(U_i D_i D_j' U_j'), so the product itself is never built.
        squared = sum(((u.T @ v) * (d @ e.T)).sum() for u, d in zip(ups, downs, strict=True)
                      for v, e in zip(ups, downs, strict=True))  # fmt: skip
        return {"form": "lowrank", "rank": sum(d.shape[0] for d in downs), **entry, "norm": max(0.0, squared) ** 0.5,
                "digest": whole_digest({side: digests[side] for pair in pairs for side in pair})}  # fmt: skip


def _factors(parents: Parents, choice: Choice) -> _Factors | None:
    """The low-rank form, None where there is none: whole weights, DoRA, or modules that were trained as a whole."""
    tuned, control = parents["tuned"], parents["control"]
    adapted = [source for source in (tuned, control) if isinstance(source, Adapted)]
    possible = isinstance(tuned, Adapted) and (isinstance(control, Adapted) or control is parents["base"])
    if not possible or not all(source.low_rank for source in adapted):
        return None
    factors = _Factors()
    for sign, source in zip((1.0, -1.0), adapted, strict=False):
        factors.take(sign, source, choice)
    if not factors.entries:
        raise BurnishError("the adapter changes none of the chosen tensors", "at least one",
                           "other --include and --exclude patterns")  # fmt: skip
    return factors


class _Extraction:
    """Computes blocks of the delta, and gathers digests and figures of what it reads on the way."""

    def __init__(self, parents: Parents, choice: Choice, factors: _Factors | None, dtype: str):
        self.parents, self.choice, self.factors = parents, choice, factors
        self.base, self.tuned, self.control = parents["base"], parents["tuned"], parents["control"]
        self.three = self.control is not self.base  # a control of its own, not the base
        self.tied = {} if factors else _find_tied(parents, choice)
        self.dense = {} if factors else {
            name: TensorInfo(self._dtype(name, dtype), self.tuned.tensors[name].shape)
            for name in choice.chosen if name not in self.tied
        }  # fmt: skip
        self.read = {who: Digests() for who in parents}
        self.sums: dict[str, dict[int, dict[str, float]]] = {name: {} for name in self.dense}
        self._buffers = Buffers()

    def _dtype(self, name: str, dtype: str) -> str:
        if dtype != "auto":
            return DTYPES[dtype]
        half = {self.tuned.tensors[name].dtype, self.control.tensors[name].dtype} <= {"BF16", "F16"}
        return "F32" if half else "F64"

    def plan(self, output: Path, rename: list[list[str]]) -> Plan:
        """One file with the dense tensors or the factors."""
        tensors = dict(self.dense)
        for part, matrix in self.factors.matrices.items() if self.factors else ():
            tensors[part] = TensorInfo({4: "F32", 8: "F64"}[matrix.itemsize], matrix.shape)
        identity = {
            "parents": {who: parent.stamp for who, parent in self.parents.items()}, "version": __version__,
            "tensors": {name: info.dtype for name, info in sorted(tensors.items())}, "rename": rename,
        }  # fmt: skip
        inputs = [parent.path for parent in self.parents.values()]
        return Plan(output, {NUMBERS: (tensors, {"format": "pt"})}, identity, META, KIND, inputs=inputs)

    def compute(self, name: str, start: int, stop: int) -> np.ndarray:
        """Stored bits of elements start:stop of a dense tensor or a factor."""
        if self.factors:
            return self.factors.matrices[name].reshape(-1)[start:stop]
        size, info, buffers, sums = stop - start, self.dense[name], self._buffers, dict[str, float]()
        tuned = self.tuned.values(name, start, stop, buffers(0, size), self.read["tuned"])
        who = "control" if self.three else "base"
        control = self.control.values(name, start, stop, buffers(1, size), self.read[who])
        values = {self.tuned.path: tuned, self.control.path: control}
        if self.three:
            base = self.base.values(name, start, stop, buffers(4, size), self.read["base"])
            values[self.base.path] = base
        finite = all(map(healthy, values.values())) or refuse_odd(name, values)
        delta = difference(tuned, control, buffers(2, size))
        bits = narrow(delta, info.dtype, np.empty(size, info.stored))
        widen(bits, info.dtype, delta)
        sums["not_exact"] = _not_exact(tuned, np.add(control, delta, out=buffers(3, size)), self.tuned.tensors[name])
        if not finite:  # infinities that nobody changed, as masks have them, are no part of any norm
            for value in values.values():
                value[~np.isfinite(value)] = 0.0
        sums |= {"delta": dot(delta, delta), "tuned": dot(tuned, tuned), "control": dot(control, control)}
        if self.three:
            np.subtract(control, base, out=control)
            np.subtract(tuned, base, out=tuned)
            sums |= {"control_task": dot(control, control), "tuned_task": dot(tuned, tuned),
                     "tasks_dot": dot(control, tuned), "delta_dot": dot(control, delta)}  # fmt: skip
        self.sums[name][start] = sums
        return bits

    def _sum(self, key: str, name: str = "") -> float:
        """A figure of one tensor, or of all; in the order of the blocks, whatever thread was first."""
        names = [name] if name else self.sums
        return sum(sums.get(key, 0.0) for n in names for _, sums in sorted(self.sums[n].items()))

    def meta(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """delta.json, save for what was asked."""
        hashes = self._parent_digests()
        found: dict[str, Any] = {
            "format": FORMAT, "burnish": __version__,
            "tensors": {name: self._entry(name, digests)
                        for name in sorted(self.factors.entries if self.factors else self.dense)},
            "tied": self.tied, "skipped": self.choice.skipped,
            "not_exact": int(self._sum("not_exact")), "geometry": self._geometry(), "rounding_noise": self._noise(),
            "embodiment": embodiment(self.tuned.path) or embodiment(self.base.path),
        }  # fmt: skip
        for who, parent in self.parents.items():
            found[who] = {"path": str(parent.path.absolute()), "digest": whole_digest(hashes[who])}
        found["base"]["tensors"] = hashes["base"]
        return found

    def _entry(self, name: str, digests: Mapping[str, str]) -> dict[str, Any]:
        dtype, shape = self.tuned.tensors[name]
        entry = {"dtype": dtype, "shape": list(shape), "group": self.choice.chosen[name]}
        if self.factors:
            return entry | self.factors.describe(name, digests)
        norms = {"norm": self._sum("delta", name) ** 0.5, "norm_tuned": self._sum("tuned", name) ** 0.5}
        return entry | {"form": "dense", "digest": digests[name]} | norms

    def _parent_digests(self) -> dict[str, dict[str, str]]:
        """Digest of every tensor of every parent; those that were not read for the delta are read now."""
        hashes: dict[str, dict[str, str]] = {}
        for who, parent in self.parents.items():
            if who == "control" and not self.three:
                hashes[who] = hashes["base"]
            elif isinstance(parent, Checkpoint):
                read = set(self.read[who])
                hashes[who] = {
                    name: self.read[who].of(name, info) if name in read else parent.digest(name)
                    for name, info in parent.tensors.items()
                }
            else:
                hashes[who] = {"base": whole_digest(hashes["base"]), "adapter": parent.digest}
        return hashes

    def _geometry(self) -> dict[str, float]:
        """Angles between the two fine-tunes as seen from the base; empty when the control is the base."""
        if not self.three or not self.dense:
            return {}
        size = {key: math.sqrt(self._sum(key)) for key in ("delta", "control_task", "tuned_task")}

        def cosine(inner: float, a: float, b: float) -> float:
            return inner / (a * b) if a > 0 and b > 0 else 0.0

        return {
            "norm_over_control_task": size["delta"] / size["control_task"] if size["control_task"] > 0 else 0.0,
            "cosine_of_tasks": cosine(self._sum("tasks_dot"), size["control_task"], size["tuned_task"]),
            "cosine_to_control_task": cosine(self._sum("delta_dot"), size["control_task"], size["delta"]),
        }

    def _noise(self) -> float:
        """Estimated share of the delta's norm that is rounding of half-precision parents."""
        noise = sum(
            _NOISE.get(self.parents[who].tensors[name].dtype, 0.0) * self._sum(who, name)
            for who in ("tuned", "control") for name in self.dense
        )  # fmt: skip
        size = self._sum("delta")
        return math.sqrt(noise / size) if size > 0 else 0.0


def _not_exact(tuned: np.ndarray, reached: np.ndarray, info: TensorInfo) -> float:
    """Elements of a block for which control + delta, `reached`, does not round to the tuned model."""
    wanted, got = (narrow(value, info.dtype, np.empty(value.size, info.stored)) for value in (tuned, reached))
    return float(unequal(wanted, got).sum())


def _find_tied(parents: Parents, choice: Choice) -> dict[str, str]:
    """Matrices that are bit for bit the same in each parent (tied weights stored twice): alias to owner."""
    stored = [parent for parent in parents.values() if isinstance(parent, Checkpoint)]
    if len(stored) < len(parents):
        return {}
    tensors = parents["base"].tensors
    everywhere = set.intersection(*(set(parent.tensors) for parent in stored))
    candidates = sorted(n for n in everywhere if re.search("lm_head|embed|wte", n) and len(tensors[n].shape) >= 2)
    tied: dict[str, str] = {}
    owners: dict[tuple[str, ...], str] = {}
    for name in candidates:
        others = [other for other in candidates if _tied_names(name, other) and tensors[other] == tensors[name]]
        if not others or not any(other in choice.chosen for other in (name, *others)):
            continue
        owner = owners.setdefault(tuple(parent.digest(name) for parent in stored), name)
        if owner == name:
            continue
        if (owner in choice.chosen) != (name in choice.chosen):
            raise BurnishError(f"'{owner}' and '{name}' are tied, but only one takes part in the delta",
                               "both or none", "--include and --exclude that fit both")  # fmt: skip
        if name in choice.chosen:
            tied[name] = owner
    return tied


def _tied_names(a: str, b: str) -> bool:
    """Only an output layer and an embedding are ever tied; equal zeros elsewhere are not."""
    return {"lm_head" in a, "lm_head" in b} == {True, False} and ("embed" in a or "embed" in b or "wte" in a + b)


_MAY_DIFFER = (
    "name", "output", "objectives", "language.", "demos.", "eval.", "data.workers", "data.cache_dir", "data.root",
    "train.log_every", "train.save_every", "train.retention_every", "train.max_minutes", "train.trackers",
    "train.self_check",
)  # fmt: skip
"""Fields of a recipe, or beginnings of them: the methods, which the vector is made of, and what touches no number."""


def facts(path: Path) -> dict[str, Any]:
    """What `burnish train` recorded of the run that made the checkpoint or adapter at `path`; {} where nothing did.

    A policy or adapter folder lies in its run's folder, beside train.json; a checkpoint holds burnish/meta.json.
    """
    folder = Path(os.path.realpath(path if path.is_dir() else path.parent))
    for file in (folder / "burnish" / "meta.json", folder.parent / "train.json"):
        if file.is_file():
            found = read_object(file, file.parent)
            break
    else:
        return {}
    recipe = found.get("recipe")
    if not isinstance(recipe, dict):
        return {}  # of another tool
    kept = {name: value for name, value in flatten(recipe).items() if not name.startswith(_MAY_DIFFER)}
    steps = found.get("steps", found.get("step"))
    return kept | {"data": found.get("data_hash"), "steps": steps}


def differences(tuned: Path, control: Path) -> list[str]:
    """How the runs behind two checkpoints differ in more than their methods, one line each; [] where they do not."""
    one, other = facts(tuned), facts(control)
    unknown = [str(path) for path, found in ((tuned, one), (control, other)) if not found]
    if unknown:
        return [f"nothing is recorded of the training of {' and '.join(unknown)}"]
    shared = sorted(one.keys() & other.keys())  # a field that came into being between the two runs is not compared
    return [f"{name} {one[name]!r:.80} and {other[name]!r:.80}" for name in shared if one[name] != other[name]]
