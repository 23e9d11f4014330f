"""Teacher features on disk: half precision or PCA with int8, memory-mapped; `feature_fill` computes them.

    <folder>/meta.json            what the features depend on, and shapes; a cache of anything else is refused
    <folder>/layer-<t>.npy        float16 [N, V, h, w, D]   ("half"), or int8 [N, V, h, w, K] ("pca")
    <folder>/statistics.safetensors   mean.<t> [V, h, w, D], scale.<t> [D]; for "pca" basis.<t> [K, D], step.<t> [K]

Features are stored after pooling to the student's grid (and standardising, where the teacher asks for it).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.teachers.base import fingerprint

FORMATS = ("half", "pca")
LEAST_COSINE = 0.99
"""Mean cosine between a teacher's tokens and what the compressed format gives back."""
NAMES = ("mean", "scale", "basis", "step")
"""Of the tensors in statistics.safetensors, each followed by a dot and the layer."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that the stored features depend on.

    Args:
        teacher: its `identity`.
        data: hash of the data set.
        cameras: views, in the policy's order; a joint teacher mixes them.
        image_size: [H, W] of the frames that the teacher sees.
        layers: teacher layers.
        grid: tokens along height and width.
        pooling, positional: see teachers.pooling (the second is a factor; 0 adds nothing).
        standardise: features centred at each place and scaled by dimension.
        format: "half" or "pca".
        components: K of "pca"; 0 takes as few as keep the cosine at LEAST_COSINE.
    """

    teacher: dict[str, Any]
    data: str
    cameras: list[str]
    image_size: list[int]
    layers: list[int]
    grid: list[int]
    pooling: str = "area"
    positional: float = 0.0
    standardise: bool = False
    format: str = "half"
    components: int = 0
    version: int = field(default=2)

    @property
    def name(self) -> str:
        return f"{self.teacher['name']}-{fingerprint(asdict(self))}"


@dataclass
class Statistics:
    """How features of one layer are stored: (x - mean) / scale, for "pca" then projected on `basis` in int8 steps.

    The mean is one for each place of each view. A standing camera shows the same table at the same place in every
    image; left in, that alone would make a cosine of 0.96 which needs no look at the scene.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor | None = None
    step: Tensor | None = None

    @classmethod
    def fit(cls, features: Tensor, key: CacheKey) -> "Statistics":
        """From a sample [n, V, h, w, D] of pooled features."""
        width = features.shape[-1]
        mean, scale = torch.zeros(features.shape[1:]), torch.ones(width)
        if key.standardise:
            mean = features.double().mean(0).float()
            scale = (features - mean).flatten(0, -2).double().square().mean(0).sqrt().float()
            scale = scale.clamp_min(0.01 * float(scale.mean().clamp_min(1e-12)))
        statistics = cls(mean, scale)
        if key.format == "pca":
            scaled = ((features - mean) / scale).flatten(0, -2).double()
            statistics.basis = torch.linalg.svd(scaled, full_matrices=False)[2].float()
            statistics.step = (scaled.float() @ statistics.basis.T).abs().amax(0).clamp_min(1e-12) * 1.2 / 127
            statistics._cut(features, key.components)
        return statistics

    def _cut(self, features: Tensor, components: int) -> None:
        """Keep `components` of the basis, or with 0 as few as keep the cosine; below LEAST_COSINE is an error."""
        whole = self.basis, self.step
        wanted = (features - self.mean) / self.scale

        def kept(count: int) -> float:
            self.basis, self.step = whole[0][:count].clone(), whole[1][:count].clone()
            return float(torch.cosine_similarity(self.decode(self.encode(features)), wanted, dim=-1).mean())

        low, high = 1, len(whole[0])
        while not components and low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if kept(middle) >= LEAST_COSINE else (middle + 1, high)
        count = min(components or high, len(whole[0]))
        cosine = kept(count)
        if cosine < LEAST_COSINE:
            found = f"{count} components keep the teacher's features to a cosine of {cosine:.3f}"
            fix = "components: 0 for as few as do, or cache_format: half"
            raise BurnishError(found, f"at least {LEAST_COSINE}", fix)

    def encode(self, features: Tensor) -> Tensor:
        """float32 [..., D] to float16 [..., D] or int8 [..., K]."""
        scaled = (features - self.mean) / self.scale
        if self.basis is None:
            return scaled.half()
        return (scaled @ self.basis.T / self.step).round().clamp(-127, 127).to(torch.int8)

    def decode(self, stored: Tensor) -> Tensor:
        """Back to float32 [..., D], still centred and scaled."""
        if self.basis is None:
            return stored.float()
        return (stored.float() * self.step) @ self.basis

    def to(self, device: torch.device) -> "Statistics":
        return Statistics(*(None if t is None else t.to(device) for t in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """In the order of their names in the file."""
        return self.mean, self.scale, self.basis, self.step


def load_statistics(folder: Path, layers: Sequence[int]) -> dict[int, Statistics]:
    """The statistics of a cache, whole or being filled."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "statistics.safetensors")
    return {t: Statistics(*(tensors.get(f"{name}.{t}") for name in NAMES)) for t in layers}


class FeatureCache:
    """An opened, complete cache.

    Args:
        folder: see the head of this file.
        expected: the key that it must have.

    Raises:
        BurnishError: no cache, unreadable, or one of something else; the differing parts are named.
    """

    def __init__(self, folder: Path, expected: CacheKey):
        self.folder, self.key = folder, expected
        if not (folder / "meta.json").is_file():
            raise BurnishError(f"no teacher features at {folder}", "a cache", "burnish method align cache --help")
        try:
            meta = json.loads((folder / "meta.json").read_text())
            _check_key(meta["key"], asdict(expected), folder)
            self.statistics = load_statistics(folder, expected.layers)
            self.arrays = {
                t: np.load(folder / f"layer-{t}.npy", mmap_mode="r", allow_pickle=False) for t in expected.layers
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise BurnishError(f"the teacher features in {folder} are damaged ({error!r})", "a whole cache",
                               f"rm -r '{folder}' to have them made again")  from error  # fmt: skip
        for t, array in self.arrays.items():
            if list(array.shape) != meta["shapes"][str(t)]:
                raise BurnishError(f"{folder}/layer-{t}.npy has shape {array.shape}", str(meta["shapes"][str(t)]))
        self._resident: dict[int, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def bytes_per_sample(self) -> float:
        return self.num_bytes / max(1, len(next(iter(self.arrays.values()))))

    def move_to(self, device: torch.device) -> None:
        """Hold everything on a device, so that reading needs no wait for the host."""
        self._resident = {t: torch.from_numpy(np.array(array)).to(device) for t, array in self.arrays.items()}
        self.statistics = {t: statistics.to(device) for t, statistics in self.statistics.items()}

    def read(self, indices: Tensor) -> dict[int, Tensor]:
        """{layer: float32 [B, V, h, w, D]} of the frames with these indices [B], on their device."""
        if self._resident:
            return {t: self.statistics[t].decode(stored[indices]) for t, stored in self._resident.items()}
        chosen = indices.cpu().numpy()
        read = {t: torch.from_numpy(array[chosen]).to(indices.device) for t, array in self.arrays.items()}
        return {t: self.statistics[t].to(indices.device).decode(stored) for t, stored in read.items()}


def _check_key(found: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        name = differing[0]
        what = {"data": "another data set", "teacher": "another teacher"}.get(name, f"another {name}")
        raise BurnishError(f"{folder} holds features of {what} ({found.get(name)})", f"{expected[name]}",
                           "leave `cache` empty to make the right one")  # fmt: skip
