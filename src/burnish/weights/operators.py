"""Merge operators: small functions over streams of tensors, registered by name.

An operator gets one block (float64, at most BLOCK elements) of the base and of each delta and overwrites the base's
block with the result. One that needs figures of the whole tensor (an angle, a threshold) names a `prepare` function,
which sees the tensor as a stream of such blocks and is called once for each tensor. Adding an operator is writing the
function: keyword-only arguments become `--option name=value` of `burnish capability merge`.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.registry import Registry
from burnish.core.seeding import derive_seed
from burnish.weights.rounding import dot


@dataclass
class Block:
    """One block of one tensor.

    Attributes:
        name: the tensor, as the first delta calls it: tied tensors have one name.
        start: position of the block in the flattened tensor; the same for any number of threads.
        base: float64 [n]; the operator overwrites it.
        deltas: float64 [n] each; may be overwritten too.
        weights: one for each delta, factors of modules included.
        shares: the same without those factors.
        total: sum of the weights of all deltas of the merge, whether they change this tensor or not.
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
    deltas: list[Callable[[], Iterator[np.ndarray]]]
    weights: list[float]
    size: int


@dataclass(frozen=True)
class Operator:
    """A registered operator with its options (name to default)."""

    apply: Callable[..., None]
    prepare: Callable[..., Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def read_options(self, given: dict[str, str], name: str) -> dict[str, Any]:
        """Text values as the types of the defaults; unknown names and unreadable values are errors."""
        values = dict(self.options)
        for key, text in given.items():
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


OPERATORS: Registry[Operator] = Registry("merge operator")


def operator(name: str, prepare: Callable[..., Any] | None = None) -> Callable:
    """Decorator that files a function as an operator."""

    def add(apply: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(apply).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        OPERATORS.register(name)(Operator(apply, prepare, options))
        return apply

    return add


def add_weighted(block: Block) -> None:
    """base += weight * delta, each delta in turn; leaves weight * delta in `block.deltas`."""
    for delta, weight in zip(block.deltas, block.weights, strict=True):
        np.multiply(delta, weight, out=delta)
        np.add(block.base, delta, out=block.base)


@operator("task")
def task(block: Block) -> None:
    """Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089): base + sum of weight * delta."""
    add_weighted(block)


@operator("linear")
def linear(block: Block) -> None:
    """Average of the models base + delta with the weights of all deltas scaled to sum 1."""
    if block.total == 0:
        raise BurnishError("the weights of a linear merge sum to 0", "a sum that can be scaled to 1")
    block.weights = [weight / block.total for weight in block.weights]
    add_weighted(block)


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
def slerp(block: Block) -> None:
    """Spherical interpolation from base (weight 0) to base + delta (weight 1); straight where nearly parallel."""
    angle, sine = block.state
    (delta,), (weight,) = block.deltas, block.weights
    if sine == 0.0:
        add_weighted(block)
        return
    delta += block.base
    np.multiply(block.base, np.sin((1 - weight) * angle) / sine, out=block.base)
    np.multiply(delta, np.sin(weight * angle) / sine, out=delta)
    np.add(block.base, delta, out=block.base)


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
def ties(block: Block, *, density: float = 0.2, normalize: bool = True, scale: float = 1.0) -> None:
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
    block.base += scale * merged


@operator("dare")
def dare(block: Block, *, drop: float = 0.9, seed: int = 0, rescale: bool = True) -> None:
    """DARE (Yu et al. 2024, arXiv:2311.03099): drop elements at random, scale the rest by 1 / (1 - drop), add.

    The draw depends on seed, tensor, delta and position alone, so the result does not depend on threads or shards.
    """
    if not 0 <= drop < 1:
        raise BurnishError(f"drop is {drop}", "at least 0 and below 1")
    for k, delta in enumerate(block.deltas):
        draws = np.random.default_rng(derive_seed(seed, block.name, k, block.start)).random(delta.size)
        delta *= (draws >= drop) / ((1 - drop) if rescale else 1.0)
    add_weighted(block)
