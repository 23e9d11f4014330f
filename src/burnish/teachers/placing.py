"""Where a camera's view lies in the picture that a policy makes of it, carried over to what a teacher sees.

A policy resizes a view and pads it to its own picture: SmolVLA and burnish_discrete at the top and the left, pi on
both sides. The teacher gets the view with the same padding, so that its tokens lie over the student's, whatever the
sizes and grids; tokens of the padding are masked.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.errors import BurnishError

LEAST_SHOWN = 0.5
"""A token counts where at least this share of its area shows the view."""


@dataclass(frozen=True)
class Placement:
    """A view inside a padded picture, in pixels of that picture.

    Args:
        picture_height, picture_width: of the picture that the policy's backbone gets.
        top, left, height, width: the part of it that shows the view.
    """

    picture_height: int
    picture_width: int
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of(cls, shown_HW: Tensor) -> "Placement":
        """From a mask bool [H, W] of the picture's pixels that show the view; raises BurnishError where none does."""
        rows, columns = (shown_HW.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
        if not rows:
            raise BurnishError("a picture that shows nothing of the view", "a policy that resizes and pads its views")
        top, left = rows[0], columns[0]
        return cls(*shown_HW.shape, top, left, rows[-1] + 1 - top, columns[-1] + 1 - left)

    @classmethod
    def whole(cls, size: Sequence[int]) -> "Placement":
        """Of a view [H, W] that is not padded."""
        height, width = size
        return cls(height, width, 0, 0, height, width)

    def padding(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """Pixels (left, right, top, bottom) that make such a picture of a view [H, W] at its own resolution."""

        def along(edge: int, whole: int, start: int, length: int) -> tuple[int, int]:
            before = round(edge * start / length)
            return before, max(0, round(edge * whole / length) - edge - before)

        height, width = size
        return (
            *along(width, self.picture_width, self.left, self.width),
            *along(height, self.picture_height, self.top, self.height),
        )

    def padded_size(self, size: Sequence[int]) -> tuple[int, int]:
        """[H', W'] of a view [H, W] after padding."""
        left, right, top, bottom = self.padding(size)
        return size[0] + top + bottom, size[1] + left + right

    def pad(self, maps_NCHW: Tensor, repeat: bool = False) -> Tensor:
        """Maps [N, C, H, W] of the view with its padding: black, or the outermost values repeated."""
        margins = self.padding(maps_NCHW.shape[-2:])
        if not any(margins):
            return maps_NCHW
        return F.pad(maps_NCHW, margins, mode="replicate") if repeat else F.pad(maps_NCHW, margins)

    def tokens(self, grid: Sequence[int]) -> Tensor:
        """bool [h, w]: the tokens of a grid over the picture that show the view; at least one."""
        shown = torch.zeros(1, 1, self.picture_height, self.picture_width)
        shown[..., self.top : self.top + self.height, self.left : self.left + self.width] = 1
        share = F.adaptive_avg_pool2d(shown, tuple(grid))[0, 0]
        return share >= min(LEAST_SHOWN, float(share.max()))

    def bounds(self, grid: Sequence[int]) -> tuple[int, int, int, int]:
        """First and last row, first and last column of `tokens`."""
        return _bounds(self, *grid)

    def numbers(self) -> list[int]:
        """Its fields, JSON-able; `Placement(*numbers)` is it again."""
        return list(astuple(self))


@lru_cache(maxsize=64)
def _bounds(placement: Placement, height: int, width: int) -> tuple[int, int, int, int]:
    shown = placement.tokens((height, width))
    rows, columns = (shown.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    return rows[0], rows[-1], columns[0], columns[-1]


def place(maps: Sequence[Tensor], placements: Sequence[Placement], repeat: bool = False) -> Tensor:
    """Views of any sizes, padded as the policy pads them and brought to one size.

    Args:
        maps: [B, C, H, W] of each view.
        placements: of each view; none leaves them unpadded.
        repeat: repeat the outermost values (depth, points) instead of black, and take the nearest in resizing.

    Returns:
        [B, V, C, H', W'], as large as the largest padded view.
    """
    if placements:
        maps = [placement.pad(view, repeat) for view, placement in zip(maps, placements, strict=True)]
    size = tuple(max(view.shape[dim] for view in maps) for dim in (-2, -1))
    mode = {"mode": "nearest"} if repeat else {"mode": "bilinear", "align_corners": False}
    return torch.stack([v if tuple(v.shape[-2:]) == size else F.interpolate(v, size, **mode) for v in maps], 1)


POOLINGS = ("area", "bilinear")


def pool_grid(features: Tensor, grid: tuple[int, int], pooling: str) -> Tensor:
    """Bring token grids to the student's size.

    "area" averages the teacher's tokens that a student's token covers. "bilinear" with aligned corners is what the
    released code does; the student's outer tokens then lie on the teacher's outermost ones, up to half a token off.

    Args:
        features: [..., H, W, D].
        grid: (h, w) wanted.
        pooling: "area" or "bilinear".

    Returns:
        [..., h, w, D] in the dtype of `features`.
    """
    if tuple(features.shape[-3:-1]) == tuple(grid):
        return features
    flat = features.reshape(-1, *features.shape[-3:]).movedim(-1, 1)
    if pooling == "area":
        pooled = F.adaptive_avg_pool2d(flat, grid)
        if any(have < want for have, want in zip(flat.shape[-2:], grid, strict=True)):
            pooled = F.interpolate(flat, grid, mode="bilinear", align_corners=False)
    else:
        pooled = F.interpolate(flat, grid, mode="bilinear", align_corners=True)
    return pooled.movedim(1, -1).reshape(*features.shape[:-3], *grid, features.shape[-1])


def positional_term(grid: tuple[int, int], width: int, aspect: float = 0.0) -> Tensor:
    """Sines and cosines of token places, [H, W, width]: half of the channels for the column, half for the row.

    Coordinates are those of the tokens' centres in an image whose diagonal runs from -1 to 1; frequencies in radians
    fall from 1 to 1/100 over the channels. The released codes add 0.1 times this to the teacher's features.

    Args:
        grid: tokens (H, W).
        aspect: width of the image over its height; 0 takes that of the grid.

    Source:
        VGGT's create_uv_grid and position_grid_to_embed (arXiv 2503.11651), which both released codes call.
    """
    height, columns = grid
    aspect = aspect or columns / height
    diagonal = (aspect**2 + 1) ** 0.5

    def centres(count: int, span: float) -> Tensor:
        edge = span * (count - 1) / count
        return torch.linspace(-edge, edge, count, dtype=torch.float64)

    quarter = max(1, width // 4)
    frequencies = 100.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def waves(places: Tensor) -> Tensor:
        angles = places[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1).float()

    cols, rows = centres(columns, aspect / diagonal), centres(height, 1 / diagonal)
    both = waves(cols)[None].expand(height, -1, -1), waves(rows)[:, None].expand(-1, columns, -1)
    term = torch.cat(both, 2)  # [H, W, 4 * quarter]
    return F.pad(term, (0, max(0, width - term.shape[2])))[..., :width]
