"""The exact teacher: depth, surface normals and world points as the simulator knows them, cut into patches."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.teachers.base import TEACHERS, Teacher, Views

CELLS = 4
"""A token describes its patch by CELLS x CELLS places."""
MOST_TOKENS = 256


@TEACHERS.register("geometry")
class GeometryTeacher(Teacher):
    """Three layers of equal width 3 * 4 * 4: depth with its slopes, normals, world points.

    No network and no weights: what a perfect 3D model would know. Features are standardised: it is what
    differs from the usual at a place that tells where things are.

    Args:
        grid: tokens along height and width; by default the student's.
    """

    needs_geometry, standardise = True, True
    widths = (3 * CELLS * CELLS,) * 3

    def __init__(self, grid: Sequence[int]):
        super().__init__()
        fits = isinstance(grid, list | tuple) and len(grid) == 2 and all(type(side) is int for side in grid)
        if not fits or not all(1 <= side <= MOST_TOKENS for side in grid):
            raise BurnishError(f"the geometry teacher's grid is {grid!r}"[:200],
                               f"[rows, columns], 1 to {MOST_TOKENS} each")  # fmt: skip
        self.grid = tuple(grid)
        self.identity = {"name": "geometry", "grid": list(self.grid), "cells": CELLS}

    def features(self, views: Views, layers: Sequence[int]) -> dict[int, Tensor]:
        if views.points is None or views.depth is None:
            raise BurnishError("the geometry teacher has no depth to look at", "views with depth and points")
        depth_N1HW = views.depth.flatten(0, 1)[:, None]
        slopes = [F.pad(depth_N1HW.diff(dim=dim), pad) for dim, pad in ((-1, (0, 1)), (-2, (0, 0, 0, 1)))]
        points_N3HW = views.points.flatten(0, 1).permute(0, 3, 1, 2)
        maps = [lambda: torch.cat([depth_N1HW, *slopes], 1), lambda: normals(points_N3HW), lambda: points_N3HW]
        shape = views.images.shape[:2]
        return {layer: patchify(maps[layer](), self.grid).unflatten(0, shape) for layer in layers}


def normals(points_N3HW: Tensor) -> Tensor:
    """Unit surface normals [N, 3, H, W] from a world point map, by central differences; zero where undefined."""
    padded = F.pad(points_N3HW, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return F.normalize(torch.linalg.cross(down, across, dim=1), dim=1)


def patchify(maps_NCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """[N, h, w, C * CELLS * CELLS]: the mean of every cell of every patch."""
    height, width = grid
    cells = F.adaptive_avg_pool2d(maps_NCHW, (height * CELLS, width * CELLS))
    cells = cells.unflatten(2, (height, CELLS)).unflatten(4, (width, CELLS))  # [N, C, h, CELLS, w, CELLS]
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3)
