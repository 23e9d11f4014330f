"""Merge operators: functions of a block of the base and of each task vector, found by name.

One that needs figures of the whole tensor (an angle, a threshold) names a `prepare` function, which sees the tensor as
a stream of blocks and is called before the first block. A new operator is one file in this folder, or one entry point
of the group `burnish.merge_operators`, with a decorated function; its keyword-only arguments become
`--option name=value` of `burnish weights merge`:

    @operator("half")
    def half(block: Block, *, share: float = 0.5) -> np.ndarray:
        return block.base + share * sum(block.deltas)
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.registry import Registry
from burnish.core.seeding import derive_seed
from burnish.weights.rounding import dot

_DRAWN = 1 << 15
"""Elements of one seed in `dare`."""


@dataclass
class Block:
    """One block of one tensor. The arrays are scratch space: an operator may overwrite them.

    Attributes:
        name: the tensor, as the first vector calls it: tied tensors have one name.
        start: position of the block in the flattened tensor; the same for any number of threads.
        base: float64 [n].
        deltas: float64 [n] each.
        weights: one for each delta, factors of modules included.
        shares: the same without those factors.
        total: sum of the weights of all vectors of the merge, whether they change this tensor or not.
        state: what `prepare` returned for this tensor.
    """

    name: str
    start: int
    base: np.ndarray
    deltas: list[np.ndarray]
    weights: list[float]
    shares: list[float]
    total: float
    state: Any = None


@dataclass(frozen=True)
class Streams:
    """A whole tensor for `prepare`: `base()` and `deltas[i]()` give its blocks one after the other."""

    base: Callable[[], Iterator[np.ndarray]]
    deltas: Sequence[Callable[[], Iterator[np.ndarray]]]
    weights: list[float]
    size: int


@dataclass(frozen=True)
class Operator:
    """A registered operator: `apply(block, **options)` gives the merged block, float64 [n]."""

    apply: Callable[..., np.ndarray]
    prepare: Callable[..., Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def read_options(self, given: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Values, or text of them, as the types of the defaults; unknown names and unreadable values are errors."""
        values = dict(self.options)
        for key, value in given.items():
            text = str(value)
            if key not in values:
                known = ", ".join(values) or "none"
                raise BurnishError(f"merge operator '{name}' has no option '{key}'", f"one of {known}")
            try:
                kind = type(values[key])
                values[key] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
                if not math.isfinite(values[key]):
                    raise ValueError(text)
            except (ValueError, KeyError) as error:
                raise BurnishError(f"option {key} is '{text}'", f"a value such as {self.options[key]}") from error
        return values


OPERATORS: Registry[Operator] = Registry("merge operator", room="burnish.weights")


def operator(name: str, prepare: Callable[..., Any] | None = None) -> Callable[[Callable[..., np.ndarray]], Operator]:
    """Decorator that makes a function an operator and files it under `name`.

    Its keyword-only arguments are the operator's options. `prepare(streams, **options)`, where given, sees a whole
    tensor first; what it returns is `Block.state`.
    """

    def add(apply: Callable[..., np.ndarray]) -> Operator:
        parameters = inspect.signature(apply).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return OPERATORS.register(name)(Operator(apply, prepare, options))

    return add


def _add_weighted(block: Block, weights: list[float]) -> np.ndarray:
    """base + weight * delta, each delta in turn."""
    for delta, weight in zip(block.deltas, weights, strict=True):
        np.multiply(delta, weight, out=delta)
        np.add(block.base, delta, out=block.base)
    return block.base


@operator("task")
def task(block: Block) -> np.ndarray:
    """Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089): base + sum of weight * delta."""
    return _add_weighted(block, block.weights)


@operator("linear")
def linear(block: Block) -> np.ndarray:
    """Average of the models base + delta with the weights of all deltas scaled to sum 1.

    Raises:
        BurnishError: weights that sum to 0.
    """
    if block.total == 0:
        raise BurnishError("the weights of a linear merge sum to 0", "a sum that can be scaled to 1")
    return _add_weighted(block, [weight / block.total for weight in block.weights])


def _slerp_angle(streams: Streams) -> tuple[float, float]:
    """(angle between base and base + delta, its sine); angle 0 where they are parallel or one is zero."""
    if len(streams.deltas) != 1:
        raise BurnishError(f"slerp with {len(streams.deltas)} deltas", "exactly one")
    inner = first = second = 0.0
    for base, delta in zip(streams.base(), streams.deltas[0](), strict=True):
        delta += base
        inner += dot(base, delta)
        first += dot(base, base)
        second += dot(delta, delta)
    cosine = inner / np.sqrt(first * second) if first > 0 and second > 0 else 1.0
    angle = float(np.arccos(np.clip(cosine, -1.0, 1.0)))
    return (angle, float(np.sin(angle))) if abs(cosine) < 0.9995 else (0.0, 0.0)


@operator("slerp", prepare=_slerp_angle)
def slerp(block: Block) -> np.ndarray:
    """Spherical interpolation from base (weight 0) to base + delta (weight 1); straight where nearly parallel."""
    angle, sine = block.state
    (delta,), (weight,) = block.deltas, block.weights
    if sine == 0.0:
        return _add_weighted(block, block.weights)
    other = delta + block.base
    return block.base * (np.sin((1 - weight) * angle) / sine) + other * (np.sin(weight * angle) / sine)


def _ties_thresholds(streams: Streams, *, density: float = 0.2, **_: Any) -> list[float]:
    if not 0 < density <= 1:
        raise BurnishError(f"density is {density}", "above 0 and at most 1")
    if streams.size == 0:
        return [0.0] * len(streams.deltas)
    keep = max(1, round(density * streams.size))
    return [kth_largest(delta, keep) for delta in streams.deltas]


def kth_largest(stream: Callable[[], Iterator[np.ndarray]], k: int) -> float:
    """The k-th largest magnitude (1 is the largest) of a stream, as float32, found in two passes of 65,536 bins.

    The bits of non-negative floats are ordered as the floats are, so their upper and lower halves can be counted.
    """
    counts = np.zeros(1 << 16, np.int64)
    for block in stream():
        counts += np.bincount(_bits(block) >> 16, minlength=1 << 16)
    above = counts[::-1].cumsum()[::-1]  # how many have this upper half or a larger one
    upper = int(np.flatnonzero(above >= k)[-1])
    k -= int(above[upper] - counts[upper])
    counts[:] = 0
    for block in stream():
        bits = _bits(block)
        counts += np.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=1 << 16)
    lower = int(np.flatnonzero(counts[::-1].cumsum()[::-1] >= k)[-1])
    return float(np.array(upper << 16 | lower, np.uint32).view(np.float32))


def _bits(block: np.ndarray) -> np.ndarray:
    return np.abs(block).astype(np.float32).view(np.uint32)


@operator("ties", prepare=_ties_thresholds)
def ties(block: Block, *, density: float = 0.2, normalize: bool = True, scale: float = 1.0) -> np.ndarray:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): trim each delta, elect signs, merge those that agree.

    Keeps the `density` largest magnitudes of each tensor; the sign is that of the weighted sum. `normalize` divides by
    the weights that agree, so that a single delta's weight cancels; `scale` is the paper's lambda.
    """
    for delta, threshold in zip(block.deltas, block.state, strict=True):
        delta[np.abs(delta).astype(np.float32) < np.float32(threshold)] = 0.0
    weighted = np.stack([delta * weight for delta, weight in zip(block.deltas, block.weights, strict=True)])
    agrees = np.sign(weighted) == np.sign(weighted.sum(0))
    agrees &= weighted != 0
    merged = (weighted * agrees).sum(0)
    if normalize:
        share = (np.abs(np.array(block.shares))[:, None] * agrees).sum(0)
        np.divide(merged, share, out=merged, where=share > 0)
    return block.base + scale * merged


@operator("dare")
def dare(block: Block, *, drop: float = 0.9, seed: int = 0, rescale: bool = True) -> np.ndarray:
    """DARE (Yu et al. 2024, arXiv:2311.03099): drop elements at random, scale the rest by 1 / (1 - drop), add.

    The draw depends on seed, tensor, delta and position alone, so the result does not depend on threads or shards.
    `rescale` false leaves the rest as it is.

    Raises:
        BurnishError: a `drop` outside [0, 1).
    """
    if not 0 <= drop < 1:
        raise BurnishError(f"drop is {drop}", "at least 0 and below 1")
    for k, delta in enumerate(block.deltas):
        for at in range(0, delta.size, _DRAWN):
            part = delta[at : at + _DRAWN]
            draws = np.random.default_rng(derive_seed(seed, block.name, k, block.start + at)).random(part.size)
            part *= (draws >= drop) / ((1 - drop) if rescale else 1.0)
    return _add_weighted(block, block.weights)
