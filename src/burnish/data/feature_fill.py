"""Computing teacher features block by block, in processes on the CPU, in this process on a GPU; safe to interrupt.

While it is being filled a cache is called <folder>.partial and has one byte for each block of frames in `done`.
"""

import logging
import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.files import (
    alone,
    disk_errors,
    make_folder,
    new_folder,
    remove_folder,
    require_space,
    sampled_digest,
    sync,
    write_json,
)
from burnish.core.outputs import mark, require_own
from burnish.core.progress import progress_bar
from burnish.core.reading import read_object, regular_file
from burnish.core.seeding import derive_seed
from burnish.core.workers import WorkerPool, count_workers
from burnish.data.feature_cache import NAMES, SAMPLE, CacheKey, FeatureCache, Fit, Statistics, load_statistics
from burnish.data.frames import npy_header
from burnish.data.views import FrameSource, FrameViews
from burnish.teachers.base import Teacher, Views, make_teacher, run_teacher
from burnish.teachers.placing import pool_grid, positional_term

BLOCK = 32
"""Frames that are filled together."""
KIND = "teacher features"
log = logging.getLogger("burnish")

Block = tuple[np.ndarray, np.ndarray | None]
"""Indices of frames and their observed states."""


class Pooled:
    """A teacher whose features come out on the student's grid; `key` says which layers, grid and pooling.

    Args:
        teacher: as many moments as it takes at a time go through it, and only the chosen layers are kept, pooled.
        check: refuse values that are not finite; that waits for a GPU.
    """

    def __init__(self, teacher: Teacher, key: CacheKey, check: bool = True):
        self.teacher, self.key, self.check = teacher, key, check
        self._terms: dict[tuple, Tensor] = {}

    def __call__(self, views: Views) -> dict[int, Tensor]:
        """{layer: float32 [B, V, h, w, D]}; raises BurnishError where a present view's feature is not finite."""
        count = len(views.images)
        step = self.teacher.moments or count
        parts = [self._pool(views.moments(first, first + step)) for first in range(0, count, step)]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in self.key.layers}

    def _pool(self, views: Views) -> dict[int, Tensor]:
        pooled, finite = {}, []
        for layer, features in run_teacher(self.teacher, views, self.key.layers).items():
            if self.key.positional:
                features = features + self._term(features, views.images.shape[-1] / views.images.shape[-2])
            pooled[layer] = pool_grid(features, tuple(self.key.grid), self.key.pooling)
            if self.check:
                held = torch.isfinite(pooled[layer]).flatten(2).all(2)
                finite.append((held | ~views.present).all())
        if self.check and not bool(torch.stack(finite).all()):
            wrong = next(t for t, held in zip(self.key.layers, finite, strict=True) if not held)
            raise BurnishError(
                f"teacher '{self.key.teacher['name']}' gives values that are not finite at layer {wrong}",
                "finite features", "other weights, or a higher precision",
            )  # fmt: skip
        return pooled

    def _term(self, features: Tensor, aspect: float) -> Tensor:
        """The scaled positional term of a layer, made once: bringing it to a GPU is a wait."""
        which = (*features.shape[2:], aspect)
        if which not in self._terms:
            term = positional_term(tuple(features.shape[2:4]), features.shape[-1], aspect)
            self._terms[which] = self.key.positional * term.to(features)
        return self._terms[which]


@dataclass(frozen=True)
class FeatureJob:
    """Features of a data set that are to be computed; picklable.

    Args:
        spec: the teacher's specification, see `make_teacher`.
        states: [N, D] observed states of all frames, or None.
        widths: D of each of the teacher's layers.
    """

    spec: dict[str, Any]
    key: CacheKey
    source: FrameSource
    states: np.ndarray | None
    num_frames: int
    widths: tuple[int, ...]

    @property
    def bytes_per_frame(self) -> int:
        return self.key.bytes_per_frame(self.widths)

    def block(self, indices: np.ndarray) -> Block:
        return indices, None if self.states is None else self.states[indices]

    def teacher(self, device: str, check: bool = True) -> Pooled:
        return Pooled(make_teacher(self.spec, tuple(self.key.grid)).to(device), self.key, check)


def open_cache(
    folder: Path, job: FeatureJob, *, workers: int = 0, progress: bool = True, device: str = "cpu"
) -> FeatureCache:
    """Open the cache in `folder`, filling it first where it is not there or was interrupted.

    Of several processes one fills it and the others wait for its lock, which knows no time limit (a barrier of ranks
    does) and opens when its holder ends, however that happens.

    Args:
        folder: where it lies; only a cache of exactly the job's key is taken.
        workers: processes; 0 means one for each core. Ignored on a GPU.

    Raises:
        BurnishError: the folder holds something else, the disk is full, or the teacher's features are unusable.
            Finished blocks stay, and the same call continues.
    """
    if not folder.exists():
        make_folder(folder.parent)
        with disk_errors(folder), alone(folder.parent):
            if not folder.exists():  # another process may have filled it while this one waited
                _fill(folder, job, workers, progress, device)
    return FeatureCache(folder, job.key)


def _fill(folder: Path, job: FeatureJob, workers: int, progress: bool, device: str) -> None:
    key, num_frames = job.key, job.num_frames
    partial = folder.with_name(folder.name + ".partial")
    shapes = _prepare(partial, job, device)
    flags = np.fromfile(regular_file(partial / "done", partial), dtype=np.uint8)
    expected = -(-num_frames // BLOCK)
    if len(flags) != expected:
        raise BurnishError(f"{partial} is damaged: it notes {len(flags)} blocks", f"{expected}", f"rm -r '{partial}'")
    todo = [b for b in range(len(flags)) if not flags[b]]
    blocks = [np.arange(b * BLOCK, min(num_frames, (b + 1) * BLOCK)) for b in todo]
    bar = progress_bar(total=num_frames, initial=num_frames - sum(map(len, blocks)), unit="frame",
               desc=f"features of {key.teacher['name']}", shown=progress)  # fmt: skip
    handle = os.open(partial / "done", os.O_RDWR)
    try:
        with disk_errors(folder), bar:
            for frames in run_blocks(job, partial, blocks, workers, device):
                os.pwrite(handle, b"\x01", int(frames[0]) // BLOCK)
                bar.update(len(frames))
    finally:
        os.close(handle)
    for t in key.layers:
        sync(partial / f"layer-{t}.npy")
    names = ["statistics.safetensors", *(f"layer-{t}.npy" for t in key.layers)]
    digests = {name: sampled_digest(partial / name) for name in names}
    about = {"key": asdict(key), "shapes": {str(t): s for t, s in shapes.items()}, "digests": digests}
    write_json(partial / "meta.json", about)
    (partial / "done").unlink()
    os.rename(partial, folder)
    sync(folder.parent)


def _prepare(partial: Path, job: FeatureJob, device: str) -> dict[int, list[int]]:
    """The partial folder with its files at full size, whose shapes are returned; one of the same key is continued."""
    key, begun = job.key, partial / "begun.json"
    require_own(partial, KIND, lambda folder: (folder / "begun.json").is_file())
    kind = np.float16 if key.format == "half" else np.int8
    try:
        if begun.exists() and read_object(begun, partial) == asdict(key):
            shapes = _shapes(load_statistics(partial, key.layers), job)
            for t, shape in shapes.items():
                size = regular_file(partial / f"layer-{t}.npy", partial).stat().st_size
                if size != len(npy_header(shape, kind)) + max(1, math.prod(shape) * np.dtype(kind).itemsize):
                    raise KeyError(f"layer-{t}.npy of {size} bytes")
            return shapes
    except (SafetensorError, KeyError, AttributeError) as error:
        raise BurnishError(f"{partial} is damaged ({error!r})", "a whole one", f"rm -r '{partial}'") from error
    remove_folder(partial)
    gigabytes = job.bytes_per_frame * job.num_frames / 1e9
    log.info("features of %s: %.3g MB a frame, %.3g GB for %d frames, in %s",
             key.teacher["name"], job.bytes_per_frame / 1e6, gigabytes, job.num_frames, partial.parent)  # fmt: skip
    if key.format == "half":
        _require_room(partial, job.bytes_per_frame * job.num_frames)
    statistics = fit_statistics(job, device)
    shapes = _shapes(statistics, job)
    _require_room(partial, sum(math.prod(s) for s in shapes.values()) * np.dtype(kind).itemsize)
    with new_folder(partial) as folder:
        mark(folder, KIND)
        named = {
            f"{name}.{t}": value.contiguous()
            for t, s in statistics.items()
            for name, value in zip(NAMES, s.tensors(), strict=True)
            if value is not None
        }
        save_file(named, folder / "statistics.safetensors")
        for t, shape in shapes.items():
            _empty_array(folder / f"layer-{t}.npy", shape, kind)
        np.zeros(-(-job.num_frames // BLOCK), np.uint8).tofile(folder / "done")
        write_json(folder / "begun.json", asdict(key))
    return shapes


def _require_room(partial: Path, num_bytes: int) -> None:
    less = "less with fewer pairs, cache_format: pca, or cache: 'off', which runs the teacher at every step"
    require_space(partial.parent, num_bytes, f"{partial} ({less})")


def _shapes(statistics: dict[int, Statistics], job: FeatureJob) -> dict[int, list[int]]:
    views = [job.num_frames, len(job.key.cameras), *job.key.grid]
    return {t: [*views, s.mean.shape[-1] if s.basis is None else len(s.basis)] for t, s in statistics.items()}


def fit_statistics(job: FeatureJob, device: str) -> dict[int, Statistics]:
    """Statistics of each layer from frames drawn all over the data set; the same ones for the same data."""
    key = job.key
    if not key.standardise and key.format == "half":  # features are kept as they are
        places = (len(key.cameras), *key.grid)
        return {t: Statistics(torch.zeros(*places, job.widths[t]), torch.ones(job.widths[t])) for t in key.layers}
    rng = np.random.default_rng(derive_seed("align statistics", key.data))
    chosen = np.sort(rng.permutation(job.num_frames)[:SAMPLE])
    teacher, fits = job.teacher(device), {t: Fit(key) for t in key.layers}
    with closing(FrameViews(job.source)) as views:
        for first in range(0, len(chosen), BLOCK):
            found = teacher(views(*job.block(chosen[first : first + BLOCK])).to(device))
            for t, features in found.items():
                fits[t].add(features)
    return {t: fit.statistics() for t, fit in fits.items()}


def _empty_array(path: Path, shape: Sequence[int], kind) -> None:
    """A .npy file of full size; the space is taken now, so that a full disk shows before hours of work."""
    header, size = npy_header(shape, kind), math.prod(shape) * np.dtype(kind).itemsize
    with open(path, "wb") as file:
        file.write(header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, len(header) + max(1, size))


def fill_blocks(
    blocks: Iterable[Block], job: FeatureJob, folder: Path, device: str
) -> Generator[np.ndarray, None, None]:
    """Compute each block and write it where it belongs; yields the indices of its frames when they are written."""
    statistics, teacher = load_statistics(folder, job.key.layers), job.teacher(device)
    with ExitStack() as opened:
        views = opened.enter_context(closing(FrameViews(job.source)))
        files = {t: opened.enter_context(open(folder / f"layer-{t}.npy", "r+b")) for t in job.key.layers}
        starts = {t: np.load(file.name, mmap_mode="r", allow_pickle=False).offset for t, file in files.items()}
        for frames, states in blocks:
            for t, features in teacher(views(frames, states).to(device)).items():
                stored = statistics[t].encode(features.cpu()).contiguous().numpy()
                if stored.dtype == np.float16 and not np.isfinite(stored).all():
                    raise BurnishError(f"features of teacher layer {t} exceed half precision", "values below 65504",
                                       "cache_format: pca")  # fmt: skip
                data = stored.tobytes()
                place = starts[t] + int(frames[0]) * (len(data) // len(frames))
                # A memory map on a full disk dies of SIGBUS; a positioned write raises an error that can be reported.
                with disk_errors(folder):
                    if os.pwrite(files[t].fileno(), data, place) != len(data):
                        raise OSError(28, "no space left")
            yield frames


def _fill_in_process(blocks: Iterable[Block], job: FeatureJob, folder: Path) -> Generator[np.ndarray, None, None]:
    torch.set_num_threads(1)
    yield from fill_blocks(blocks, job, folder, "cpu")


def run_blocks(
    job: FeatureJob, folder: Path, indices: Sequence[np.ndarray], workers: int, device: str
) -> Iterator[np.ndarray]:
    """Compute and write blocks of frames; yields the indices of each block as it is finished."""
    count = min(count_workers(workers), max(1, len(indices) // 4))
    blocks = map(job.block, indices)
    if torch.device(device).type != "cpu" or count < 2:
        yield from fill_blocks(blocks, job, folder, device)
        return
    lean = replace(job, states=None)  # states travel with their blocks
    names = {"name": "the process for teacher features", "fix": "run the same command again to continue"}
    with WorkerPool(_fill_in_process, lean, folder, count=count, **names) as pool:
        for _, frames in pool.run(blocks, label=lambda block: f"frames {block[0][0]} to {block[0][-1]}"):
            yield frames
