"""A small multi-view 3D teacher, trained by our own recipe: from V images to the world points behind every pixel.

Its build is VGGT's (Wang et al. 2025, arXiv 2503.11651) in small: patch tokens of all views, and blocks that attend
alternately within a view and across views. It knows the standing cameras of the tabletop and no others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from burnish.core.errors import BurnishError, first_line
from burnish.core.options import home
from burnish.core.reading import read_object, regular_file
from burnish.core.seeding import generator
from burnish.teachers.base import TEACHERS, Teacher, Views, file_hash

CAMERAS = ("front", "side")
MAKE = "python -m workshop teacher recipes/align/scene3d.yaml"
MOST = 4096
DEFAULTS = {"image_size": 96, "patch": 12, "width": 96, "depth": 6, "heads": 4, "cells": 6}


class SceneNet(nn.Module):
    """Point maps from images.

    Args:
        image_size: side of the square images in pixels.
        patch: side of a token's patch in pixels, a multiple of 4.
        width, depth, heads: of the transformer; even blocks attend within a view, odd ones across all.
        cells: points along each side of a patch.

    Attributes:
        centre: [V, P, P, 3] mean point of every place of each camera, in metres; P = tokens times cells along a side.
        scale: [3] by how much points deviate from it. The head gives (point - centre) / scale: learning first what
            an empty table looks like would take most of the training.
    """

    def __init__(self, image_size: int, patch: int, width: int, depth: int, heads: int, cells: int):
        super().__init__()
        self.patch, self.cells, self.side = patch, cells, image_size // patch
        self.embed = nn.Sequential(
            nn.Conv2d(3, 64, 4, stride=4), nn.GELU(), nn.Conv2d(64, width, patch // 4, stride=patch // 4)
        )
        self.place = nn.Parameter(0.2 * torch.randn(len(CAMERAS), self.side**2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * cells**2))
        points = self.side * cells
        self.register_buffer("centre", torch.zeros(len(CAMERAS), points, points, 3))
        self.register_buffer("scale", torch.ones(3))

    def hidden(self, images_BV3HW: Tensor) -> list[Tensor]:
        """Tokens after each block, [B, V, T, D]."""
        batch, views = images_BV3HW.shape[:2]
        tokens = self.embed(images_BV3HW.flatten(0, 1) * 2 - 1).flatten(2).mT
        tokens = tokens.unflatten(0, (batch, views)) + self.place[:views]
        states = []
        for i, block in enumerate(self.blocks):
            if i % 2 == 0:
                tokens = block(tokens.flatten(0, 1)).unflatten(0, (batch, views))
            else:
                tokens = block(tokens.flatten(1, 2)).unflatten(1, (views, -1))
            states.append(tokens)
        return states

    def forward(self, images_BV3HW: Tensor) -> Tensor:
        """World points [B, V, P, P, 3] in metres."""
        side, cells = self.side, self.cells
        flat = self.head(self.hidden(images_BV3HW)[-1]).unflatten(2, (side, side)).unflatten(4, (3, cells, cells))
        points = flat.permute(0, 1, 2, 5, 3, 6, 4).flatten(4, 5).flatten(2, 3)  # [B, V, P, P, 3]
        return points * self.scale + self.centre[: points.shape[1]]


def load_scene_net(folder: Path) -> tuple[SceneNet, dict[str, Any]]:
    """The network of a folder that `python -m workshop teacher` wrote, and its facts (accuracy among them)."""
    if not (folder / "config.json").exists():
        raise BurnishError(f"no scene3d teacher in {folder} (no config.json)", "a trained one", MAKE)
    facts = read_object(folder / "config.json", folder)
    weights = regular_file(folder / "model.safetensors", folder)
    sizes = facts.get("model")
    if (
        not isinstance(sizes, dict)
        or set(sizes) != set(DEFAULTS)
        or not all(type(size) is int and 1 <= size <= MOST for size in sizes.values())
    ):
        raise BurnishError(f"{folder}/config.json: model is {str(sizes)[:200]}",
                           f"{', '.join(DEFAULTS)}, 1 to {MOST} each", MAKE)  # fmt: skip
    try:
        with torch.device("meta"):
            count = sum(t.numel() for t in SceneNet(**sizes).state_dict().values())
        if count > weights.stat().st_size:
            raise ValueError(f"{count} weights in {weights.stat().st_size} bytes")
        net = SceneNet(**sizes)
        net.load_state_dict(load_file(weights))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ArithmeticError, SafetensorError) as error:
        line = first_line(error)
        raise BurnishError(f"no scene3d teacher in {folder} ({line})", "a trained one", MAKE) from error
    return net, facts


@TEACHERS.register("scene3d")
class Scene3dTeacher(Teacher):
    """Hidden states of the trained network after each of its blocks.

    Args:
        path: folder that `python -m workshop teacher` wrote.
        untrained: random weights of the same build instead: the control that tells 3D knowledge from mere pulling.
    """

    standardise = True

    def __init__(self, path: str = "data/teachers/scene3d", untrained: bool = False):
        super().__init__()
        if not isinstance(path, str):
            raise BurnishError(f"scene3d: path is {path!r}"[:200], "a folder", MAKE)
        folder = Path(home(path))
        self.net, facts = load_scene_net(folder)
        if untrained:
            draws = generator("untrained teacher")
            for parameter in self.net.parameters():
                if parameter.ndim > 1:
                    nn.init.trunc_normal_(parameter, std=0.05, generator=draws)
        self.widths = (facts["model"]["width"],) * len(self.net.blocks)
        weights = file_hash(folder / "model.safetensors")
        self.identity = {"name": "scene3d", "weights": weights, "untrained": untrained}

    def features(self, views: Views, layers: Sequence[int]) -> dict[int, Tensor]:
        side = self.net.side * self.net.patch
        if views.cameras != CAMERAS[: len(views.cameras)]:
            found, known = ", ".join(views.cameras), f"{CAMERAS[0]}, or {', '.join(CAMERAS)}"
            raise BurnishError(f"scene3d looks at cameras {found}", known, f"--data.cameras=[{CAMERAS[0]}]")
        images = views.images
        if images.shape[-1] != side:
            small = F.interpolate(images.flatten(0, 1), (side, side), mode="bilinear", antialias=True)
            images = small.unflatten(0, images.shape[:2])
        states = self.net.hidden(images)
        return {layer: states[layer].unflatten(2, (self.net.side, self.net.side)) for layer in layers}
