"""Samplers against closed forms: Gaussian fields, constant and linear ones, LeRobot's loop, and coarser grids."""

import math

import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.sampling.solvers import SAMPLERS, Scheme, Solver, grid, make_solver

MEAN, SIGMA = 0.7, 0.5
KINDS = ("euler:6", "heun:7", "midpoint:6", "ab2:6", "dpm2m:6")


def gaussian(points, time):
    """The exact velocity E[noise - data | x_t] where data are normal(MEAN, SIGMA^2) and noise is standard normal."""
    variance = (1 - time) ** 2 * SIGMA**2 + time**2
    pull = (time - (1 - time) * SIGMA**2) / variance
    return -MEAN + pull * (points - (1 - time) * MEAN)


def noise(count=4096, dtype=torch.float64):
    return torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)


def rms(x):
    return x.square().mean().sqrt().item()


def error(sampler):
    """Against the exact flow map of that field, MEAN + SIGMA * noise, in units of the spread."""
    at = noise()
    return rms(make_solver(sampler)(gaussian, at) - (MEAN + SIGMA * at)) / SIGMA


def test_one_euler_step_of_an_exact_field_is_the_mean():
    """e(1) = s: what is left is the whole spread, up to the spread of the sample's own second moment."""
    at = noise()
    found = make_solver("euler:1")(gaussian, at)
    assert torch.allclose(found, torch.full_like(found, MEAN))
    tolerance = 5 / math.sqrt(2 * at.numel())
    assert abs(error("euler:1") - 1) < tolerance


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ab2", 2), ("midpoint", 2), ("heun", 2)])
def test_orders(name, order):
    passes = {"heun": (63, 127), "midpoint": (64, 128)}.get(name, (32, 64))
    ratio = error(f"{name}:{passes[0]}") / error(f"{name}:{passes[1]}")
    # The midpoint rule does better than its order on this field, whose errors at both ends cancel.
    assert 2**order * 0.88 < ratio and (ratio < 2**order * 1.12 or name == "midpoint")


def test_second_order_pays_at_few_passes():
    assert error("ab2:4") < 0.6 * error("euler:4") and error("dpm2m:6") < error("euler:6")


@pytest.mark.parametrize("sampler", ["euler:1", "heun:1", "midpoint:2", "ab2:1", "dpm2m:1", *KINDS, "ab2:5:1.5"])
def test_a_constant_field_is_exact(sampler):
    at = noise(8)
    found = make_solver(sampler)(lambda x, t: torch.full_like(x, 0.3), at)
    assert torch.allclose(found, at - 0.3, atol=1e-12)


@pytest.mark.parametrize(("sampler", "misses"), [
    ("midpoint:2", 0), ("midpoint:8", 0), ("ab2:5", 0.5 / 25), ("heun:9", 0.5 / 25), ("euler:5", 0.5 / 5),
])  # fmt: skip
def test_a_field_linear_in_time(sampler, misses):
    """v = a + b t: the integral is a + b/2. Euler's step of length h misses b h^2 / 2; AB2 has one such step, the
    first, and Heun's the last."""
    a, b, at = 0.4, -1.3, noise(8)
    found = make_solver(sampler)(lambda x, t: torch.full_like(x, a + b * t), at)
    assert torch.allclose(found, at - (a + b / 2) - misses * b, atol=1e-12)


def test_ab2_on_uneven_steps_is_exact_behind_the_first():
    b, at, solver = 2.0, noise(4), make_solver("ab2:6:1.7")
    found = solver(lambda x, t: torch.full_like(x, b * t), at)
    first = solver.steps[0].length
    assert torch.allclose(found, at - b / 2 - b * first**2 / 2, atol=1e-12)


def test_euler_is_lerobots_loop_bit_for_bit():
    from lerobot.policies.common.flow_matching import euler_integrate

    def field(points, time):
        time = time if isinstance(time, torch.Tensor) else torch.tensor(time, dtype=torch.float32).expand(len(points))
        return torch.sin(points) + time[:, None, None] * points

    at = noise(4, torch.float32)
    for steps in (1, 3, 5, 7, 10):
        assert torch.equal(make_solver(f"euler:{steps}")(field, at), euler_integrate(field, at, steps))


def test_a_velocity_that_is_used_again_is_a_coarser_grid():
    """Step caching: the velocity of every second of ten steps stands in for the next one."""

    def field(points, time):
        return torch.tanh(points) + time

    kept, calls = [], []

    def cached(points, time):
        if len(calls) % 2 == 0:
            kept[:] = [field(points, time)]
        calls.append(time)
        return kept[0]

    at = noise(16, torch.float32)
    apart = make_solver("euler:10")(cached, at) - make_solver("euler:5")(field, at)
    assert apart.abs().max() <= 1e-5


@pytest.mark.parametrize("sampler", KINDS)
def test_passes_are_what_the_name_says_and_never_at_zero(sampler):
    asked = []

    def field(points, time):
        asked.append(time)
        return points

    solver, at = make_solver(sampler), noise(2)
    before = at.clone()
    solver(field, at)
    assert len(asked) == solver.passes == int(sampler.split(":")[1])
    assert asked[0] == 1 and min(asked) > 0 and torch.equal(at, before)


def test_correct_sees_the_direction_and_stays_out_of_the_history():
    """AB2 extrapolates the field's own velocities: a constant push adds its integral and no more."""
    seen, at = [], noise(4)

    def correct(points, direction, time):
        seen.append(time)
        return direction + 0.25

    solver = make_solver("ab2:4")

    def field(points, time):
        return torch.full_like(points, time)

    assert torch.allclose(solver(field, at, correct), solver(field, at) - 0.25)
    assert seen == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(BurnishError, match="single pass"):
        make_solver("midpoint:4")(field, at, correct)


@pytest.mark.parametrize(("sampler", "said"), [
    ("", "unknown sampler"), ("rk4:4", "ab2, dpm2m, euler"), ("euler", "name:passes"), ("euler:0", "passes"),
    ("euler:1001", "passes"), ("euler:99999999999", "passes"), ("euler:-3", "passes"), ("euler:²", "passes"),
    ("heun:4", "heun:5"), ("midpoint:3", "midpoint:4"), ("ab2:4:0", "power"), ("ab2:4:nan", "power"),
    ("ab2:4:x", "power"), ("ab2:4:1:1", "power"), ("../x:4", "unknown sampler"),
])  # fmt: skip
def test_bad_names(sampler, said):
    with pytest.raises(BurnishError, match=said):
        make_solver(sampler)


def test_a_scheme_of_outside_needs_no_more_than_a_direction():
    half = Scheme(lambda velocity, points, step, kept: (velocity(points, step.time) / 2, None))
    at = noise(2)
    assert torch.allclose(Solver("half", half, grid(3), 3)(lambda x, t: torch.ones_like(x), at), at - 0.5)
    assert {"euler", "heun", "midpoint", "ab2", "dpm2m"} <= set(SAMPLERS)
