"""What Adam does to an edit, and what the two variants do about it (I5), through torch's own AdamW."""

import pytest
import torch
from torch import nn

from burnish.methods.gradients import Layout
from burnish.methods.isolate.project import AdamWatch, Direction, edit

NAMES = ("layers.0.w", "layers.1.w")
LR, BETA2, EPS = 1e-2, 0.95, 1e-8


def make(momentum=0.9):
    draws = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(20, generator=draws)) for name in NAMES}
    betas = (momentum, BETA2)
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, betas=betas, eps=EPS, weight_decay=0.0)
    layout = Layout({n: p.shape for n, p in parameters.items()}, "layer")
    return parameters, optimizer, layout, AdamWatch(optimizer, parameters, layout), draws


def flat(parameters):
    return torch.cat([parameters[name].detach() for name in NAMES])


def step(parameters, optimizer, layout, watch, draws, mode, number, max_norm=0.0):
    """One edited AdamW step as the loop does it; returns task gradient, the gradient that Adam saw, and direction."""
    task = torch.randn(40, generator=draws) * torch.logspace(-2, 1, 40)
    direction = Direction(list(torch.randn(40, generator=draws).split(20)), layout)
    gradient = list(task.clone().split(20))
    metric = (lambda: watch.metric(gradient, number)) if mode == "preconditioned" else None
    factor, _ = edit(gradient, direction, layout, "always", metric=metric)
    if mode != "plain":
        watch.route(gradient, direction, factor, clipped=mode != "preconditioned")
    for name, part in zip(NAMES, gradient, strict=True):
        parameters[name].grad = part
    if max_norm:
        torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    watch.measure(direction)
    optimizer.step()
    optimizer.zero_grad()
    return task, torch.cat(gradient), torch.cat(direction.vector)


def test_first_moment_only_is_adam_with_two_gradients():
    """m follows the edited gradient, v the unedited one, both clipped by the same factor; by hand in float64."""
    parameters, optimizer, layout, watch, draws = make()
    first, second = torch.zeros(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    for number in range(1, 6):
        before = flat(parameters).double()
        task, seen, direction = step(parameters, optimizer, layout, watch, draws, "first_moment", number, max_norm=1.0)
        edited = by_hand(task.double(), direction.double())
        factor = 1.0 / edited.norm()  # the clipping: these gradients are all longer than 1
        torch.testing.assert_close(seen.double(), edited * factor, rtol=1e-4, atol=1e-6)
        first = 0.9 * first + 0.1 * edited * factor
        watched = edited if number == 1 else task.double()  # Adam makes its state in the first step
        second = BETA2 * second + (1 - BETA2) * (watched * factor).square()
        expected = before - LR * (first / (1 - 0.9**number)) / ((second / (1 - BETA2**number)).sqrt() + EPS)
        torch.testing.assert_close(flat(parameters).double(), expected, atol=1e-5, rtol=1e-4)
    state = torch.cat([optimizer.state[parameters[n]]["exp_avg_sq"] for n in NAMES]).double()
    torch.testing.assert_close(state, second, rtol=1e-3, atol=1e-9)
    assert (state >= 0).all()


def by_hand(task, direction):
    """The "always" edit, layer by layer."""
    pairs = zip(task.split(20), direction.split(20), strict=True)
    return torch.cat([t - (t @ d) / (d @ d) * d for t, d in pairs])


@pytest.mark.parametrize("mode", ["plain", "first_moment", "preconditioned"])
def test_i5_leak_of_a_step_without_momentum(mode):
    """Projected in Adam's own metric the step leaks nothing (from the second on); otherwise Adam turns it back."""
    parameters, optimizer, layout, watch, draws = make(momentum=0.0)
    worst = 0.0
    for number in range(1, 6):
        before = flat(parameters)
        _, _, direction = step(parameters, optimizer, layout, watch, draws, mode, number)
        moved = (flat(parameters) - before).split(20)
        cosine = torch.stack([
            (m @ d) / (m.norm() * d.norm()) for m, d in zip(moved, direction.split(20), strict=True)
        ])  # fmt: skip
        torch.testing.assert_close(watch.leak.float(), cosine, atol=1e-4, rtol=1e-4)
        worst = max(worst, float(cosine.abs().max())) if number > 1 else worst
    assert worst < 1e-3 if mode == "preconditioned" else worst > 0.05
