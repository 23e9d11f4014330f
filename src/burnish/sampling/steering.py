"""Real-time chunking as mathematics: a new chunk that goes on from what the robot is executing while it is computed.

Flow time t runs from 1 (noise) to 0 (data), v = noise - data, and the field's guess of the data is x0(x) = x - t v(x).
A `Steering` names the old chunk's rest Y, row 0 for the present control step; the first `delay` rows of it will have
been executed when the new chunk is there and are *committed*; rows up to `end` pull with falling weights. Nothing here
names a model: a `Guide` needs velocities and hands velocities back, whatever integrates them.

Sources: Black, Galliker, Levine, "Real-Time Execution of Action Chunking Flow Policies" (2506.07339), equations 2 to 5
(whose time runs the other way); prior variance as in Pokle et al. (2310.04432) for data of standard deviation sigma.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.errors import BurnishError

MODES = ("guided", "inpaint", "trained")
SCHEDULES = ("exp", "linear", "hard")
JACOBIANS = ("auto", "vjp", "identity")
Field = Callable[[Tensor], Tensor]
"""Points [B, T, A_model] of one flow time to their velocities."""


@dataclass(frozen=True)
class Steering:
    """What a new chunk goes on from.

    Args:
        previous: Y [B, n, A_model] in the model's space, what the robot goes on doing, the present step's row first;
            n <= T, and rows that do not exist are left out, never filled up.
        delay: rows that are committed, one number or long [B]; a sample without any has 0 and an `end` of 0.
        end: rows that pull at all, delay <= end <= n; None means n. One number or long [B].
        mode: "guided" pulls the guess x0 towards Y; "inpaint" moves the committed rows on their straight line and lets
            the others see them; "trained" shows them clean at time 0, to a policy that was trained so.
        schedule: how weights fall between `delay` and `end`, see `weights`.
        jacobian: of x0, see `Guide`; "auto" leaves it to the policy.
        clip: greatest strength of the pull; None means the number of steps, so that the first step moves a chunk by at
            most its whole error.
        sigma: standard deviation of the data, one number or [A_model]; the paper has 1.

    Raises:
        BurnishError: rows that do not fit together, or an unknown name.
    """

    previous: Tensor
    delay: int | Tensor
    end: int | Tensor | None = None
    mode: Literal["guided", "inpaint", "trained"] = "guided"
    schedule: Literal["exp", "linear", "hard"] = "exp"
    jacobian: Literal["auto", "vjp", "identity"] = "auto"
    clip: float | None = None
    sigma: float | Tensor = 1.0
    rows: tuple[Tensor, Tensor] = field(init=False, repr=False)
    """`delay` and `end` of each sample, long [B] on the CPU."""

    def __post_init__(self) -> None:
        known = {"mode": MODES, "schedule": SCHEDULES, "jacobian": JACOBIANS}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise BurnishError(f"steering with {name} {getattr(self, name)!r}", f"one of {', '.join(choices)}")
        if self.clip is not None and not self.clip > 0:
            raise BurnishError(f"steering with clip {self.clip}", "a number above 0")
        if self.previous.ndim != 3:
            raise BurnishError(f"steering by rows of shape {tuple(self.previous.shape)}", "[B, n, A_model]")
        size, count = self.previous.shape[:2]
        delay = torch.as_tensor(self.delay, dtype=torch.long).cpu().expand(size)
        end = torch.as_tensor(count if self.end is None else self.end, dtype=torch.long).cpu().expand(size)
        if bool(((delay < 0) | (delay > end) | (end > count)).any()):
            found = f"a delay of {_span(delay)} and an end of {_span(end)} with {count} rows to go on from"
            raise BurnishError(found, "0 <= delay <= end <= rows")
        object.__setattr__(self, "rows", (delay, end))


def _span(values: Tensor) -> str:
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    return str(low) if low == high else f"{low} to {high}"


def weights(delay: Tensor, end: Tensor, length: int, schedule: str = "exp") -> Tensor:
    """How strongly each row is held to Y, float32 [B, length]: 1 below `delay`, 0 from `end` on.

    Between them c = (end - i) / (end - delay + 1) for "linear", c (e^c - 1) / (e - 1) for "exp" (the paper's equation
    5) and 0 for "hard".

    Args:
        delay, end: long [B].
    """
    row, last = torch.arange(length, device=delay.device), end[:, None]
    first = torch.minimum(delay, end)[:, None]
    soft = ((last - row) / (last - first + 1)).clamp(0, 1)
    if schedule == "exp":
        soft = soft * torch.expm1(soft) / (math.e - 1)
    between = torch.zeros_like(soft) if schedule == "hard" else soft
    return torch.where(row < first, 1.0, torch.where(row < last, between, 0.0))


def strength(time: Tensor | float, clip: float, sigma: Tensor | float = 1.0) -> Tensor | float:
    """lambda(t) = min(clip, ((1 - t)^2 sigma^2 + t^2) / (sigma^2 t (1 - t))), of the shape that its arguments give.

    Without the clip it has no limit at either end, and its least value 2 / sigma at t = 1 / (1 + 1/sigma).
    """
    above, below = (1 - time) ** 2 * sigma**2 + time**2, sigma**2 * time * (1 - time)
    if isinstance(below, Tensor):
        return (above / below).clamp(max=clip)
    return min(clip, above / below) if below > 0 else clip  # numbers: a step's ten small kernels would be felt


class Guide:
    """A steering, ready for one integration.

    Args:
        steering: with a jacobian that is decided.
        noise: [B, T, A_model] where the integration starts.
        steps: of the integration.
        width: dimensions that are real; those behind it are padding, never pulled, and 0 in committed rows as in data.

    `field` sees points of the shape of `noise`. With "vjp" the pull is J^T W (Y - x0), J the Jacobian of x0, which
    needs a pass backwards; with "identity" it is W (Y - x0), for networks whose rows see no later row: there J^T cannot
    move any row behind the last that pulls.
    """

    def __init__(self, steering: Steering, noise: Tensor, steps: int, width: int | None = None):
        T, count = noise.shape[1], steering.previous.shape[1]
        if count > T or steering.previous.shape[::2] != noise.shape[::2]:
            found = f"steering by rows of shape {tuple(steering.previous.shape)}"
            raise BurnishError(found, f"at most {tuple(noise.shape)}, the chunk's")
        if steering.jacobian == "auto":
            raise BurnishError("a guide with jacobian 'auto'", "vjp or identity")
        self.differentiates = steering.mode == "guided" and steering.jacobian == "vjp"
        if self.differentiates and torch.is_inference_mode_enabled():
            raise BurnishError("a pass backwards inside torch.inference_mode", "torch.no_grad, or jacobian 'identity'")
        self.mode, self.noise = steering.mode, noise
        self.clip = float(steps if steering.clip is None else steering.clip)
        sigma = steering.sigma
        self.sigma = sigma.to(noise) if isinstance(sigma, Tensor) else sigma
        delay, end = (rows.to(noise.device) for rows in steering.rows)
        self.weight = weights(delay, end, T, steering.schedule).to(noise.dtype)[..., None].repeat(1, 1, noise.shape[2])
        self.target = F.pad(steering.previous.to(noise), (0, 0, 0, T - count)).clone()
        if width is not None:
            self.weight[..., width:] = self.target[..., width:] = 0
        self.target.masked_fill_(self.weight == 0, 0)  # what stood there, NaN even, is to count nothing
        self.committed = (torch.arange(T, device=noise.device) < delay[:, None])[..., None]

    def split_up(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        """Its tensors, and the rest of it (which has a hash where sigma is a number), for `restored`."""
        given = [self.noise, self.weight, self.target, self.committed]
        return given, (self.mode, self.differentiates, self.clip, self.sigma)

    @classmethod
    def restored(cls, tensors: Sequence[Tensor], rest: tuple[Any, ...]) -> "Guide":
        """A guide that reads other tensors of the same shapes."""
        guide = cls.__new__(cls)
        guide.noise, guide.weight, guide.target, guide.committed = tensors
        guide.mode, guide.differentiates, guide.clip, guide.sigma = rest
        return guide

    def velocity(self, field: Field, points: Tensor, time: Tensor | float) -> Tensor:
        """The steered velocity at `points`, as Euler's method takes it."""
        velocity, push = self.split(field, points, time)
        return velocity if push is None else velocity - push

    def split(self, field: Field, points: Tensor, time: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """(v, lambda g): a step of length h ends at its own extrapolation of v, plus h lambda g.

        A method of higher order extrapolates v alone: the clip makes the pull a function of t that is not smooth.
        """
        if self.mode == "inpaint":
            return torch.where(self.committed, self.noise - self.target, field(points)), None
        if self.mode == "trained":  # the field itself was told, see policies.steered.conditioned
            return field(points), None
        if not self.differentiates:
            velocity = field(points)
            push = self._error(points - time * velocity)
        else:
            with torch.enable_grad():
                at = points.detach().requires_grad_(True)
                velocity = field(at)
                clean = at - time * velocity
                (push,) = torch.autograd.grad(clean, at, self._error(clean.detach()))
            velocity = velocity.detach()
        return velocity, strength(time, self.clip, self.sigma) * push

    def integrate(
        self, solver: Callable[..., Tensor], velocity: Callable[[Tensor, float], Tensor], noise: Tensor
    ) -> Tensor:  # fmt: skip
        """Where `solver` (a sampling.solvers.Solver) goes from `noise`: it extrapolates velocities, never the pull."""
        push: Tensor | None = None

        def plain(points: Tensor, time: float) -> Tensor:
            nonlocal push
            found, push = self.split(lambda at: velocity(at, time), points, time)
            return found

        return solver(plain, noise, lambda _points, direction, _time: direction if push is None else direction - push)

    def _error(self, clean: Tensor) -> Tensor:
        return self.weight * (self.target - clean)

    def finish(self, points: Tensor) -> Tensor:
        """The chunk: its committed rows are those that were executed, bit for bit."""
        return torch.where(self.committed, self.target, points)
