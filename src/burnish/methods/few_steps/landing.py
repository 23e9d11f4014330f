"""Grid distillation as mathematics: K Euler steps of a student that land where many of a teacher's land.

The teacher goes from noise (t = 1) to data (t = 0) in M fine steps, M a multiple of K; x_0, ..., x_K are its points at
the times 1, 1 - 1/K, ..., 0. From each x_k one step of the student, of length 1/K, is to end at x_(k+1). A student
without error walks along the teacher's own points, so all K steps of a chunk are trained at once, on one encoding of
the observation. No action labels enter. (Progressive distillation, Salimans and Ho, 2202.00512, in one go.)
"""

import torch
from torch import Tensor

from burnish.sampling.solvers import Velocity, grid


def teacher_points(velocity: Velocity, noise: Tensor, steps: int, fine: int) -> Tensor:
    """[B, K + 1, T, A]: where `fine` Euler steps from `noise` [B, T, A] stand after every `fine` / K of them.

    Args:
        velocity: of the teacher.
        noise: standard normal.
        steps: K, a divisor of `fine`.
        fine: M.
    """
    points, kept = noise, [noise]
    for number, step in enumerate(grid(fine), 1):
        points = points - step.length * velocity(points, step.time)
        if number % (fine // steps) == 0:
            kept.append(points)
    return torch.stack(kept, 1)


def times(steps: int, like: Tensor) -> Tensor:
    """[B, K] flow times at which the student's steps begin, for points `like` [B, K + 1, T, A]."""
    return like.new_tensor([step.time for step in grid(steps)]).expand(len(like), steps)


def landing_error(points: Tensor, velocities: Tensor) -> Tensor:
    """[B, K, T, A]: where the student's steps end minus where they should.

    Args:
        points: [B, K + 1, T, A] of the teacher.
        velocities: [B, K, T, A] of the student at the first K of them.
    """
    return points[:, :-1] - velocities / velocities.shape[1] - points[:, 1:]
