"""The teacher's tokens for a training batch: from the cache, or from the teacher itself, moved as the images were."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.types import Batch
from burnish.data.feature_cache import CacheKey, FeatureCache
from burnish.data.feature_fill import FeatureJob, fit_statistics, open_cache
from burnish.data.loader import RobotData
from burnish.data.views import FrameViews, frame_source, has_geometry
from burnish.methods.align.aligner import shift_grid
from burnish.teachers.base import Teacher, Views
from burnish.teachers.folder import COMMAND
from burnish.teachers.placing import place

IMAGES = "observation.images."
RESIDENT_BYTES = 4 << 30
"""Up to this size a cache is held on the GPU, where reading it costs no wait."""
VISION = Path("data/teachers/vision")
"""Where the default teacher of data without depth lies."""


def choose_teacher(root: Path, cameras: Sequence[str]) -> dict[str, Any]:
    """The specification of the teacher that a data set can have where the recipe names none."""
    if has_geometry(root, cameras):
        return {"name": "geometry"}
    if (VISION / "config.json").exists():
        return {"name": "folder", "path": str(VISION)}
    raise BurnishError(f"align: {root} keeps no depth, and {VISION} holds no vision model to be the teacher",
                       "a teacher", COMMAND)  # fmt: skip


class CachedTargets:
    """Targets from a cache. The student's random shift is replayed on the token grid; colours do not matter to it."""

    def __init__(self, cache: FeatureCache, key: CacheKey, device: torch.device):
        self.cache, self.key = cache, key
        if device.type != "cpu" and cache.num_bytes <= RESIDENT_BYTES:
            cache.move_to(device)

    def __call__(self, batch: Batch) -> dict[int, Tensor]:
        """{layer: [B, V, h, w, D]} for the frames of a batch."""
        return {t: shifted(grid, batch, self.key) for t, grid in self.cache.read(batch["index"]).items()}


class LiveTargets:
    """Targets from the teacher, at every step. It sees the very images that the student sees.

    Only what the simulator knows (depth, world points) has no augmented version; its token grid is shifted instead.
    """

    def __init__(self, job: FeatureJob, device: torch.device):
        self.job, self.key, self.device = job, job.key, device
        self.teacher = job.teacher(str(device))  # its first values are checked; at every step that would be a wait
        self.views = FrameViews(job.source) if job.source.geometry else None
        self.statistics = {t: statistics.to(device) for t, statistics in fit_statistics(job, str(device)).items()}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[int, Tensor]:
        """{layer: [B, V, h, w, D]} for a batch."""
        if self.views is None:
            images = place([batch[f"{IMAGES}{camera}"] for camera in self.key.cameras], self.key.placements)
            present = torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)
            views = Views(images, present, tuple(self.key.cameras))
        else:
            views = self.views(*self.job.block(batch["index"].cpu().numpy())).to(self.device)
        found = self.teacher(views)
        self.teacher.check = False
        scaled = {t: (f - self.statistics[t].mean) / self.statistics[t].scale for t, f in found.items()}
        return scaled if self.views is None else {t: shifted(f, batch, self.key) for t, f in scaled.items()}


def shifted(features_BVHWD: Tensor, batch: Batch, key: CacheKey) -> Tensor:
    """Each view's token grid moved as the loader moved its image; untouched where nothing was moved."""
    views = []
    for v, (camera, size, placement) in enumerate(zip(key.cameras, key.image_sizes, key.placements, strict=True)):
        view = features_BVHWD[:, v]
        offsets = batch.get(f"shift.{camera}")
        if offsets is not None:
            # Plain numbers, not tensors made from lists: those would wait for a GPU.
            edges = placement.padded_size(size)
            tokens = [offsets[:, axis] * (key.grid[axis] / edges[axis]) for axis in (0, 1)]
            view = shift_grid(view, torch.stack(tokens, 1), placement.bounds(key.grid))
        views.append(view)
    return torch.stack(views, 1)


def make_targets(
    spec: dict[str, Any], teacher: Teacher, key: CacheKey, data: RobotData, *, cache: str, device: torch.device,
    progress: bool = True,
) -> CachedTargets | LiveTargets:  # fmt: skip
    """Open (and fill) the cache of a data set, or run the teacher at every step.

    Args:
        spec, teacher: the specification and what `make_teacher` made of it.
        cache: "" for one beside the data set, "off" for none, or a folder.
    """
    source = frame_source(data, tuple(key.cameras), teacher.needs_geometry, key.placements)
    job = FeatureJob(spec, key, source, data.states, len(data.actions), tuple(teacher.widths))
    if cache == "off":
        return LiveTargets(job, device)
    folder = Path(cache) if cache else Path(data.root) / ".teachers" / key.name
    barred = folder.parent.is_symlink() or not folder.exists() and not os.access(data.root, os.W_OK)
    if not cache and barred:
        raise BurnishError(f"{data.root} may not be written, or its .teachers is a link: it cannot keep features",
                           "a folder that may", "cache: features, in the entry of align")  # fmt: skip
    opened = open_cache(folder, job, progress=progress, device=str(device))
    return CachedTargets(opened, key, device)
