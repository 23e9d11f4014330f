"""What another sampler and real-time chunking do to LeRobot's flow models, from outside: no code of theirs is repeated.

LeRobot's `denoise_step` calls `embed_suffix`, which treats each row of a chunk by itself: rows at a flow time of their
own are two calls of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from burnish.sampling.solvers import Solver
from burnish.sampling.steering import Guide


@contextmanager
def conditioned(model: nn.Module, clean: Tensor, rows: Tensor) -> Iterator[None]:
    """Inside, the model sees the actions `clean` [B, T, A_model] at flow time 0 in the chosen `rows`, bool [B, T].

    Training-time action conditioning (Black et al., 2512.05964): the other rows are denoised beside what is done.
    """
    embed = model.embed_suffix

    def suffix(*given: Any) -> Any:
        *state, points, time = given
        points = torch.where(rows[..., None], clean.to(points), points)
        noisy, *others = embed(*state, points, time)
        known, *known_others = embed(*state, points, torch.zeros_like(time))
        before = noisy.shape[1] - rows.shape[1]  # the state's position
        chosen = torch.nn.functional.pad(rows, (before, 0))[..., None]
        found = torch.where(chosen, known, noisy)
        if len(others) < 3 or others[2] is None:
            return found, *others
        *masks, condition = others
        return found, *masks, torch.where(chosen, known_others[2][:, None], condition[:, None])

    for norm in model.modules():
        if type(norm).__name__ == "PiGemmaRMSNorm" and norm.dense is not None:
            norm.forward = MethodType(_by_row, norm)  # stays: a checkpointed layer is run again after the loss
    with replaced(model, "embed_suffix", suffix):
        yield


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, a pass backwards reaches what a chunk is made from, and keeps nothing for gradients of the weights."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _by_row(norm: Any, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """pi05's adaptive norm, for a condition [B, T, D] of each row too, where LeRobot's takes one of each sample."""
    if cond is None or cond.ndim == 2:
        return type(norm).forward(norm, x, cond)
    scale, shift, gate = norm.dense(cond).chunk(3, dim=-1)
    normed = norm._norm(x) * (1 + scale.float()) + shift.float()
    return normed.to(x.dtype), gate.to(x.dtype)


@contextmanager
def shared(model: nn.Module, copies: int) -> Iterator[None]:
    """Inside, `model.sample_actions` of B observations and noise [B * copies, T, A_model] samples from each `copies`
    times, its encoding computed once.
    """
    from transformers import DynamicCache

    denoise, kept = model.denoise_step, {}

    def repeated(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.repeat_interleave(copies, 0)
        rows = ((k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0), window) for k, v, window in value)
        return DynamicCache(tuple(rows))

    def step(*, x_t: Tensor, timestep: Tensor, **seen: Any) -> Tensor:
        if not kept:
            kept.update({name: repeated(value) for name, value in seen.items()})
        return denoise(x_t=x_t, timestep=timestep, **kept)

    with replaced(model, "denoise_step", step):
        yield


@contextmanager
def replaced(owner: nn.Module, name: str, call: Any) -> Iterator[None]:
    """Inside, the method of this object is another one; one that was replaced before comes back afterwards."""
    before = vars(owner).get(name)
    setattr(owner, name, call)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def sample_with(
    model: nn.Module, solver: Solver, inputs: list[Any], noise: Tensor, guide: Guide | None = None
) -> Tensor:
    """Actions [B, T, A_model] as `model.sample_actions(*inputs, noise=noise)` makes them, integrated by `solver`.

    LeRobot's sampler runs once with velocities of 0, for what it computes before its loop and hands to `denoise_step`;
    whatever stands in the place of that method, a wrapper for instance, is asked for the velocities.
    """
    denoise, seen = model.denoise_step, dict[str, Any]()

    def note(*, x_t: Tensor, timestep: Tensor, **encoded: Any) -> Tensor:
        seen.update(encoded)
        return torch.zeros_like(x_t)

    def velocity(points: Tensor, time: float) -> Tensor:
        at = torch.full((len(points),), time, dtype=torch.float32, device=points.device)
        return denoise(x_t=points, timestep=at, **seen)

    with replaced(model, "denoise_step", note):
        model.sample_actions(*inputs, noise=noise)
    return solver(velocity, noise) if guide is None else guide.integrate(solver, velocity, noise)
