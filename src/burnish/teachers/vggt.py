"""VGGT (Wang et al. 2025, arXiv 2503.11651) from the user's own package and weights; neither comes with burnish."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from burnish.core.errors import BurnishError, first_line
from burnish.core.options import home
from burnish.core.reading import regular_file
from burnish.teachers.base import TEACHERS, Teacher, Views, file_hash, precision_dtype

SIDE, PATCH, LAYERS, WIDTH = 518, 14, 24, 2048
INSTALL = "pip install git+https://github.com/facebookresearch/vggt"
DOWNLOAD = "hf download facebook/VGGT-1B config.json model.safetensors --local-dir"


@TEACHERS.register("vggt")
class VggtTeacher(Teacher):
    """The aggregator's 24 outputs (frame and global stream side by side), camera and register tokens dropped.

    All views of a moment go through it together, so that its global attention mixes them. It takes images in [0, 1] at
    518 x 518 and normalises them itself; one release of the method fed it [-1, 1]. It hands out all 24 outputs of the
    moments that it sees at once, 270 MB for each view: two moments at a time, of which the chosen layers are kept,
    pooled.

    Args:
        path: folder with VGGT-1B's config.json and model.safetensors.
        precision: "bf16", "fp16" or "no".
    """

    moments = 2

    def __init__(self, path: str, precision: str = "bf16"):
        super().__init__()
        self.dtype = precision_dtype(precision)
        folder = Path(home(path)) if isinstance(path, str) else Path()
        try:
            from vggt.models.vggt import VGGT
        except ImportError as error:
            raise BurnishError("the package vggt is not installed", "VGGT's own package", INSTALL) from error
        weights = folder / "model.safetensors"
        if not weights.exists():  # the package would look for another one on the network
            raise BurnishError(f"no VGGT weights in {path}", "a folder with model.safetensors", f"{DOWNLOAD} '{path}'")
        regular_file(weights)
        self.aggregator = _load(VGGT, folder).aggregator
        _check_names(self.aggregator, weights)
        self.widths = (WIDTH,) * LAYERS
        self.identity = {"name": "vggt", "weights": file_hash(weights), "precision": precision}

    def features(self, views: Views, layers: Sequence[int]) -> dict[int, Tensor]:
        batch, cameras = views.images.shape[:2]
        images = F.interpolate(views.images.flatten(0, 1), (SIDE, SIDE), mode="bicubic").clamp(0, 1)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            outputs, first_patch = self.aggregator(images.unflatten(0, (batch, cameras)))
        side = SIDE // PATCH
        return {layer: outputs[layer][:, :, first_patch:].unflatten(2, (side, side)) for layer in layers}


def _load(kind: type, folder: Path) -> torch.nn.Module:
    try:
        return kind.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        line = first_line(error)
        raise BurnishError(f"{folder} holds no VGGT weights ({line})", "VGGT-1B", f"{DOWNLOAD} '{folder}'") from error


def _check_names(aggregator: torch.nn.Module, weights: Path) -> None:
    """The package takes weights of anything and leaves what is missing as it was drawn."""
    try:
        with safe_open(weights, "pt") as file:
            stored = set(file.keys())
    except SafetensorError as error:
        raise BurnishError(
            f"{weights} is unreadable ({error})", "a whole file", f"{DOWNLOAD} '{weights.parent}'"
        ) from None
    missing = [name for name in aggregator.state_dict() if f"aggregator.{name}" not in stored]
    if missing:
        raise BurnishError(f"{weights} lacks 'aggregator.{missing[0]}' ({len(missing)} in all)", "VGGT-1B's weights")
