"""Teacher features on disk: half precision or PCA with int8, memory-mapped, filled in parallel, safe to interrupt.

    <folder>/meta.json            what the features depend on, and shapes; a cache of anything else is refused
    <folder>/layer-<t>.npy        float16 [N, V, h, w, D]   ("half"), or int8 [N, V, h, w, K] ("pca")
    <folder>/statistics.safetensors   mean.<t> [V, h, w, D], scale.<t> [D]; for "pca" basis.<t> [K, D], step.<t> [K]
    <folder>.partial/             the same while it is being filled, with one byte for each finished block of rows

Features are stored after pooling to the student's grid (and standardising, where the teacher asks for it).
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.files import alone, disk_errors, new_folder, remove_folder, require_space, sync, write_json
from burnish.core.seeding import derive_seed
from burnish.data.views import RowSource, RowViews
from burnish.methods.align.loss import pool_grid, positional_term
from burnish.teachers.base import Teacher, Views, fingerprint, make_teacher, run_teacher

BLOCK = 64
"""Rows that are filled at once."""
SAMPLE = 512
"""Rows from which statistics and bases are computed."""
FORMATS = ("half", "pca")
LEAST_COSINE = 0.99
"""Mean cosine between a teacher's tokens and what the compressed format gives back."""
_NAMES = ("mean", "scale", "basis", "step")


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
        pooling, positional: see loss.pool_grid and loss.positional_term (its factor; 0 adds nothing).
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


class Pooled:
    """A teacher whose features come out on the student's grid.

    Args:
        teacher: see teachers.base.
        key: which layers, grid, pooling and positional term.
    """

    def __init__(self, teacher: Teacher, key: CacheKey):
        self.teacher, self.key = teacher, key

    def __call__(self, views: Views) -> dict[int, Tensor]:
        """{layer: float32 [B, V, h, w, D]}; raises BurnishError where a present view's feature is not finite."""
        pooled = {}
        for layer, features in run_teacher(self.teacher, views, self.key.layers).items():
            if self.key.positional:
                term = positional_term(tuple(features.shape[2:4]), features.shape[-1]).to(features)
                features = features + self.key.positional * term
            pooled[layer] = pool_grid(features, tuple(self.key.grid), self.key.pooling)
            if not bool(torch.isfinite(pooled[layer][views.present]).all()):
                raise BurnishError(
                    f"teacher '{self.key.teacher['name']}' gives values that are not finite at layer {layer}",
                    "finite features", "other weights, or a higher precision",
                )  # fmt: skip
        return pooled


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
            _, _, rows = torch.linalg.svd(scaled, full_matrices=False)
            statistics.basis = rows.float()
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
            raise BurnishError(
                f"{count} components keep the teacher's features to a cosine of {cosine:.3f}",
                f"at least {LEAST_COSINE}",
                "components: 0 for as few as do, or cache_format: half",
            )

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
    return {t: Statistics(*(tensors.get(f"{name}.{t}") for name in _NAMES)) for t in layers}


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
            raise BurnishError(f"no teacher features at {folder}", "a cache", "burnish align cache --help")
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

    def read(self, rows: Tensor) -> dict[int, Tensor]:
        """{layer: float32 [B, V, h, w, D]} of dataset rows [B], on the device of `rows`."""
        if self._resident:
            return {t: self.statistics[t].decode(stored[rows]) for t, stored in self._resident.items()}
        numbers = rows.cpu().numpy()
        read = {t: torch.from_numpy(array[numbers]).to(rows.device) for t, array in self.arrays.items()}
        return {t: self.statistics[t].to(rows.device).decode(stored) for t, stored in read.items()}


def _check_key(found: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        name = differing[0]
        what = {"data": "another data set", "teacher": "another teacher"}.get(name, f"another {name}")
        raise BurnishError(
            f"{folder} holds features of {what} ({found.get(name)})", f"{expected[name]}",
            "leave `cache` empty to make the right one",
        )  # fmt: skip


@dataclass(frozen=True)
class FillJob:
    """What a filling process needs; picklable."""

    spec: dict[str, Any]
    key: CacheKey
    source: RowSource
    folder: Path
    shapes: dict[int, list[int]]


def open_cache(
    folder: Path, spec: dict[str, Any], key: CacheKey, source: RowSource, states: np.ndarray | None, num_rows: int, *,
    workers: int = 0, progress: bool = True, device: str = "cpu",
) -> FeatureCache:  # fmt: skip
    """Open the cache in `folder`, filling it first where it is not there or was interrupted.

    Args:
        folder: where it lies; only a cache of exactly `key` is taken.
        spec: the teacher's specification, see `make_teacher`.
        key: what the features depend on.
        source: what the rows look like.
        states: [N, D] observed states of all rows, or None.
        num_rows: N.
        workers: processes; 0 means one for each core. Ignored on a GPU.
        progress: show a bar.
        device: where the teacher runs.

    Raises:
        BurnishError: the folder holds something else, the disk is full, or the teacher's features are unusable.
            Finished blocks stay, and the same call continues.
    """
    if not folder.exists():
        with alone(folder.parent):
            if not folder.exists():  # another process may have filled it while this one waited
                _fill(folder, spec, key, source, states, num_rows, workers, progress, device)
    return FeatureCache(folder, key)


def _fill(folder, spec, key, source, states, num_rows, workers, progress, device) -> None:
    from tqdm import tqdm

    from burnish.data.feature_fill import run_blocks

    partial = folder.with_name(folder.name + ".partial")
    job = _prepare(partial, spec, key, source, states, num_rows, device)
    flags = np.fromfile(partial / "done", dtype=np.uint8)
    if len(flags) != -(-num_rows // BLOCK):
        raise BurnishError(f"{partial} is damaged: it notes {len(flags)} blocks", f"{-(-num_rows // BLOCK)}",
                           f"rm -r '{partial}'")  # fmt: skip
    todo = [b for b in range(len(flags)) if not flags[b]]
    blocks = [np.arange(b * BLOCK, min(num_rows, (b + 1) * BLOCK)) for b in todo]
    wanted = [(rows, None if states is None else states[rows]) for rows in blocks]
    bar = tqdm(total=num_rows, initial=num_rows - sum(map(len, blocks)), unit="frame",
               desc=f"features of {key.teacher['name']}", disable=not progress)  # fmt: skip
    handle = os.open(partial / "done", os.O_RDWR)
    try:
        with disk_errors(folder), bar:
            for rows in run_blocks(job, wanted, workers, device):
                os.pwrite(handle, b"\x01", int(rows[0]) // BLOCK)
                bar.update(len(rows))
    finally:
        os.close(handle)
    for t in key.layers:
        _sync(partial / f"layer-{t}.npy")
    write_json(partial / "meta.json", {"key": asdict(key), "shapes": {str(t): s for t, s in job.shapes.items()}})
    (partial / "done").unlink()
    os.rename(partial, folder)
    sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _prepare(partial, spec, key, source, states, num_rows, device) -> FillJob:
    """The partial folder with its files at full size; an interrupted one of the same key is continued."""
    from safetensors.torch import save_file

    begun = partial / "begun.json"
    if begun.is_file() and json.loads(begun.read_text()) == asdict(key):
        return FillJob(spec, key, source, partial, _shapes(load_statistics(partial, key.layers), key, num_rows))
    remove_folder(partial)
    statistics = fit_statistics(spec, key, source, states, num_rows, device)
    shapes = _shapes(statistics, key, num_rows)
    kind = np.float16 if key.format == "half" else np.int8
    require_space(partial.parent, sum(math.prod(s) for s in shapes.values()) * np.dtype(kind).itemsize, str(partial))
    with new_folder(partial) as folder:
        named = {
            f"{name}.{t}": value.contiguous()
            for t, s in statistics.items()
            for name, value in zip(_NAMES, s.tensors(), strict=True)
            if value is not None
        }
        save_file(named, folder / "statistics.safetensors")
        for t, shape in shapes.items():
            _empty_array(folder / f"layer-{t}.npy", shape, kind)
        np.zeros(-(-num_rows // BLOCK), np.uint8).tofile(folder / "done")
        write_json(folder / "begun.json", asdict(key))
    return FillJob(spec, key, source, partial, shapes)


def _shapes(statistics: dict[int, Statistics], key: CacheKey, num_rows: int) -> dict[int, list[int]]:
    return {
        t: [num_rows, len(key.cameras), *key.grid, s.mean.shape[-1] if s.basis is None else len(s.basis)]
        for t, s in statistics.items()
    }


def fit_statistics(
    spec: dict[str, Any], key: CacheKey, source: RowSource, states: np.ndarray | None, num_rows: int, device: str
) -> dict[int, Statistics]:
    """Statistics of each layer from rows drawn all over the data set; the same rows for the same data."""
    rng = np.random.default_rng(derive_seed("align statistics", key.data))
    chosen = np.sort(rng.permutation(num_rows)[:SAMPLE])
    views = RowViews(source)
    teacher = Pooled(make_teacher(spec, tuple(key.grid)).to(device), key)
    parts: dict[int, list[Tensor]] = {t: [] for t in key.layers}
    try:
        for first in range(0, len(chosen), BLOCK):
            rows = chosen[first : first + BLOCK]
            found = teacher(to_device(views(rows, None if states is None else states[rows]), device))
            for t, features in found.items():
                parts[t].append(features.cpu())
    finally:
        views.close()
    return {t: Statistics.fit(torch.cat(features), key) for t, features in parts.items()}


def to_device(views: Views, device: torch.device | str) -> Views:
    """Views on a device."""
    moved = {f: getattr(views, f) for f in ("images", "present", "depth", "points")}
    return replace(views, **{f: tensor.to(device) for f, tensor in moved.items() if tensor is not None})


def _empty_array(path: Path, shape: Sequence[int], kind) -> None:
    """A .npy file of full size; the space is taken now, so that a full disk shows before hours of work."""
    buffer = BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(buffer, header)
    size = math.prod(shape) * np.dtype(kind).itemsize
    with open(path, "wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.posix_fallocate(file.fileno(), 0, buffer.tell() + max(1, size))
