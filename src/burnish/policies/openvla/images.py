"""Images as OpenVLA was trained on them: resize, centre crop, two normalisations. Pixels are numbers from 0 to 255.

Every step is a linear map along each edge, so all of it runs on the batch's own device, and gives the very numbers of
the libraries that the authors call: TensorFlow's lanczos3 (data pipeline and evaluation), Pillow's bicubic (their
processor), TensorFlow's crop_and_resize (evaluation of models trained on random crops).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from burnish.core.errors import BurnishError

CROP = 0.9
"""Share of the area that evaluation keeps; training kept random crops of it."""


def resized(pixels: Tensor, size: int, kind: str) -> Tensor:
    """[B, 3, H, W] whole numbers to [B, 3, size, size] whole numbers.

    Args:
        pixels: 0 to 255, as floats.
        size: edge of the result.
        kind: "lanczos3", as training data and the authors' evaluation, or "bicubic", as their image processor alone.
    """
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    if kind == "bicubic":
        return _pillow(pixels, size)
    rows, columns = (_kernel(edge, size, kind).float().to(pixels.device) for edge in (height, width))
    return (rows @ pixels @ columns.T).round().clamp(0, 255)


def centre_crop(pixels: Tensor) -> Tensor:
    """The middle of square images, `CROP` of their area, at the old size: as `tf.image.crop_and_resize` samples it."""
    size = pixels.shape[-1]
    middle = _crop(size).float().to(pixels.device)
    share = (middle @ (pixels / 255) @ middle.T).clamp(0, 1)
    return (share * 255.5).floor().clamp(max=255)  # TensorFlow's way from shares to bytes


def normalised(pixels: Tensor, means: list[list[float]], stds: list[list[float]]) -> Tensor:
    """[B, 3, H, W] pixels to [B, 3 * towers, H, W]: one normalisation for each vision tower, after one another."""
    share = pixels / 255
    parts = [(share - share.new_tensor(mean)[:, None, None]) / share.new_tensor(std)[:, None, None]
             for mean, std in zip(means, stds, strict=True)]  # fmt: skip
    return torch.cat(parts, dim=1)


def pixels_of(image: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] to whole numbers from 0 to 255, as floats."""
    if image.ndim != 4 or image.shape[1] != 3:
        raise BurnishError(f"images of shape {tuple(image.shape)}", "[B, 3, H, W]")
    return (image.float() * 255).round().clamp(0, 255)


def _lanczos3(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


def _cubic(x: Tensor) -> Tensor:
    x, a = x.abs(), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    return torch.where(x < 1, near, torch.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0.0))


@lru_cache(maxsize=32)
def _kernel(before: int, after: int, kind: str) -> Tensor:
    """float64 [after, before]: weights of a resize whose kernel widens as the image shrinks (antialias)."""
    scale = before / after
    centre = (torch.arange(after, dtype=torch.float64) + 0.5) * scale
    distance = torch.arange(before, dtype=torch.float64) + 0.5 - centre[:, None]
    weights = (_lanczos3 if kind == "lanczos3" else _cubic)(distance / max(scale, 1.0))
    return weights / weights.sum(1, keepdim=True)


def _pillow(pixels: Tensor, size: int) -> Tensor:
    """Pillow's bicubic, to the bit: weights are whole multiples of 2^-22, and bytes are rounded after each edge."""

    def along(values: Tensor, edge: int) -> Tensor:
        whole = _kernel(edge, size, "bicubic") * 2**22
        whole = torch.where(whole < 0, (whole - 0.5).ceil(), (whole + 0.5).floor()).to(values.device)
        return ((values @ whole.T + 2**21) / 2**22).floor().clamp(0, 255)

    values = pixels.double()
    if pixels.shape[-1] != size:
        values = along(values, pixels.shape[-1])
    if pixels.shape[-2] != size:
        values = along(values.mT, pixels.shape[-2]).mT
    return values.to(pixels.dtype)


@lru_cache(maxsize=8)
def _crop(size: int) -> Tensor:
    """float64 [size, size]: straight lines between pixels, over the middle of an edge."""
    kept = math.sqrt(CROP)
    at = ((1 - kept) / 2 + kept * torch.linspace(0, 1, size, dtype=torch.float64)) * (size - 1)
    pixel = torch.arange(size, dtype=torch.float64)
    return (1 - (at[:, None] - pixel).abs()).clamp_min(0)
