"""Teacher features on disk: half precision or PCA with int8, memory-mapped; `feature_fill` computes them.

    <folder>/meta.json            what the features depend on, shapes, digests; a cache of anything else is refused
    <folder>/layer-<t>.npy        float16 [N, V, h, w, D]   ("half"), or int8 [N, V, h, w, K] ("pca")
    <folder>/statistics.safetensors   mean.<t> [V, h, w, D], scale.<t> [D]; for "pca" basis.<t> [K, D], step.<t> [K]

Features are stored after pooling to the student's grid (and standardising, where the teacher asks for it).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.files import sampled_digest
from burnish.core.reading import read_object, regular_file
from burnish.core.seeding import generator
from burnish.teachers.base import fingerprint
from burnish.teachers.placing import Placement

FORMATS = ("half", "pca")
LEAST_COSINE = 0.99
"""Mean cosine between a teacher's tokens and what the compressed format gives back."""
NAMES = ("mean", "scale", "basis", "step")
"""Of the tensors in statistics.safetensors, each followed by a dot and the layer."""
TOKENS, SAMPLE = 16384, 512
"""Tokens of a layer from which a basis is fitted, and the frames that they are drawn from."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that the stored features depend on.

    Args:
        teacher: its `identity`.
        data: hash of the data set.
        cameras: views, in the policy's order; a joint teacher mixes them.
        image_sizes: [H, W] of each camera's frames.
        grid: tokens along height and width.
        pooling, positional: see teachers.pooling (the second is a factor; 0 adds nothing).
        standardise: features centred at each place and scaled by dimension.
        format: "half" or "pca".
        components: K of "pca"; 0 takes as few as keep the cosine at LEAST_COSINE.
        placed: how the policy pads each view, see `Placement.numbers`; empty where it does not.
    """

    teacher: dict[str, Any]
    data: str
    cameras: list[str]
    image_sizes: list[list[int]]
    layers: list[int]
    grid: list[int]
    pooling: str = "area"
    positional: float = 0.0
    standardise: bool = False
    format: str = "half"
    components: int = 0
    placed: list[list[int]] = field(default_factory=list)
    version: int = field(default=4)

    @property
    def name(self) -> str:
        return f"{self.teacher['name']}-{fingerprint(asdict(self))}"

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Of each view, in the order of the cameras."""
        if self.placed:
            return tuple(Placement(*numbers) for numbers in self.placed)
        return tuple(Placement.whole(size) for size in self.image_sizes)

    def shown(self) -> Tensor:
        """bool [V, h, w]: the tokens that show their view and no padding."""
        return torch.stack([placement.tokens(self.grid) for placement in self.placements])

    def bytes_per_frame(self, widths: Sequence[int]) -> int:
        """Of all layers; for "pca" with 0 components the most that they can have. `widths` are the teacher's."""
        tokens = len(self.cameras) * self.grid[0] * self.grid[1]
        if self.format == "half":
            return tokens * sum(2 * widths[t] for t in self.layers)
        return tokens * sum(min(self.components or widths[t], widths[t]) for t in self.layers)


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
        fit = Fit(key)
        fit.add(features)
        return fit.statistics()

    def cut(self, wanted: Tensor, components: int) -> None:
        """Keep `components` of the basis, or with 0 as few as keep the cosine with the scaled tokens `wanted` [n, D];
        below LEAST_COSINE is an error."""
        whole = self.basis, self.step

        def kept(count: int) -> float:
            self.basis, self.step = whole[0][:count].clone(), whole[1][:count].clone()
            return float(torch.cosine_similarity(self.decode(self._store(wanted)), wanted, dim=-1).mean())

        low, high = 1, len(whole[0])
        while not components and low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if kept(middle) >= LEAST_COSINE else (middle + 1, high)
        count = min(components or high, len(whole[0]))
        cosine = kept(count)
        if not cosine >= LEAST_COSINE:
            found = f"{count} components keep the teacher's features to a cosine of {cosine:.3f}"
            fix = "components: 0 for as few as do, or cache_format: half"
            raise BurnishError(found, f"at least {LEAST_COSINE}", fix)

    def encode(self, features: Tensor) -> Tensor:
        """float32 [..., D] to float16 [..., D] or int8 [..., K]."""
        return self._store((features - self.mean) / self.scale)

    def _store(self, scaled: Tensor) -> Tensor:
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

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether its tensors are whole and suit stored features of this shape [N, V, h, w, D or K]."""
        wanted: list[Sequence[int]] = [(*shape[1:4], len(self.scale)), (len(self.scale),)]
        stored = shape[4] == len(self.scale)
        if self.basis is not None and self.step is not None:
            wanted += [(shape[4], len(self.scale)), (shape[4],)]
            stored = True
        held = [t for t in self.tensors() if t is not None]
        whole = len(held) == len(wanted) and all(bool(torch.isfinite(t).all()) for t in held)
        return stored and whole and all(tuple(t.shape) == tuple(w) for t, w in zip(held, wanted, strict=True))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """In the order of their names in the file."""
        return self.mean, self.scale, self.basis, self.step


class Fit:
    """Statistics of one layer from blocks of its features, of which only sums and some tokens are kept."""

    def __init__(self, key: CacheKey):
        self.key, self.count, self.blocks = key, 0, 0
        self.sum, self.squares = torch.zeros(2, dtype=torch.float64).unbind()
        self.tokens: list[Tensor] = []
        self.places: list[Tensor] = []
        self.shown = key.shown().flatten().nonzero().flatten() if key.format == "pca" else None

    def add(self, features: Tensor) -> None:
        """A block [n, V, h, w, D]."""
        features = features.cpu()
        wide = features.double()
        self.sum, self.squares = self.sum + wide.sum(0), self.squares + wide.square().sum(0)
        if self.shown is not None:  # tokens of padding are all alike, and nobody reads them
            flat = features.flatten(1, 3)[:, self.shown]
            drawn = torch.randperm(flat.shape[0] * flat.shape[1], generator=generator("feature tokens", self.blocks))
            drawn = drawn[: -(-TOKENS * len(features) // SAMPLE)]
            self.tokens.append(flat.flatten(0, 1)[drawn].clone())
            self.places.append(self.shown.repeat(len(features))[drawn])
        self.count, self.blocks = self.count + len(features), self.blocks + 1

    def statistics(self) -> Statistics:
        """Of all that was added; raises BurnishError where too few components are asked for."""
        width = self.sum.shape[-1]
        mean, scale = torch.zeros(self.sum.shape), torch.ones(width)
        if self.key.standardise:
            centre = self.sum / self.count
            variance = (self.squares / self.count - centre.square()).flatten(0, -2).mean(0)
            mean, scale = centre.float(), variance.clamp_min(0).sqrt().float()
            scale = scale.clamp_min(0.01 * float(scale.mean().clamp_min(1e-12)))
        found = Statistics(mean, scale)
        if self.key.format == "pca":
            scaled = (torch.cat(self.tokens) - mean.flatten(0, -2)[torch.cat(self.places)]) / scale
            wide = scaled.double()
            found.basis = torch.linalg.eigh(wide.T @ wide)[1].flip(1).T.float().contiguous()
            found.step = (scaled @ found.basis.T).abs().amax(0).clamp_min(1e-12) * 1.2 / 127
            found.cut(scaled, self.key.components)
        return found


def load_statistics(folder: Path, layers: Sequence[int]) -> dict[int, Statistics]:
    """The statistics of a cache, whole or being filled; KeyError where the file lacks some."""
    tensors = load_file(regular_file(folder / "statistics.safetensors", folder))
    needed = {t: (tensors[f"mean.{t}"], tensors[f"scale.{t}"]) for t in layers}
    return {t: Statistics(*needed[t], *(tensors.get(f"{name}.{t}") for name in NAMES[2:])) for t in layers}


class FeatureCache:
    """An opened, complete cache."""

    def __init__(self, folder: Path, expected: CacheKey):
        self.folder, self.key = folder, expected
        if not (folder / "meta.json").exists():
            raise BurnishError(f"no teacher features at {folder}", "a cache", "burnish method align cache --help")
        meta = read_object(folder / "meta.json", folder)
        again = ("a whole cache", f"rm -r '{folder}', and run it again")
        try:
            _check_key(meta["key"], asdict(expected), folder)
            self.statistics = load_statistics(folder, expected.layers)
            self.arrays = {
                t: np.load(regular_file(folder / f"layer-{t}.npy", folder), mmap_mode="r", allow_pickle=False)
                for t in expected.layers
            }
            shapes = {t: meta["shapes"][str(t)] for t in expected.layers}
            names = ["statistics.safetensors", *(f"layer-{t}.npy" for t in expected.layers)]
            other = [name for name in names if sampled_digest(folder / name) != meta["digests"][name]]
            kinds = {t: (list(array.shape), array.dtype) for t, array in self.arrays.items()}  # or an archive
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, SafetensorError) as error:
            raise BurnishError(f"the teacher features in {folder} are damaged ({error!r})", *again) from error
        if other:
            raise BurnishError(f"{folder / other[0]} is not the file that was written there", *again)
        kind = np.float16 if expected.format == "half" else np.int8
        for t, array in self.arrays.items():
            if kinds[t] != (shapes[t], kind) or array.shape[1:4] != (len(expected.cameras), *expected.grid):
                raise BurnishError(f"{folder}/layer-{t}.npy has shape {array.shape} of {array.dtype}",
                                   f"{shapes[t]} of {np.dtype(kind)}", again[1])  # fmt: skip
            if not self.statistics[t].fits(array.shape):
                raise BurnishError(f"the statistics of layer {t} in {folder} are damaged", *again)
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
    if not isinstance(found, dict):
        raise BurnishError(f"{folder}/meta.json holds no key", "a whole cache", f"rm -r '{folder}', and run it again")
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        name = differing[0]
        what = {"data": "another data set", "teacher": "another teacher"}.get(name, f"another {name}")
        raise BurnishError(f"{folder} holds features of {what} ({found.get(name)})", f"{expected[name]}",
                           "leave `cache` empty to make the right one")  # fmt: skip
