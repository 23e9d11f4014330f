"""Image augmentation of whole batches: random shift and colour jitter, from a generator, on any device."""

from functools import cache

import torch
from torch import Tensor

SHIFT = 0.04
"""Largest shift as a share of the image edge; the border is repeated."""
JITTER = 0.2
"""Brightness moves by up to half of this (of full scale); contrast and saturation scale by 1 +- this."""


@cache
def _grey(device: torch.device) -> Tensor:
    """Weights of red, green and blue [3]; kept, because the host waits for the device wherever it sends it numbers."""
    return torch.tensor((0.299, 0.587, 0.114), device=device)


def to_float(images_BHW3: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [0, 1]; an axis for moments after B is kept."""
    return images_BHW3.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)


def draw_shift(images_BHW3: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 2] how many rows and columns each image is to move, up to SHIFT of its edges."""
    device, offsets = images_BHW3.device, []
    for edge in images_BHW3.shape[1:3]:
        most = round(edge * SHIFT)
        offsets.append(torch.randint(-most, most + 1, (len(images_BHW3), 1), generator=generator, device=device))
    return torch.cat(offsets, 1)


def shift_by(images_BHW3: Tensor, offsets_B2: Tensor) -> Tensor:
    """Pixel (r, c) becomes pixel (r + rows, c + columns), the border repeated; uint8 [B, H, W, 3] in and out."""
    batch, height, width, _ = images_BHW3.shape
    device = images_BHW3.device

    def index(edge: int, offset_B1: Tensor) -> Tensor:
        return (torch.arange(edge, device=device) + offset_B1).clamp_(0, edge - 1)

    rows_BH, columns_BW = index(height, offsets_B2[:, :1]), index(width, offsets_B2[:, 1:])
    flat = torch.arange(batch, device=device)[:, None, None] * (height * width)
    flat = flat + rows_BH[:, :, None] * width + columns_BW[:, None, :]
    return images_BHW3.reshape(-1, 3).index_select(0, flat.reshape(-1)).view_as(images_BHW3)


def colour_jitter(images_B3HW: Tensor, generator: torch.Generator, moments: int = 1) -> Tensor:
    """Random brightness, contrast and saturation for each image, as one 3x3 matrix and offset; float in [0, 1].

    Every `moments` images that follow one another share theirs.
    """
    batch, _, height, width = images_B3HW.shape
    device = images_B3HW.device
    draws = torch.rand(batch // moments, 3, generator=generator, device=device) * 2 - 1
    draws = draws.repeat_interleave(moments, 0) if moments > 1 else draws
    brightness, contrast, saturation = draws[:, 0] * JITTER / 2, 1 + draws[:, 1] * JITTER, 1 + draws[:, 2] * JITTER
    grey_3 = _grey(device)
    keep = saturation[:, None, None] * torch.eye(3, device=device)
    matrix_B33 = contrast[:, None, None] * (keep + (1 - saturation)[:, None, None] * grey_3.expand(3, 3))
    flat = images_B3HW.reshape(batch, 3, height * width)
    mean_grey_B = flat.mean(2) @ grey_3
    offset_B = (1 - contrast) * mean_grey_B + brightness
    offset_B31 = offset_B[:, None, None].expand(batch, 3, 1)
    return torch.baddbmm(offset_B31, matrix_B33, flat).clamp_(0, 1).view_as(images_B3HW)


def augment(images_BHW3: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shifted and colour-jittered images, float [B, 3, H, W], and the shift [B, 2] of each in rows and columns.

    Moments of one view, [B, n, H, W, 3], are moved and coloured alike.
    """
    if images_BHW3.ndim == 5:
        moments = images_BHW3.shape[1]
        offsets = draw_shift(images_BHW3[:, 0], generator)
        moved = shift_by(images_BHW3.flatten(0, 1), offsets.repeat_interleave(moments, 0))
        return colour_jitter(to_float(moved), generator, moments).unflatten(0, (-1, moments)), offsets
    offsets = draw_shift(images_BHW3, generator)
    return colour_jitter(to_float(shift_by(images_BHW3, offsets)), generator), offsets
