"""Which tensors of a base a merge changes, and whether task vectors and base belong together."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.reading import search
from burnish.weights.delta import Delta, Difference
from burnish.weights.names import Heads, check_patterns, embodiment, match_names, same_robot, selected
from burnish.weights.sources import Checkpoint
from burnish.weights.tensorfile import FLOATS


@dataclass(frozen=True)
class Vector:
    """One task vector of a merge: a stored delta or an on-the-fly difference, with its weight."""

    source: Delta | Difference
    weight: float


@dataclass(frozen=True)
class Change:
    """What one task vector does to one tensor of the base.

    Attributes:
        number: of the vector in the merge.
        name: the tensor in the vector.
        weight: the vector's, times its module's factor; never 0.
        first: whether no earlier tensor of the base (they may be tied) reads the same one.
    """

    number: int
    vector: Vector
    name: str
    weight: float
    first: bool


Changes = dict[str, list[Change]]
"""Tensor of the base to what changes it."""


def recorded_base(base: Checkpoint, vectors: Sequence[Vector]) -> dict[str, str]:
    """Digest that each tensor of the base must have, from the deltas; refuses a base with other tensors."""
    expected: dict[str, str] = {}
    for delta in (vector.source for vector in vectors if isinstance(vector.source, Delta)):
        recorded = delta.meta["base"]
        names = match_names(recorded["tensors"], base.tensors)
        own = {names[name]: digest for name, digest in recorded["tensors"].items()}
        if any(expected.get(name, digest) != digest for name, digest in own.items()):
            raise BurnishError(f"{delta.path} was made for another base than the deltas before it",
                               "deltas of one base", "--other-base")  # fmt: skip
        expected |= own
        lacking, extra = sorted(set(own) - set(base.tensors)), sorted(set(base.tensors) - set(own))
        if lacking or extra:
            what = f"lacks '{lacking[0]}'" if lacking else f"has the extra tensor '{extra[0]}'"
            raise BurnishError(f"{base.path} is another base than that of {delta.path}: it {what}", recorded["path"],
                               "--other-base")  # fmt: skip
    return expected


def match(
    base: Checkpoint, vectors: Sequence[Vector], modules: Sequence[tuple[str, float]], include: Sequence[str],
    exclude: Sequence[str], heads: Heads, other_base: bool,
) -> Changes:  # fmt: skip
    """Apply the rules about names, shapes and heads; raises BurnishError where one is broken. See `merge.merge`."""
    _check_arguments(base, vectors, modules, include, exclude)
    changes: Changes = {}
    for number, vector in enumerate(vectors):
        source = vector.source
        same = same_robot(embodiment(base.path), source.meta["embodiment"])
        across = same is False or (same is None and other_base)
        for own, names in _names_in_base(source, base).items():
            factor = next((f for pattern, f in modules if any(search(pattern, n, "--module") for n in names)), 1.0)
            # Tied tensors go together: one that is wanted takes the others along, one that is excluded keeps them.
            wanted = any(selected(n, include, ()) for n in names) and all(selected(n, (), exclude) for n in names)
            head = source.tensors[own]["group"] == "head" and across
            if vector.weight * factor == 0 or not wanted or (head and heads == "skip"):
                continue
            for k, name in enumerate(names):
                if head and heads == "refuse":
                    raise BurnishError(f"head '{name}' in a merge across robots", "a rule for heads",
                                       "--heads skip, or --heads keep where the shapes agree")  # fmt: skip
                _check_tensor(base, name, source, source.tensors[own])
                changes.setdefault(name, []).append(Change(number, vector, own, vector.weight * factor, k == 0))
    return changes


def _names_in_base(source: Delta | Difference, base: Checkpoint) -> dict[str, list[str]]:
    """Tensor of a vector to the base's tensors that it changes, several where they are tied."""
    owners = {**{name: name for name in source.tensors}, **source.meta["tied"]}
    found: dict[str, list[str]] = {}
    for name, in_base in match_names(owners, base.tensors).items():
        found.setdefault(owners[name], []).append(in_base)
    return found


def _check_arguments(
    base: Checkpoint, vectors: Sequence[Vector], modules: Sequence[tuple[str, float]], include: Sequence[str],
    exclude: Sequence[str],
) -> None:  # fmt: skip
    if not vectors:
        raise BurnishError("nothing to merge", "a delta or a tuned model", "--delta FOLDER=1.0")
    for vector in vectors:
        if not math.isfinite(vector.weight):
            raise BurnishError(f"{vector.source.path} has the weight {vector.weight}", "a finite number")
    if not all(math.isfinite(factor) for _, factor in modules):
        raise BurnishError("a --module factor that is not finite", "a number, for instance 0.5")
    known = set(base.tensors)
    check_patterns([pattern for pattern, _ in modules], known, "--module")
    known.update(*(v.source.tuned.tensors for v in vectors if isinstance(v.source, Difference)))
    check_patterns(include, known, "--include")
    check_patterns(exclude, known, "--exclude")


def _check_tensor(base: Checkpoint, name: str, source: Delta | Difference, entry: Mapping[str, Any]) -> None:
    if name not in base.tensors:
        raise BurnishError(f"{source.path} changes '{name}', which the base lacks", "the base it was made for",
                           f"--exclude '{re.escape(name)}'")  # fmt: skip
    dtype, shape = base.tensors[name]
    if list(shape) != entry["shape"]:
        raise BurnishError(f"'{name}' has shape {list(shape)} in the base and {entry['shape']} in {source.path}",
                           "one architecture")  # fmt: skip
    if dtype not in FLOATS:
        raise BurnishError(f"'{name}' of the base is {dtype}", "floating-point weights", "an unquantised base")
