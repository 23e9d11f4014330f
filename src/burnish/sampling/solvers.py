"""Samplers of flow-matching policies: ways to integrate dx/dt = v(x, t) from noise (t = 1) to data (t = 0).

    solver = make_solver("ab2:4")
    actions = solver(velocity, noise)      # velocity(x [B, T, A], t: float) -> [B, T, A], noise minus data

A sampler is named "name:passes" or "name:passes:power": so many calls of `velocity`, on the grid
t_k = (1 - k/N)^power of its N steps. Whatever keeps a velocity for a later step is the same sampler on a coarser grid:
there is no other way to save passes than fewer of them. Nothing here knows a model; all are functions of arguments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, log
from typing import Any

from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.registry import Registry

Velocity = Callable[[Tensor, float], Tensor]
"""v(points, t), of the shape of the points; called once for each pass, in the order of the passes."""
Correct = Callable[[Tensor, Tensor, float], Tensor]
"""correct(points, direction, t): the direction that a step takes instead; called right after the step's one pass."""
MOST_PASSES = 1000


@dataclass(frozen=True)
class Step:
    """One step of an integration.

    Args:
        time: flow time where it begins.
        length: of the step, above 0.
        end: flow time where it ends.
        before: flow time where the step before it began; None in the first.
    """

    time: float
    length: float
    end: float
    before: float | None


Direction = tuple[Tensor, Any]
"""What points move along during a step (x <- x - length * direction), and what the next step may look at."""


@dataclass(frozen=True)
class Scheme:
    """A way to choose directions.

    Args:
        direction: (velocity, points, step, kept) to a Direction; `kept` is that of the step before, None in the first.
        passes: calls of `velocity` in a step.
        spared: of those, how many the last step does without, because it would ask at t = 0, which no training has.
    """

    direction: Callable[[Velocity, Tensor, Step, Any], Direction]
    passes: int = 1
    spared: int = 0


SAMPLERS: Registry[Scheme] = Registry("sampler", room="burnish.sampling")
"""Schemes by name; those of outside packages by entry points `burnish.samplers`."""


def euler(velocity: Velocity, points: Tensor, step: Step, kept: None) -> Direction:
    """Order 1: the velocity where the step begins."""
    return velocity(points, step.time), None


def heun(velocity: Velocity, points: Tensor, step: Step, kept: None) -> Direction:
    """Order 2: the mean of the velocities at both ends; the last step, which would ask at t = 0, is Euler's."""
    first = velocity(points, step.time)
    if step.end == 0:
        return first, None
    return (first + velocity(points - step.length * first, step.end)) / 2, None


def midpoint(velocity: Velocity, points: Tensor, step: Step, kept: None) -> Direction:
    """Order 2: the velocity half-way."""
    half = step.length / 2
    return velocity(points - half * velocity(points, step.time), step.time - half), None


def ab2(velocity: Velocity, points: Tensor, step: Step, kept: Tensor | None) -> Direction:
    """Order 2 with one pass a step: Adams-Bashforth for steps of varying length; the first step is Euler's.

    (1 + w) v_k - w v_(k-1) with w = h_k / (2 h_(k-1)): the line through the last two velocities, half a step ahead.
    """
    found = velocity(points, step.time)
    if kept is None or step.before is None:
        return found, found
    w = step.length / (2 * (step.before - step.time))
    return (1 + w) * found - w * kept, found


def dpm2m(velocity: Velocity, points: Tensor, step: Step, kept: Tensor | None) -> Direction:
    """DPM-Solver++(2M) (Lu et al., 2211.01095, algorithm 2) on x0 = x - t v, with alpha = 1 - t, sigma = t.

    It extrapolates x0 linearly in lambda = log((1 - t) / t), which has no limit at either end: first and last step are
    of order 1.
    """
    guess = points - step.time * velocity(points, step.time)
    ahead = _lambda(step.end) - _lambda(step.time)
    behind = inf if step.before is None else _lambda(step.time) - _lambda(step.before)
    clean = guess
    if kept is not None and isfinite(ahead) and isfinite(behind):
        w = ahead / (2 * behind)
        clean = (1 + w) * guess - w * kept
    return (points - clean) / step.time, guess


def _lambda(time: float) -> float:
    return -inf if time >= 1 else inf if time <= 0 else log((1 - time) / time)


SAMPLERS.register("euler")(Scheme(euler))
SAMPLERS.register("heun")(Scheme(heun, passes=2, spared=1))
SAMPLERS.register("midpoint")(Scheme(midpoint, passes=2))
SAMPLERS.register("ab2")(Scheme(ab2))
SAMPLERS.register("dpm2m")(Scheme(dpm2m))


@dataclass(frozen=True)
class Solver:
    """A scheme on a grid; use `make_solver`.

    Attributes:
        name: "name:passes" or "name:passes:power".
        scheme: how directions are chosen.
        steps: of the grid, in order.
        passes: calls of the velocity.
    """

    name: str
    scheme: Scheme
    steps: tuple[Step, ...]
    passes: int

    def __call__(self, velocity: Velocity, noise: Tensor, correct: Correct | None = None) -> Tensor:
        """Data from `noise`, of its shape.

        Args:
            velocity: the field; the solver keeps what it returns until the end of the next step, so it must not
                write into that again before then.
            noise: the points at t = 1; not written into.
            correct: changes the direction of each step, after whatever the scheme extrapolates: a pull that is no
                smooth function of time stays out of the extrapolation.

        Raises:
            BurnishError: `correct` with a scheme of several passes a step, which have no one pass to correct.
        """
        if correct is not None and self.scheme.passes > 1:
            raise BurnishError(f"guidance inside the sampler {self.name}", "one of a single pass a step", "ab2:4")
        points, kept = noise, None
        for step in self.steps:
            direction, kept = self.scheme.direction(velocity, points, step, kept)
            if correct is not None:
                direction = correct(points, direction, step.time)
            points = points - step.length * direction
        return points


def make_solver(sampler: str) -> Solver:
    """The solver of a text `sampler`, "name:passes" or "name:passes:power".

    "euler:N" is LeRobot's own loop with N steps, bit for bit.

    Raises:
        BurnishError: an unknown name, a number of passes that the scheme cannot have, or a power out of range.
    """
    name, colon, rest = sampler.partition(":")
    scheme = SAMPLERS.get(name)
    count, _, exponent = rest.partition(":")
    if not colon or not (count.isascii() and count.isdecimal()) or len(count) > 4 or not 1 <= int(count) <= MOST_PASSES:
        raise BurnishError(f"sampler '{sampler[:100]}'", f"name:passes with 1 to {MOST_PASSES} passes", f"{name}:4")
    passes = int(count)
    steps, left = divmod(passes + scheme.spared, scheme.passes)
    if left:
        found, fits = f"sampler {name} in {passes} passes", passes + scheme.passes - left
        raise BurnishError(found, f"{scheme.passes} passes a step, {scheme.spared} fewer in the last", f"{name}:{fits}")
    return Solver(sampler, scheme, grid(steps, _power(exponent, sampler)), passes)


def grid(count: int, power: float = 1.0) -> tuple[Step, ...]:
    """`count` steps between the times (1 - k/count)^power; with power 1 in the very numbers of LeRobot's loop."""
    if power == 1:
        times = [1.0 + k * (-1.0 / count) for k in range(count)] + [0.0]
        lengths = [1.0 / count] * count
    else:
        times = [(1 - k / count) ** power for k in range(count)] + [0.0]
        lengths = [time - end for time, end in zip(times, times[1:], strict=False)]
    befores = [None, *times]
    return tuple(Step(times[k], lengths[k], times[k + 1], befores[k]) for k in range(count))


def _power(text: str, sampler: str) -> float:
    try:
        power = float(text or 1)
    except ValueError:
        power = 0.0
    if not 0.1 <= power <= 10:
        fix = ":".join([*sampler[:100].split(":")[:2], "1.5"])
        raise BurnishError(f"the power of sampler '{sampler[:100]}'", "a number from 0.1 to 10", fix)
    return power
