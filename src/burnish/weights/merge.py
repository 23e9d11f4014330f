"""`burnish capability merge`: a base plus weighted deltas, as a checkpoint of the base's form."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish import __version__
from burnish.core.errors import BurnishError
from burnish.weights.delta import Delta
from burnish.weights.difference import Difference
from burnish.weights.engine import Inputs, Plan, Worker, cores, filling, read_summary, write_summary, write_tensors
from burnish.weights.extract import DTYPES, locate, stamp
from burnish.weights.match import Part, Touched, fit, recorded_base
from burnish.weights.names import check_patterns
from burnish.weights.operators import OPERATORS, Block, Streams
from burnish.weights.rounding import Narrow
from burnish.weights.sources import Stored
from burnish.weights.sparse import SparseWriter
from burnish.weights.tensorfile import BLOCK, FLOATS, INDEX, UNDO, Checkpoint, TensorFile, tensor_digest, whole_digest

RECORD = "capability.json"
UNDONE = ("task", "linear")
"""Operators that `unmerge` can take back."""
_QUICK_LOOK = 16
_TOO_LARGE_FOR_F16 = 65520
_OTHER_WEIGHTS = ("model*.safetensors", "consolidated*", "pytorch_model*", "tf_model*", "flax_model*", "*.gguf")


def merge(
    base: Path | str, deltas: Sequence[tuple[Path | str, float]] = (), *, output: Path | str,
    tuned: Sequence[tuple[Path | str, float]] = (), operator: str = "task",
    options: Mapping[str, str] | None = None, modules: Sequence[tuple[str, float]] = (), include: Sequence[str] = (),
    exclude: Sequence[str] = (), heads: str = "refuse", dtype: str = "auto", other_base: bool = False,
    undoable: bool = False, threads: int = 0, force: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write base + deltas to the folder `output`; returns what was recorded in its capability.json.

    Args:
        base: checkpoint folder, safetensors file, or the name of a shipped base.
        deltas: (delta folder, weight) each.
        tuned: (checkpoint or adapter, weight) each: its difference to the base, computed on the way and not kept.
        operator: name of a merge operator; `options` are its own.
        modules: (pattern, factor): the first that is found in a tensor's name multiplies the weights there.
        include, exclude: patterns over tensor names; what they leave out stays as in the base.
        heads: in a merge across robots: refuse, skip or keep the action and state heads.
        dtype: auto (as wide as base and tuned model), base, or fp64, fp32, bf16, fp16. Untouched tensors keep theirs.
        other_base: allow a base that is not the one the deltas were extracted from.
        undoable: also keep what rounding loses, so that `unmerge` gives the base to the last bit.
        threads: 0 means one for each core.
        force: replace an existing `output`.

    Raises:
        BurnishError: another base, tensors or shapes that do not fit, heads without a rule, a damaged file, no room, an
            `undoable` merge that `unmerge` could not take back.
    """
    if undoable and (operator not in UNDONE or tuned):
        raise BurnishError(f"an undoable merge {'of tuned models' if tuned else f'by {operator}'}",
                           f"deltas and {' or '.join(UNDONE)}, which can be taken back")  # fmt: skip
    root = Stored(Checkpoint(locate(base)))
    parts = [Part.match(Delta(path), weight, root) for path, weight in deltas]
    parts += [Part.match(Difference(root, path, heads, include, exclude), weight, root) for path, weight in tuned]
    if not parts:
        raise BurnishError("nothing to merge", "a delta or a tuned model", "--delta FOLDER=1.0")
    expected = {} if other_base else recorded_base(root, parts)
    check_patterns([pattern for pattern, _ in modules], root.slots, "--module")
    if not all(math.isfinite(factor) for _, factor in modules):
        raise BurnishError("a --module factor that is not finite", "a number, for instance 0.5")
    touched = fit(root, parts, modules, include, exclude, heads, other_base)
    job = Merging(root, parts, touched, operator, options or {}, dtype, expected)
    job.modules = [list(module) for module in modules]
    job.choice = {"include": list(include), "exclude": list(exclude)}
    plan = job.plan(Path(output), undoable)
    if plan.is_done(RECORD, force):
        return read_summary(plan.target / RECORD, "an untouched folder")
    with filling(plan, force) as part:
        job.undo = SparseWriter(part, {n: root.slots[n][0] for n in job.touched}) if undoable else None
        digests = write_tensors(plan, part, job, cores(threads), "merging", apart=not undoable)
        if job.undo is not None:
            job.undo.write(UNDO)
        finish_folder(part, Path(output), root.checkpoint)
        record = job.record(digests, undoable) | {"identity": plan.seal()}
        write_summary(part, RECORD, record)
    return record


class Merging:
    """The engine's maker: computes pieces of the merged checkpoint and checks what it reads."""

    def __init__(
        self, base: Stored, parts: list[Part], touched: Touched, operator: str, options: Mapping[str, str],
        dtype: str, expected: Mapping[str, str],
    ):  # fmt: skip
        self.base, self.parts, self.touched, self.operator, self.dtype = base, parts, touched, operator, dtype
        self.how = OPERATORS.get(operator)
        self.options = self.how.read_options(dict(options), operator)
        self.modules: list[list[Any]] = []
        self.choice: dict[str, list[str]] = {}
        self.undo: SparseWriter | None = None
        self._total = sum(part.weight for part in parts)
        self._states: dict[str, Any] = {}
        self._readers: dict[tuple[int, str], str] = {}
        self.read = {id(p): Inputs(str(p.delta.path), _stored_slots(p.delta), None) for p in self.parts}
        fix = "the very files that the delta was made for, or --other-base"
        self.inputs = Inputs(f"the base {base.checkpoint.path}", base.slots, expected, fix)
        # A few small tensors are hashed now, so that another base is refused at once and not after minutes.
        for name in sorted(touched, key=lambda n: np.prod(base.slots[n][1]))[:_QUICK_LOOK]:
            self.inputs.check(name, tensor_digest(base.checkpoint, base.names[name]))

    def plan(self, output: Path, undoable: bool) -> Plan:
        """The base's files with the base's names in the base's order."""
        files = {}
        for file in self.base.checkpoint.files:
            slots = {name: (self.out_dtype(name), slot.shape) for name, slot in file.slots.items()}
            files[self.base.checkpoint.place(file)] = (slots, file.metadata)
        identity = {
            "base": str(self.base.checkpoint.path.absolute()), "stamp": stamp(self.base.checkpoint.path),
            "undoable": undoable, "version": __version__, "dtype": self.dtype,
            "parts": [[_identity(p.delta), p.weight] for p in self.parts], "operator": self.operator,
            "options": self.options, "modules": self.modules, "touched": sorted(self.touched),
        }  # fmt: skip
        inputs = [self.base.checkpoint.path, *(part.delta.path for part in self.parts)]
        return Plan(output, files, identity, companions(self.base.checkpoint), inputs)

    def out_dtype(self, name: str) -> str:
        """dtype of an output: the base's where nothing is added, otherwise as `dtype` says."""
        own = self.base.slots[name][0]
        if name not in self.touched or self.dtype == "base":
            return own
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        kinds = {own, *(part.delta.tensors[part.names[name]]["dtype"] for part, _ in self.touched[name])}
        return "F32" if kinds == {"F16", "BF16"} else next(kind for kind in FLOATS if kind in kinds)

    def piece(self, worker: Worker, name: str, start: int, stop: int) -> np.ndarray:
        raw = self.base.raw(name, start, stop)
        self.inputs.piece(name, start, raw)
        if name not in self.touched:
            return raw
        self._hash_deltas(name, start, stop)
        dtype = self.out_dtype(name)
        out, state = worker.out(dtype, stop - start), self._state(name)
        for at in range(start, stop, BLOCK):
            end = min(at + BLOCK, stop)
            block = self.block(worker, name, at, end)
            block.state = state
            self.how.apply(block, **self.options)
            if dtype == "F16":
                _check_range(name, block.base)
            bits = worker.narrow.narrow(block.base, dtype, out[at - start : end - start])
            if self.undo is not None:
                self._keep_lost(worker, name, at, block, bits, raw[at - start : end - start])
        return out

    def _hash_deltas(self, name: str, start: int, stop: int) -> None:
        for part, _ in self.touched[name]:
            owner = part.names[name]
            if owner in self.read[id(part)].shapes and name == self._reader(part, owner):
                self.read[id(part)].piece(owner, start, part.delta.raw(owner, start, stop))

    def _reader(self, part: Part, owner: str) -> str:
        """Of several base tensors that share one delta, the one whose turn checks its digest."""
        if (id(part), owner) not in self._readers:
            names = (n for n, own in part.names.items() if own == owner and n in self.touched)
            self._readers[id(part), owner] = next(names)
        return self._readers[id(part), owner]

    def block(self, worker: Worker, name: str, at: int, end: int) -> Block:
        """Base and deltas of one block as float64."""
        base = self.base.fill(name, at, end, worker.double(0, end - at), worker.narrow)
        used = self.touched[name]
        deltas = []
        for k, (part, _) in enumerate(used):
            own, out = part.names[name], worker.double(k + 1, end - at)
            if isinstance(part.delta, Difference):
                deltas.append(part.delta.fill_from(base, own, at, out, worker.narrow))
            else:
                deltas.append(part.delta.fill(own, at, end, out, worker.narrow))
        return named_block([(p.names[name], w, p.weight) for p, w in used], self._total, at, base, deltas)

    def _state(self, name: str) -> Any:
        if self.how.prepare is None:
            return None
        if name not in self._states:  # two threads may both compute it; they get the same
            used, size = self.touched[name], int(np.prod(self.base.slots[name][1]))
            deltas = [stream(part.delta.fill, part.names[name], size) for part, _ in used]
            streams = Streams(stream(self.base.fill, name, size), deltas, [w for _, w in used], size)
            self._states[name] = self.how.prepare(streams, **self.options)
        return self._states[name]

    def _keep_lost(self, worker: Worker, name: str, at: int, block: Block, bits: np.ndarray, raw: np.ndarray) -> None:
        back = take_away(worker, bits, self.out_dtype(name), block.deltas, self.base.slots[name][0])
        lost = np.flatnonzero(back != raw)
        self.undo.add(name, at, lost + at, raw[lost])

    def release(self, name: str, start: int, stop: int) -> None:
        self.base.release(name, start, stop)
        for part, _ in self.touched.get(name, []):
            part.delta.release(part.names[name], start, stop)

    def finished(self, name: str) -> dict[str, Any]:
        read: list[list[Any]] = []
        for part, _ in self.touched.get(name, []):
            owner = part.names[name]
            if owner in self.read[id(part)].shapes and name == self._reader(part, owner):
                digest = self.read[id(part)].finish(owner)
                read.append([self.parts.index(part), owner, digest])
                if isinstance(part.delta, Delta):
                    part.delta.check(owner, digest)
        self._states.pop(name, None)
        facts: dict[str, Any] = {"base": self.inputs.finish(name), "read": read}
        return facts | ({"undo": self.undo.facts(name)} if self.undo is not None else {})

    def restore(self, name: str, facts: dict[str, Any]) -> None:
        self.inputs.digests[name] = facts["base"]
        for k, owner, digest in facts["read"]:
            self.read[id(self.parts[k])].digests[owner] = digest
        if self.undo is not None:
            self.undo.restore(name, facts["undo"])

    def record(self, digests: dict[str, str], undoable: bool) -> dict[str, Any]:
        """capability.json of the merged folder."""
        base = self.base.checkpoint.path
        return {
            "kind": "merge", "burnish": __version__,
            "base": {"path": str(base.absolute()), "digest": whole_digest(self.inputs.digests)},
            "deltas": [{"path": str(p.delta.path.absolute()), "digest": self._digest(p), "weight": p.weight,
                        "stored": isinstance(p.delta, Delta)} for p in self.parts],
            "operator": self.operator, "options": self.options, "modules": self.modules, **self.choice,
            "digest": whole_digest(digests), "undoable": undoable,
            "tensors": {name: {"digest": digests[name], "base_digest": self.inputs.digests[name],
                               "base_dtype": self.base.slots[name][0], "weights": self._weights(name)}
                        for name in self.base.slots},
        }  # fmt: skip

    def _digest(self, part: Part) -> str:
        return part.delta.digest if isinstance(part.delta, Delta) else whole_digest(self.read[id(part)].digests)

    def _weights(self, name: str) -> list[list[Any]]:
        """[number of the delta, name in it, weight] of every delta that changes `name`."""
        return [[self.parts.index(part), part.names[name], weight] for part, weight in self.touched.get(name, [])]


def named_block(
    used: list[tuple[str, float, float]], total: float, at: int, base: np.ndarray, deltas: list[np.ndarray]
) -> Block:
    """What an operator gets; `used`: name in the delta, weight, and that without its module's factor, of each delta."""
    return Block(used[0][0], at, base, deltas, [w for _, w, _ in used], [own for _, _, own in used], total)


def _check_range(name: str, value: np.ndarray) -> None:
    largest = np.abs(value).max(initial=0.0)
    if np.isfinite(largest) and largest >= _TOO_LARGE_FOR_F16:
        raise BurnishError(f"'{name}' reaches {largest:.4g}, too large for F16", "less than 65520", "--dtype fp32")


def _identity(delta: Delta | Difference) -> Any:
    """What fixes a delta: its digest, or for one that is computed on the way the files it comes from."""
    return stamp(delta.path) if isinstance(delta, Difference) else delta.digest


def take_away(worker: Worker, bits: np.ndarray, dtype: str, added: list[np.ndarray], base_dtype: str) -> np.ndarray:
    """Stored bits of merged - added (weights times deltas, float64), rounded to the base's dtype."""
    value = worker.narrow.widen(bits, dtype, worker.double(len(added) + 1, bits.size))
    for delta in added:
        np.subtract(value, delta, out=value)
    return worker.narrow.narrow(value, base_dtype, worker.spare(0, base_dtype, bits.size))


def _stored_slots(delta: Delta | Difference) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a delta whose bits are hashed as they are read."""
    if isinstance(delta, Difference):
        return {n: delta.tuned.slots[n] for n in delta.tensors} if isinstance(delta.tuned, Stored) else {}
    dense = [name for name, entry in delta.tensors.items() if entry["form"] == "dense"]
    return {name: (delta.numbers.slots[name].dtype, delta.numbers.slots[name].shape) for name in dense}


def stream(fill: Any, name: str, size: int) -> Any:
    """A function that gives the float64 blocks of one tensor, one after the other, in a buffer of its own."""

    def blocks() -> Iterator[np.ndarray]:
        out, scratch = np.empty(BLOCK), Narrow()
        for at in range(0, size, BLOCK):
            end = min(at + BLOCK, size)
            yield fill(name, at, end, out[: end - at], scratch)

    return blocks


def companions(checkpoint: Checkpoint) -> dict[str, Path]:
    """Config, processors, tokenizer: every other file of the base's folder.

    Left out: training state, hidden files, and other copies of the weights, which would be loaded as if they were new.
    """
    if checkpoint.path.is_file():
        return {}
    weights = {checkpoint.place(file) for file in checkpoint.files}
    skip = {"burnish", "checkpoints", RECORD, UNDO}
    patterns = _OTHER_WEIGHTS if checkpoint.index is not None else (*_OTHER_WEIGHTS, INDEX)
    found = {}
    for file in sorted(checkpoint.path.rglob("*")):
        inside = file.relative_to(checkpoint.path)
        hidden = any(part.startswith(".") for part in inside.parts)
        others = len(inside.parts) == 1 and any(inside.match(pattern) for pattern in patterns)
        if hidden or others or inside.parts[0] in skip or inside.as_posix() in weights:
            continue
        if file.is_file():
            found[inside.as_posix()] = file
    return found


def finish_folder(part: Path, target: Path, checkpoint: Checkpoint) -> None:
    """Bring the copied index and configs up to date: sizes, and absolute paths that point into the base's folder."""
    if checkpoint.index is not None:
        files = [TensorFile(part / checkpoint.place(file)) for file in checkpoint.files]
        total = sum(slot.nbytes for file in files for slot in file.slots.values())
        metadata = {**checkpoint.index["metadata"], "total_size": total}
        (part / INDEX).write_text(json.dumps({**checkpoint.index, "metadata": metadata}, indent=2))
    old, new = (f"{path.absolute()}/".encode() for path in (checkpoint.path, target))
    for file in part.glob("*.json"):
        content = file.read_bytes()
        if old in content:
            file.write_bytes(content.replace(old, new))
