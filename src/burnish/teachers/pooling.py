"""How a teacher's grid of tokens comes to lie over the student's."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
        width: channels.
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
