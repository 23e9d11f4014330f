"""The alignment loss, and how a grid of teacher tokens comes to lie over the student's."""

import torch
import torch.nn.functional as F
from torch import Tensor

POOLINGS = ("area", "bilinear")


def alignment_loss(predicted_BTD: Tensor, target_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """1 minus the mean cosine over valid tokens, in float32; zero where no token is valid.

    Args:
        predicted_BTD: projected student states [B, T, D].
        target_BTD: teacher features [B, T, D].
        mask_BT: bool [B, T], False on tokens of absent cameras.
    """
    # A masked target may be NaN, and NaN times a zero gradient is NaN: it must not enter the cosine at all.
    target_BTD = target_BTD.float().masked_fill(~mask_BT[..., None], 0.0)
    cosine_BT = F.cosine_similarity(predicted_BTD.float(), target_BTD, dim=-1)
    return ((1 - cosine_BT) * mask_BT).sum() / mask_BT.sum().clamp_min(1)


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


def shift_grid(features_BHWD: Tensor, offsets_B2: Tensor) -> Tensor:
    """Move token grids as the student's images were moved: place (r, c) reads place (r + rows, c + columns).

    Between tokens it is linear, at the border the outermost token is repeated.

    Args:
        features_BHWD: [B, H, W, D].
        offsets_B2: rows and columns in units of tokens, float [B, 2].
    """

    def weights(size: int, offset_B: Tensor) -> Tensor:
        """[B, size, size]: row r holds the two weights that read position r + offset."""
        place = torch.arange(size, device=offset_B.device)
        wanted = (place + offset_B[:, None]).clamp(0, size - 1)
        return (1 - (wanted[:, :, None] - place).abs()).clamp_min(0)

    height, width = features_BHWD.shape[1:3]
    offsets = offsets_B2.to(features_BHWD)
    moved = torch.einsum("brh,bhwd->brwd", weights(height, offsets[:, 0]), features_BHWD)
    return torch.einsum("bcw,brwd->brcd", weights(width, offsets[:, 1]), moved)


def positional_term(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of token places, [H, W, width]: half of the channels for the column, half for the row.

    Coordinates run over [-1, 1] along the diagonal, so that they keep the aspect of the image; frequencies fall from 1
    to 1/100 over the channels. The released code adds 0.1 times this to the teacher's features.
    """
    height, columns = grid
    diagonal = (height**2 + columns**2) ** 0.5
    rows = torch.linspace(-height, height, height) / diagonal if height > 1 else torch.zeros(1)
    cols = torch.linspace(-columns, columns, columns) / diagonal if columns > 1 else torch.zeros(1)
    quarter = max(1, width // 4)
    frequencies = 100.0 ** (-torch.arange(quarter) / quarter)

    def waves(places: Tensor) -> Tensor:
        angles = places[:, None] * frequencies * torch.pi
        return torch.cat([angles.sin(), angles.cos()], 1)

    term = torch.cat(
        [waves(cols)[None].expand(height, -1, -1), waves(rows)[:, None].expand(-1, columns, -1)], 2
    )  # [H, W, 4 * quarter]
    return F.pad(term, (0, max(0, width - term.shape[2])))[..., :width]
