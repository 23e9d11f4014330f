"""VGGT (Wang et al. 2025, arXiv 2503.11651) from the user's own package and weights; neither comes with burnish."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.teachers.base import TEACHERS, Teacher, Views, file_hash, fingerprint, precision_dtype

SIDE, PATCH, LAYERS, WIDTH = 518, 14, 24, 2048


@TEACHERS.register("vggt")
class VggtTeacher(Teacher):
    """The aggregator's 24 outputs (frame and global stream side by side), camera and register tokens dropped.

    All views of a moment go through it together, so that its global attention mixes them. It takes images in [0, 1] at
    518 x 518 and normalises them itself; one release of the method fed it [-1, 1].

    Args:
        path: folder with VGGT-1B's config.json and model.safetensors.
        precision: "bf16", "fp16" or "no".
    """

    def __init__(self, path: str, precision: str = "bf16"):
        super().__init__()
        try:
            from vggt.models.vggt import VGGT
        except ImportError as error:
            raise BurnishError("the package vggt is not installed", "VGGT's own package",
                               "install it from its repository, or teacher: scene3d") from error  # fmt: skip
        weights = sorted(Path(path).glob("*.safetensors"))
        if not weights:
            raise BurnishError(f"no VGGT weights in {path}", "a folder with model.safetensors")
        self.aggregator = VGGT.from_pretrained(path).aggregator
        self.dtype = precision_dtype(precision)
        self.widths = (WIDTH,) * LAYERS
        self.identity = {
            "name": "vggt", "weights": fingerprint([file_hash(w) for w in weights]), "precision": precision,
        }  # fmt: skip

    def features(self, views: Views, layers: Sequence[int]) -> dict[int, Tensor]:
        batch, cameras = views.images.shape[:2]
        images = F.interpolate(views.images.flatten(0, 1), (SIDE, SIDE), mode="bicubic").clamp(0, 1)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            outputs, first_patch = self.aggregator(images.unflatten(0, (batch, cameras)))
        side = SIDE // PATCH
        return {layer: outputs[layer][:, :, first_patch:].unflatten(2, (side, side)) for layer in layers}
