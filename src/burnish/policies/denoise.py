"""Another sampler in the place of LeRobot's Euler loop, from outside: no code of theirs is repeated."""

from typing import Any

import torch
from torch import Tensor, nn

from burnish.sampling.solvers import Solver
from burnish.sampling.steering import Guide


def sample_with(
    model: nn.Module, solver: Solver, inputs: list[Any], noise: Tensor, guide: Guide | None = None
) -> Tensor:
    """Actions [B, T, A_model] as `model.sample_actions(*inputs, noise=noise)` makes them, integrated by `solver`.

    LeRobot's sampler runs once with velocities of 0, for what it computes before its loop and hands to `denoise_step`;
    whatever stands in the place of that method, a wrapper for instance, is asked for the velocities.

    Args:
        model: LeRobot's.
        solver: see sampling.solvers.
        inputs: what `sample_actions` takes.
        noise: standard normal.
        guide: steers.
    """
    denoise, own = model.denoise_step, vars(model).get("denoise_step")
    seen: dict[str, Any] = {}

    def note(*, x_t: Tensor, timestep: Tensor, **encoded: Any) -> Tensor:
        seen.update(encoded)
        return torch.zeros_like(x_t)

    def velocity(points: Tensor, time: float) -> Tensor:
        at = torch.full((len(points),), time, dtype=torch.float32, device=points.device)
        return denoise(x_t=points, timestep=at, **seen)

    model.denoise_step = note
    try:
        model.sample_actions(*inputs, noise=noise)
    finally:
        if own is None:
            del model.denoise_step
        else:
            model.denoise_step = own
    return solver(velocity, noise) if guide is None else guide.integrate(solver, velocity, noise)
