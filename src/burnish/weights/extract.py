"""`burnish capability extract`: the difference of two fine-tunes (or of one and the base) as a delta."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish import __version__
from burnish.core.errors import BurnishError
from burnish.weights.delta import Delta
from burnish.weights.describe import LOW, META, NUMBERS, describe
from burnish.weights.engine import Inputs, Plan, Worker, cores, filling, write_summary, write_tensors
from burnish.weights.names import Choice, choose, embodiment, same_robot
from burnish.weights.rounding import difference, dot, unequal
from burnish.weights.sources import ADAPTER_CONFIG, Adapted, Adapter, Stored, is_adapter
from burnish.weights.sparse import SparseWriter
from burnish.weights.tensorfile import BLOCK, Checkpoint, tensor_digest

DTYPES = {"fp64": "F64", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
SUMS = ("delta", "tuned", "control", "control_task", "tuned_task", "tasks_dot", "delta_dot", "not_exact")


def locate(path: Path | str) -> Path:
    """A checkpoint's folder or file; a bare name may be a base that ships with burnish."""
    shipped = Path(__file__).resolve().parents[2] / "assets" / Path(path)
    return shipped if not Path(path).exists() and len(Path(path).parts) == 1 and shipped.is_dir() else Path(path)


@dataclass
class Parent:
    """One of base, tuned, control: its numbers, its path and how to name it."""

    path: Path
    source: Stored | Adapted
    adapter: Adapter | None = None


def open_parent(path: Path | str, base: Stored, rules: Sequence[tuple[str, str]]) -> Parent:
    """A checkpoint or an adapter of `base`, under the base's names."""
    path = locate(path)
    if is_adapter(path):
        adapter = Adapter(path, list(base.slots), rules)
        return Parent(path, Adapted(base, adapter), adapter)
    return Parent(path, Stored(Checkpoint(path), list(base.slots), rules))


def extract(
    base: Path | str, tuned: Path | str, control: Path | str | None = None, *, output: Path | str,
    include: Sequence[str] = (), exclude: Sequence[str] = (), heads: str = "refuse", dtype: str = "fp32",
    form: str = "auto", rename: Sequence[tuple[str, str]] = (), threads: int = 0, force: bool = False,
) -> Delta:  # fmt: skip
    """Write the delta tuned - control (control: the base when not given) to the folder `output`.

    Args:
        base: what both were tuned from; its hash is what `merge` asks for.
        tuned, control: checkpoint folders, safetensors files, or peft adapter folders (LoRA, DoRA) of the base.
        include, exclude: patterns over tensor names.
        heads: what to do with action and state heads that are missing in a parent or differ in shape.
        dtype: fp32 (default), fp64, bf16 or fp16. The difference of two bf16 numbers seldom fits into bf16.
        form: auto, dense or lowrank. Two plain LoRA adapters give an exact low-rank delta.
        rename: (pattern, replacement) applied to names of tuned and control.
        threads: 0 means one for each core.
        force: replace an existing `output`.

    Raises:
        BurnishError: names, shapes or files that do not fit, too little disk, nothing chosen.
    """
    root, rules = Stored(Checkpoint(locate(base))), [tuple(rule) for rule in rename]
    parents = {"base": Parent(locate(base), root), "tuned": open_parent(tuned, root, rules)}
    parents["control"] = open_parent(control, root, rules) if control is not None else parents["base"]
    slots = {who: parent.source.slots for who, parent in parents.items()}
    choice = choose(slots, include, exclude, heads)
    if heads == "refuse":
        _check_robots(parents, choice)
    job = Extraction(parents, choice, DTYPES[dtype], _low_rank(parents, form), rules)
    plan = job.plan(Path(output))
    if plan.is_done(META, force):
        return Delta(output)
    with filling(plan, force) as part:
        job.low = SparseWriter(part, {name: "F32" for name in job.dense})
        digests = write_tensors(plan, part, job, cores(threads), "extracting")
        job.low.write(LOW)
        write_summary(part, META, describe(job, part, digests) | {"identity": plan.seal()})
    return Delta(output)


def _check_robots(parents: dict[str, Parent], choice: Choice) -> None:
    """Padded heads have one shape for every robot, but mean something else on each."""
    head = next((name for name, group in choice.chosen.items() if group == "head"), None)
    robots = {who: embodiment(parent.path) for who, parent in parents.items()}
    for who, robot in robots.items():
        if head is not None and same_robot(robot, robots["base"]) is False:
            raise BurnishError(f"head '{head}' in a difference across robots: {who} {parents[who].path} declares "
                               f"another state or action than the base", "a rule for heads", "--heads skip or keep"
                               )  # fmt: skip


def _low_rank(parents: dict[str, Parent], form: str) -> bool:
    adapters = [parents["tuned"].adapter, parents["control"].adapter]
    possible = adapters[0] is not None and all(a is None or a.low_rank for a in adapters)
    possible = possible and (adapters[1] is not None or parents["control"] is parents["base"])
    if form == "lowrank" and not possible:
        raise BurnishError("these parents have no low-rank difference", "plain LoRA adapters of the base (no DoRA, no "
                           "fully trained modules)", "--form dense")  # fmt: skip
    return possible and form != "dense"


class Extraction:
    """The engine's maker: computes pieces of the delta and gathers digests and norms on the way."""

    def __init__(
        self, parents: dict[str, Parent], choice: Choice, dtype: str, low_rank: bool, rules: list[tuple[str, str]]
    ):
        self.parents, self.choice, self.dtype, self.rules = parents, choice, dtype, rules
        self.base, self.tuned, self.control = (parents[w].source for w in ("base", "tuned", "control"))
        self.three = self.control is not self.base  # a control of its own, not the base
        self.inputs = {
            who: Inputs(who, p.source.slots, None) for who, p in parents.items()
            if isinstance(p.source, Stored) and (who != "control" or self.three)
        }  # fmt: skip
        self.factors: dict[str, tuple[np.ndarray, float]] = {}
        self.lowrank: dict[str, dict[str, Any]] = {}
        if low_rank:
            self._take_factors()
            if not self.lowrank:
                raise BurnishError("the adapter changes none of the chosen tensors", "at least one",
                                   "other --include and --exclude patterns")  # fmt: skip
        self.tied = {} if low_rank else self._find_tied()
        self.dense = [] if low_rank else [name for name in choice.chosen if name not in self.tied]
        self.sums: dict[str, dict[str, dict[str, float]]] = {}
        self.low: SparseWriter

    def _take_factors(self) -> None:
        adapters = [(1.0, self.parents["tuned"].adapter), (-1.0, self.parents["control"].adapter)]
        for sign, adapter in adapters:
            for name, update in (adapter.updates if adapter is not None else {}).items():
                if name not in self.choice.chosen:
                    continue
                entry = self.lowrank.setdefault(name, {"scales": [], "transposed": update.transposed})
                for side, matrix in (("up", update.up), ("down", update.down)):
                    self.factors[f"{name}::{len(entry['scales'])}.{side}"] = matrix
                entry["scales"].append(sign * update.scale)

    def _find_tied(self) -> dict[str, str]:
        """Matrices that are bit for bit the same in each parent (tied weights stored twice): alias to owner.

        Raises:
            BurnishError: the patterns let only one of two tied matrices take part.
        """
        groups: dict[tuple, list[str]] = {}
        if not all(isinstance(source, Stored) for source in (self.tuned, self.control)):
            return {}
        everywhere = set(self.base.slots) & set(self.tuned.slots) & set(self.control.slots)
        for name in sorted(everywhere):
            if len(self.base.slots[name][1]) >= 2:
                groups.setdefault(self.base.slots[name], []).append(name)
        tied: dict[str, str] = {}
        candidates = [g for g in groups.values() if any(_ties_names(a, b) for a in g for b in g if a != b)]
        for group in candidates:
            if not any(name in self.choice.chosen for name in group):
                continue
            owners: dict[tuple, str] = {}
            for name in sorted(group):
                if not any(_ties_names(name, other) for other in group if other != name):
                    continue
                key = tuple(tensor_digest(s.checkpoint, s.names[name]) for s in (self.base, self.tuned, self.control))
                owner = owners.setdefault(key, name)
                if owner == name:
                    continue
                if (owner in self.choice.chosen) != (name in self.choice.chosen):
                    raise BurnishError(f"'{owner}' and '{name}' are tied, but only one takes part in the delta",
                                       "both or none", "--include and --exclude that fit both")  # fmt: skip
                if name in self.choice.chosen:
                    tied[name] = owner
        return tied

    def plan(self, output: Path) -> Plan:
        """One file with the dense tensors or the factors."""
        slots = {name: (self.dtype, self.tuned.slots[name][1]) for name in self.dense}
        slots |= {part: ("F64" if _needs_double(m) else "F32", m.shape) for part, m in self.factors.items()}
        identity = {
            "parents": {w: stamp(p.path) for w, p in self.parents.items()}, "tensors": sorted(slots),
            "dtype": self.dtype, "rename": self.rules, "version": __version__,
        }  # fmt: skip
        inputs = [parent.path for parent in self.parents.values()]
        return Plan(output, {NUMBERS: (slots, {"format": "pt"})}, identity, inputs=inputs)

    def piece(self, worker: Worker, name: str, start: int, stop: int) -> np.ndarray:
        if name in self.factors:
            matrix = np.ascontiguousarray(self.factors[name]).reshape(-1)[start:stop]
            return matrix if _needs_double(self.factors[name]) else matrix.astype(np.float32)
        for who, inputs in self.inputs.items():
            if name in inputs.shapes:
                inputs.piece(name, start, self.parents[who].source.raw(name, start, stop))
        out, sums = worker.out(self.dtype, stop - start), dict.fromkeys(SUMS, 0.0)
        for at in range(start, stop, BLOCK):
            self._block(worker, name, at, min(at + BLOCK, stop), out[at - start :], sums)
        self.sums.setdefault(name, {})[str(start)] = sums
        return out

    def _block(self, worker: Worker, name: str, at: int, end: int, out: np.ndarray, sums: dict[str, float]) -> None:
        size, narrow = end - at, worker.narrow
        tuned = self.tuned.fill(name, at, end, worker.double(0, size), narrow)
        control = self.control.fill(name, at, end, worker.double(1, size), narrow)
        delta = difference(tuned, control, worker.double(2, size))
        narrow.widen(narrow.narrow(delta, self.dtype, out[:size]), self.dtype, delta)
        self._leftover(worker, name, at, tuned, control, delta, sums)
        sums["delta"] += dot(delta, delta)
        sums["tuned"] += dot(tuned, tuned)
        sums["control"] += dot(control, control)
        if self.three and name in self.base.slots:
            base = self.base.fill(name, at, end, worker.double(3, size), narrow)
            np.subtract(control, base, out=control)
            np.subtract(tuned, base, out=tuned)
            sums["control_task"] += dot(control, control)
            sums["tuned_task"] += dot(tuned, tuned)
            sums["tasks_dot"] += dot(control, tuned)
            sums["delta_dot"] += dot(control, delta)

    def _leftover(
        self, worker: Worker, name: str, at: int, tuned: np.ndarray, control: np.ndarray, delta: np.ndarray,
        sums: dict[str, float],
    ) -> None:  # fmt: skip
        """Keep what the stored number lacks wherever control + delta does not round to the tuned model."""
        dtype = self.tuned.slots[name][0]
        reached = np.add(control, delta, out=worker.double(3, tuned.size))
        wanted = worker.narrow.narrow(tuned, dtype, worker.spare(0, dtype, tuned.size))
        got = worker.narrow.narrow(reached, dtype, worker.spare(1, dtype, tuned.size))
        wrong = np.flatnonzero(unequal(wanted, got))
        # Nothing that is added to 0.0 gives -0.0.
        signs = (tuned[wrong] == 0) & (reached[wrong] == 0)
        sums["not_exact"] += float(signs.sum())
        wrong = wrong[~signs]
        if not wrong.size:
            return
        if self.dtype in ("F32", "F64"):
            low = (tuned[wrong] - reached[wrong]).astype(np.float32)
            self.low.add(name, at, wrong + at, low)
            reached = control[wrong] + (delta[wrong] + low)
            got = worker.narrow.narrow(reached, dtype, worker.spare(1, dtype, wrong.size))
            sums["not_exact"] += float(unequal(got, wanted[wrong]).sum())
        else:
            sums["not_exact"] += float(wrong.size)

    def release(self, name: str, start: int, stop: int) -> None:
        for parent in self.parents.values():
            if name in parent.source.slots:
                parent.source.release(name, start, stop)

    def finished(self, name: str) -> dict[str, Any]:
        if name in self.factors:
            return {}
        inputs = {who: i.finish(name) for who, i in self.inputs.items() if name in i.shapes}
        return {"inputs": inputs, "sums": self.sums[name], "low": self.low.facts(name)}

    def restore(self, name: str, facts: dict[str, Any]) -> None:
        for who, digest in facts.get("inputs", {}).items():
            self.inputs[who].digests[name] = digest
        if facts:
            self.sums[name] = facts["sums"]
            self.low.restore(name, facts["low"])


def _ties_names(a: str, b: str) -> bool:
    """Only an output layer and an embedding are ever tied; equal zeros elsewhere are not."""
    return {"lm_head" in a, "lm_head" in b} == {True, False} and ("embed" in a or "embed" in b or "wte" in a + b)


def _needs_double(matrix: np.ndarray) -> bool:
    return bool((matrix != matrix.astype(np.float32)).any())


def stamp(path: Path) -> list:
    """Place, names, sizes and times of a parent's files: whether a killed run may be continued."""
    files = [path] if path.is_file() else sorted([*path.rglob("*.safetensors"), *path.glob(ADAPTER_CONFIG)])
    times = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return [str(path.resolve()), *times]
