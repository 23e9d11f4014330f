"""Which tensors of a base a merge changes, and whether deltas and base belong together."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from burnish.core.errors import BurnishError
from burnish.weights.delta import Delta
from burnish.weights.difference import Difference
from burnish.weights.names import check_patterns, embodiment, match_names, same_robot, selected
from burnish.weights.sources import Stored
from burnish.weights.tensorfile import FLOATS


@dataclass(frozen=True)
class Part:
    """One delta of a merge with its weight, and the names of the base's tensors it changes."""

    delta: Delta | Difference
    weight: float
    names: Mapping[str, str]

    @classmethod
    def match(cls, delta: Delta | Difference, weight: float, base: Stored) -> "Part":
        """Find the base's name for every tensor of the delta, aliases of tied ones included.

        Raises:
            BurnishError: a weight that is not finite.
        """
        if not math.isfinite(weight):
            raise BurnishError(f"{delta.path} has the weight {weight}", "a finite number")
        wanted = {**{name: name for name in delta.tensors}, **delta.meta["tied"]}
        found = match_names(wanted, base.slots)
        return cls(delta, weight, {found[name]: owner for name, owner in wanted.items()})

    @cached_property
    def tied(self) -> dict[str, list[str]]:
        """Tensor of the delta to the base's tensors that share it, which must go together."""
        found: dict[str, list[str]] = {}
        for name, own in self.names.items():
            found.setdefault(own, []).append(name)
        return found


Touched = dict[str, list[tuple[Part, float]]]
"""Base tensor to the deltas that change it, each with its weight there; none of weight 0."""


def recorded_base(base: Stored, parts: Sequence[Part]) -> dict[str, str]:
    """Digest that each tensor of the base must have, from the deltas; refuses a base with other tensors."""
    expected: dict[str, str] = {}
    for part in parts:
        if isinstance(part.delta, Difference):
            continue
        listed = part.delta.meta["base"]["tensors"]
        names = match_names(listed, base.slots)
        own = {names[name]: digest for name, digest in listed.items()}
        if any(expected.get(name, digest) != digest for name, digest in own.items()):
            raise BurnishError(f"{part.delta.path} was made for another base than the deltas before it",
                               "deltas of one base", "--other-base")  # fmt: skip
        expected |= own
        lacking, extra = sorted(set(names.values()) - set(base.slots)), sorted(set(base.slots) - set(names.values()))
        if lacking or extra:
            what = f"lacks '{lacking[0]}'" if lacking else f"has the extra tensor '{extra[0]}'"
            found = f"{base.checkpoint.path} is another base than that of {part.delta.path}: it {what}"
            raise BurnishError(found, part.delta.meta["base"]["path"], "--other-base")
    return expected


def fit(
    base: Stored, parts: Sequence[Part], modules: Sequence[tuple[str, float]], include: Sequence[str],
    exclude: Sequence[str], heads: str, other_base: bool,
) -> Touched:  # fmt: skip
    """Apply the rules about names, shapes and heads; raises BurnishError where one is broken. See `merge.merge`."""
    known = set(base.slots).union(*(p.delta.known for p in parts if isinstance(p.delta, Difference)))
    check_patterns(include, known, "--include")
    check_patterns(exclude, known, "--exclude")
    touched = Touched()
    for part in parts:
        same = same_robot(embodiment(base.checkpoint.path), part.delta.meta["embodiment"])
        across = same is False or (same is None and other_base)
        for name, own in part.names.items():
            tied = part.tied[own]
            factor = next((f for pattern, f in modules if any(re.search(pattern, n) for n in tied)), 1.0)
            wanted = any(selected(n, include, ()) for n in tied) and all(selected(n, (), exclude) for n in tied)
            if part.weight * factor == 0 or not wanted:
                continue
            entry = part.delta.tensors[own]
            if entry["group"] == "head" and across:
                if heads == "skip":
                    continue
                if heads == "refuse":
                    raise BurnishError(f"head '{name}' in a merge across robots", "a rule for heads",
                                       "--heads skip, or --heads keep where the shapes agree")  # fmt: skip
            _check_tensor(base, name, part, entry)
            touched.setdefault(name, []).append((part, part.weight * factor))
    return touched


def _check_tensor(base: Stored, name: str, part: Part, entry: Mapping[str, Any]) -> None:
    if name not in base.slots:
        raise BurnishError(f"{part.delta.path} changes '{name}', which the base lacks", "the base it was made for",
                           f"--exclude '{re.escape(name)}'")  # fmt: skip
    dtype, shape = base.slots[name]
    if list(shape) != entry["shape"]:
        raise BurnishError(f"'{name}' has shape {list(shape)} in the base and {entry['shape']} in {part.delta.path}",
                           "one architecture")  # fmt: skip
    if dtype not in FLOATS:
        raise BurnishError(f"'{name}' of the base is {dtype}", "floating-point weights", "an unquantised base")
