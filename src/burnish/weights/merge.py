"""Merging: a base plus weighted task vectors, written as a checkpoint of the base's form."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from burnish import __version__
from burnish.core.errors import BurnishError
from burnish.core.options import check_value
from burnish.core.reading import regular_file
from burnish.weights.delta import Delta, Difference
from burnish.weights.match import Change, Changes, Vector, match, recorded_base
from burnish.weights.names import Heads
from burnish.weights.operators import OPERATORS, Block, Streams
from burnish.weights.rounding import TOO_LARGE, Buffers, healthy, refuse_odd, round_to, widen, widened
from burnish.weights.sources import INDEX, Checkpoint, locate
from burnish.weights.tensorfile import BLOCK, DTYPES, FLOATS, Digests, TensorInfo, whole_digest
from burnish.weights.writer import Plan, cores, output_folder, read_summary, write_summary, write_tensors

RECORD = "capability.json"
OutputDtype = Literal["auto", "base", "fp64", "fp32", "bf16", "fp16"]
_QUICK_LOOK = 16
_OTHER_WEIGHTS = ("model*.safetensors", "consolidated*", "pytorch_model*", "tf_model*", "flax_model*", "*.gguf")


def merge(
    base: Path | str, deltas: Sequence[tuple[Path | str, float]] = (), *, output: Path | str,
    tuned: Sequence[tuple[Path | str, float]] = (), operator: str = "task",
    options: Mapping[str, Any] | None = None, modules: Sequence[tuple[str, float]] = (), include: Sequence[str] = (),
    exclude: Sequence[str] = (), heads: Heads = "refuse", dtype: OutputDtype = "auto", other_base: bool = False,
    threads: int = 0, force: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write base + deltas to the folder `output`; returns what was recorded in its capability.json.

    Args:
        base: checkpoint folder, safetensors file, or the name of a shipped base.
        deltas: (delta folder, weight) each.
        output: folder to write; it appears when it is whole.
        tuned: (checkpoint or adapter, weight) each: its difference to the base, computed on the fly and not kept.
        operator: name of a merge operator.
        options: the operator's own.
        modules: (pattern, factor): the first that is found in a tensor's name multiplies the weights there.
        include: patterns over tensor names; what none of them matches stays as in the base.
        exclude: patterns over tensor names; what one of them matches stays as in the base.
        heads: in a merge across robots: refuse, skip or keep the action and state heads.
        dtype: auto (as wide as base and tuned model), base, or fp64, fp32, bf16, fp16. Untouched tensors keep theirs.
        other_base: allow a base that is not the one the deltas were extracted from.
        threads: 0 means one for each core.
        force: replace an existing `output`.

    Raises:
        BurnishError: another base, tensors or shapes that do not fit, heads without a rule, a damaged file, no room.
    """
    check_value(heads, {"choices": get_args(Heads)}, "--heads")
    check_value(dtype, {"choices": get_args(OutputDtype)}, "--dtype")
    root = Checkpoint(locate(base))
    vectors = [Vector(Delta(path), weight) for path, weight in deltas]
    vectors += [Vector(Difference(root, path, heads, include, exclude), weight) for path, weight in tuned]
    expected = {} if other_base else recorded_base(root, vectors)
    changes = match(root, vectors, modules, include, exclude, heads, other_base)
    job = _Merge(root, vectors, changes, operator, options or {}, dtype)
    asked = {"modules": [list(module) for module in modules], "include": list(include), "exclude": list(exclude)}
    plan = job.plan(Path(output), asked)
    if not force and plan.is_done():
        return read_summary(plan.target / RECORD, "an untouched folder")
    job.look_at_base(expected)
    with output_folder(plan, force) as folder:
        digests = write_tensors(plan, folder, job.compute, cores(threads), "merging")
        job.check_inputs(expected)
        _update_configs(folder, plan, root)
        record = job.record(digests, asked) | {"identity": plan.seal}
        write_summary(folder, RECORD, record)
    return record


class _Merge:
    """Computes blocks of the merged checkpoint, and gathers the digests of what it reads on the way."""

    def __init__(
        self, base: Checkpoint, vectors: Sequence[Vector], changes: Changes, operator: str, options: Mapping[str, Any],
        dtype: str,
    ):  # fmt: skip
        self.base, self.vectors, self.changes, self.operator, self.dtype = base, vectors, changes, operator, dtype
        self.how = OPERATORS.get(operator)
        self.options = self.how.read_options(options, operator)
        self.tensors = {name: TensorInfo(self._dtype(name), info.shape) for name, info in base.tensors.items()}
        self.base_read = Digests()
        self.read = [Digests() for _ in vectors]
        self._buffers, self._stored = Buffers(), Buffers()
        self._states: dict[str, Any] = {}

    def _dtype(self, name: str) -> str:
        """Of an output: the base's where nothing is added, otherwise as `dtype` says."""
        own = self.base.tensors[name].dtype
        if name not in self.changes or self.dtype == "base":
            return own
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        kinds = {own, *(change.vector.source.tensors[change.name]["dtype"] for change in self.changes[name])}
        return "F32" if kinds == {"F16", "BF16"} else next(kind for kind in FLOATS if kind in kinds)

    def plan(self, output: Path, asked: Mapping[str, Any]) -> Plan:
        """The base's files with the base's names in the base's order."""
        files = {
            self.base.place(file): ({name: self.tensors[name] for name in file.tensors}, file.metadata)
            for file in self.base.files
        }
        identity = {
            "base": self.base.stamp, "version": __version__, "dtype": self.dtype, "operator": self.operator,
            "options": self.options, "parts": [[_identity(v.source), v.weight] for v in self.vectors],
            "modules": asked["modules"], "changed": sorted(self.changes),
        }  # fmt: skip
        inputs = [self.base.path, *(vector.source.path for vector in self.vectors)]
        return Plan(output, files, identity, RECORD, "merged checkpoint", _companions(self.base), inputs)

    def compute(self, name: str, start: int, stop: int) -> np.ndarray:
        """Stored bits of elements start:stop of the merged tensor; the thread's next call may overwrite them."""
        bits = self.base.read(name, start, stop, self._stored(0, stop - start))
        self.base_read.add(name, start, bits)
        if name not in self.changes:
            _refuse_nan(name, self.base, bits)
            return bits
        info, base = self.tensors[name], widen(bits, self.base.tensors[name].dtype, self._buffers(0, stop - start))
        out = self._stored(1, stop - start).view(info.stored)[: stop - start]
        if not round_to(self._apply(name, start, stop, base, self.read), info.dtype, out):
            round_to(self._look_closer(name, start, stop), info.dtype, out)
        return out

    def _apply(self, name: str, start: int, stop: int, base: np.ndarray, read: Sequence[Digests] | None) -> np.ndarray:
        """The merged block. With `read` the digests are taken, and infinities of a mask give NaN; without neither."""
        changes = self.changes[name]
        deltas = [
            _values(
                change, start, stop, self._buffers(k + 1, stop - start), base, read[change.number] if read else None
            )
            for k, change in enumerate(changes)
        ]
        block = make_block(changes, self.vectors, start, base, deltas)
        block.state = self._state(name)
        with np.errstate(invalid="ignore", over="ignore"):  # found and named by what looks at the result
            return self.how.apply(block, **self.options)

    def _look_closer(self, name: str, start: int, stop: int) -> np.ndarray:
        """A block with numbers that are not finite or too large: named and refused, unless they are a mask's."""
        base, dtype = self.base.values(name, start, stop, np.empty(stop - start)), self.tensors[name].dtype
        values = {self.base.path: base}
        for change in self.changes[name]:
            source, out = change.vector.source, np.empty(stop - start)
            if isinstance(source, Difference):
                values[source.path] = source.tuned.values(change.name, start, stop, out)
            else:
                source.healthy_values(change.name, start, stop, out)
        refuse_odd(name, values)
        merged = self._apply(name, start, stop, base.copy(), None)
        largest = np.abs(merged[~np.isinf(base) | (merged != base)]).max(initial=0.0)
        if not largest < TOO_LARGE[dtype]:
            raise BurnishError(f"'{name}' reaches {largest:.4g}, too large for {dtype}",
                               f"less than {TOO_LARGE[dtype]:.5g}",
                               "--dtype fp32" if dtype == "F16" else "a smaller weight")  # fmt: skip
        return merged

    def _state(self, name: str) -> Any:
        if self.how.prepare is not None and name not in self._states:
            # Two threads may both compute it; they get the same.
            streams = make_streams(self.base, name, self.changes[name])
            self._states[name] = self.how.prepare(streams, **self.options)
        return self._states.get(name)

    def look_at_base(self, expected: Mapping[str, str]) -> None:
        """Hash a few small tensors, so that another base is refused before anything is written."""
        for name in sorted(self.changes, key=lambda name: self.base.tensors[name].size)[:_QUICK_LOOK]:
            self._check_base(name, self.base.digest(name), expected)

    def check_inputs(self, expected: Mapping[str, str]) -> None:
        """Refuse a base or a delta that is not what was recorded; all of it was read by now."""
        for name, info in self.base.tensors.items():
            self._check_base(name, self.base_read.of(name, info), expected)
        for vector, read in zip(self.vectors, self.read, strict=True):
            if isinstance(vector.source, Delta):
                for name in read:
                    vector.source.check(name, read.of(name, vector.source.numbers.tensors[name]))

    def _check_base(self, name: str, digest: str, expected: Mapping[str, str]) -> None:
        if digest != expected.get(name, digest):
            raise BurnishError(f"the base {self.base.path} is not the one that was recorded: '{name}' has digest "
                               f"{digest}", expected[name], "the very files that the delta was made for, or "
                               "--other-base")  # fmt: skip

    def record(self, digests: Mapping[str, str], asked: Mapping[str, Any]) -> dict[str, Any]:
        """capability.json of the merged folder."""
        base_digests = {name: self.base_read.of(name, info) for name, info in self.base.tensors.items()}
        return {
            "kind": "merge", "burnish": __version__,
            "base": {"path": str(self.base.path.absolute()), "digest": whole_digest(base_digests)},
            "deltas": [{"path": str(v.source.path.absolute()), "digest": self._digest(v, read), "weight": v.weight,
                        "stored": isinstance(v.source, Delta)}
                       for v, read in zip(self.vectors, self.read, strict=True)],
            "operator": self.operator, "options": self.options, **asked, "digest": whole_digest(digests),
            "tensors": {
                name: {"digest": digest, "weights": [[c.number, c.name, c.weight] for c in self.changes.get(name, [])]}
                for name, digest in digests.items()
            },
        }  # fmt: skip

    @staticmethod
    def _digest(vector: Vector, read: Digests) -> str:
        if isinstance(vector.source, Delta):
            return vector.source.digest
        return whole_digest({name: read.of(name, vector.source.tuned.tensors[name]) for name in read})


def _values(
    change: Change, start: int, stop: int, out: np.ndarray, base: np.ndarray, digests: Digests | None
) -> np.ndarray:
    """A vector's block, float64; `base` is the base's, which an on-the-fly difference needs."""
    source, digests, quick = change.vector.source, digests if change.first else None, digests is not None
    if isinstance(source, Difference):
        return source.values(change.name, start, stop, out, digests, base, quick)
    return source.values(change.name, start, stop, out, digests)


def make_block(
    changes: Sequence[Change], vectors: Sequence[Vector], start: int, base: np.ndarray, deltas: list[np.ndarray]
) -> Block:
    """What an operator gets."""
    weights, shares = [change.weight for change in changes], [change.vector.weight for change in changes]
    total = sum(vector.weight for vector in vectors)
    return Block(changes[0].name, start, base, deltas, weights, shares, total)


def make_streams(base: Checkpoint, name: str, changes: Sequence[Change]) -> Streams:
    """What an operator's `prepare` gets: base and vectors of one tensor as float64 blocks, one after the other."""
    size = base.tensors[name].size

    def blocks(values: Any, path: Path | None = None) -> Iterator[np.ndarray]:
        out = np.empty(BLOCK)
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            found = values(start, stop, out[: stop - start])
            if path is not None and not healthy(found):  # an operator that trims or votes would swallow it
                raise BurnishError(f"'{name}' in {path} or the base holds numbers that are not finite",
                                   "healthy weights")  # fmt: skip
            yield found

    sources = [(change.vector.source, change.name) for change in changes]
    deltas = [partial(blocks, partial(source.values, own), source.path) for source, own in sources]
    return Streams(partial(blocks, partial(base.values, name)), deltas, [change.weight for change in changes], size)


def _refuse_nan(name: str, base: Checkpoint, bits: np.ndarray) -> None:
    """Raise BurnishError for a block of the base, copied as it is, that holds NaN."""
    dtype = base.tensors[name].dtype
    half = dtype == "BF16" and (bits & 0x7FFF).max(initial=0) > 0x7F80
    if half or (dtype in FLOATS and dtype != "BF16" and np.isnan(bits).any()):
        refuse_odd(name, {base.path: widened(bits, dtype)})


def _identity(source: Delta | Difference) -> Any:
    """What fixes a vector: its digest, or for one that is computed on the fly the files it comes from."""
    return source.digest if isinstance(source, Delta) else source.tuned.stamp


def _companions(checkpoint: Checkpoint) -> dict[str, Path]:
    """Config, processors, tokenizer: every other file of the base's folder.

    Left out: training state, hidden files, and other copies of the weights, which would be loaded as if they were new.

    Raises:
        BurnishError: a pipe, a device, a pointer of Git LFS, a link that leads out of the folder, to one or nowhere.
    """
    root = checkpoint.path
    if not root.is_dir():
        return {}
    weights = {checkpoint.place(file) for file in checkpoint.files}
    patterns = _OTHER_WEIGHTS if checkpoint.index is not None else (*_OTHER_WEIGHTS, INDEX)
    found = {}
    for file in sorted(root.rglob("*")):
        inside = file.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts)
        others = len(inside.parts) == 1 and any(inside.match(pattern) for pattern in patterns)
        training = inside.parts[0] in ("burnish", "checkpoints", RECORD)
        if hidden or others or training or inside.as_posix() in weights or (file.is_dir() and not file.is_symlink()):
            continue
        found[inside.as_posix()] = regular_file(file, root)
    return found


def _update_configs(folder: Path, plan: Plan, base: Checkpoint) -> None:
    """Bring the copied index and configs up to date: sizes, and absolute paths that point into the base's folder."""
    if base.index is not None:
        metadata = {**base.index["metadata"], "total_size": sum(info.nbytes for info in plan.tensors.values())}
        (folder / INDEX).write_text(json.dumps({**base.index, "metadata": metadata}, indent=2))
    old, new = (json.dumps(f"{path.absolute()}/")[1:-1].encode() for path in (base.path, plan.target))
    for config in folder.glob("*.json"):
        content = config.read_bytes()
        if old in content:
            config.write_bytes(content.replace(old, new))
