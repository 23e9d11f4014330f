"""Batches from several data sets: which samples, and the data sets behind one another as if they were one."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from burnish.core.config import RecipeConfig
from burnish.core.seeding import derive_seed
from burnish.core.types import Batch
from burnish.data.features import ACTION, STATE
from burnish.data.frames import FrameCache
from burnish.data.loader import BatchSampler, RobotData
from burnish.data.mix import BLOCK, Source, as_first, joint_hash, quotas, write_sources
from burnish.data.streamed import JoinedFrames
from burnish.policies.base import Policy


class MixSampler(BatchSampler):
    """Which samples of several data sets form batch k.

    The order is one endless sequence, cut up by batches and ranks. In every BLOCK of it each data set has its exact
    share, spread evenly, and each is gone through in shuffled epochs of its own: all of it follows from seed and
    position, so that any run can go on from any step with any number of ranks.

    Args:
        counts: [D] samples of each data set.
        weights: [D] how often they are drawn from, relative to one another.
        batch_size, seed, rank, world: see `BatchSampler`.
    """

    def __init__(
        self, counts: Sequence[int], weights: Sequence[float], batch_size: int, seed: int, rank: int = 0, world: int = 1
    ):
        super().__init__(int(sum(counts)), batch_size, (seed, "robot"), rank, world)
        self.quotas = quotas(weights)
        self.firsts = np.cumsum([0, *counts])[:-1]
        # The first data set goes through its samples as it does alone.
        self.orders = [BatchSampler(n, 1, (seed, "robot", *([d] if d else []))) for d, n in enumerate(counts)]
        self._block = lru_cache(maxsize=4)(lambda block: _interleave(self.quotas, derive_seed(seed, "mix", block)))

    def at(self, places: np.ndarray) -> np.ndarray:
        """Indices among all samples, one data set behind the other."""
        found, blocks = np.empty(len(places), np.int64), places // BLOCK
        for block in np.unique(blocks).tolist():
            here = np.flatnonzero(blocks == block)
            sets, turns = (part[places[here] % BLOCK] for part in self._block(block))
            for d in np.unique(sets).tolist():
                mine = sets == d
                drawn = self.orders[d].at(turns[mine] + block * self.quotas[d])
                found[here[mine]] = self.firsts[d] + drawn
        return found


def _interleave(quota: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """[BLOCK] the data set at each position of a block, and how many of its samples come before in the block."""
    rng = np.random.default_rng(seed)
    turns = [np.arange(count) for count in quota]
    order = np.argsort(np.concatenate([(t + rng.random(len(t))) / len(t) for t in turns]), kind="stable")
    return np.repeat(np.arange(len(quota)), quota)[order], np.concatenate(turns)[order]


class MixedData(RobotData):
    """Several data sets as training batches, with their rows one behind the other.

    A batch also says which data set each sample is of ("dataset_index", int64 [B]); its "index" is the place among all
    rows, its "episode_index" the data set's own. Where a data set lacks a camera its pictures are black, and
    "<camera's key>_padding_mask" [B] is false there.

    Args:
        sources: what was opened; `sources[0].meta` has the statistics that the policy normalises with.
        parts: the batches of each.
        statistics: see `DataConfig.statistics`; for "own" the parts' numbers have been mapped already.
        batch_size, seed, rank, world: see `BatchSampler`.
    """

    several = True

    def __init__(self, sources: Sequence[Source], parts: Sequence[RobotData], statistics: str, batch_size: int,
                 seed: int, *, rank: int = 0, world: int = 1):  # fmt: skip
        first, firsts = parts[0], np.cumsum([0, *(len(part.actions) for part in parts)])
        self.sources, self.statistics, self.first_rows = list(sources), statistics, firsts
        self.meta, self.root, self.cameras = first.meta, first.root, first.cameras
        self.chunk_size, self.augmented, self.seed, self.rank = first.chunk_size, first.augmented, seed, rank
        self.window = first.window
        self.actions = np.concatenate([part.actions for part in parts])
        self.states = None if first.states is None else np.concatenate([part.states for part in parts])
        self.episode_index = np.concatenate([part.episode_index for part in parts])
        ids = np.cumsum([0, *(1 + max([*part.tasks, int(part.task_index.max())]) for part in parts)])
        self.task_index = np.concatenate([part.task_index + i for part, i in zip(parts, ids, strict=False)])
        self.tasks = {task + int(i): text for part, i in zip(parts, ids, strict=False)
                      for task, text in part.tasks.items()}  # fmt: skip
        self.starts, self.ends, self.indices = (
            np.concatenate([getattr(part, name) + row for part, row in zip(parts, firsts, strict=False)])
            for name in ("starts", "ends", "indices")
        )
        self.hashes = [part.hash for part in parts]
        arrays = {}
        for key in self.cameras:
            seen = [part.frames.arrays.get(key, len(part.actions)) for part in parts]
            arrays[key] = JoinedFrames(seen, tuple(seen[0].shape[1:3]))
        self.frames = FrameCache(arrays, joint_hash(self.hashes))
        counts, weights = [len(part.indices) for part in parts], [source.weight for source in sources]
        self.sampler = MixSampler(counts, weights, batch_size, seed, rank, world)

    def raw(self, k: int) -> Batch:
        batch = super().raw(k)
        which = np.searchsorted(self.first_rows, batch["index"].numpy(), side="right") - 1
        batch["dataset_index"] = torch.from_numpy(which)
        for key in self.cameras:
            lacking = [d for d, source in enumerate(self.sources) if key in source.absent]
            if lacking:
                batch[f"{key}_padding_mask"] = torch.from_numpy(~np.isin(which, lacking))
        return batch

    def describe(self, folder: Path) -> None:
        write_sources(self.sources, self.statistics, self.hashes, folder)


def training_data(
    recipe: RecipeConfig, sources: Sequence[Source], policy: Policy, progress: bool, rank: int = 0, world: int = 1
) -> RobotData:
    """The batches of a recipe for a policy; of several data sets where it names several."""
    data, size, seed = recipe.data, recipe.train.batch_size, recipe.train.seed
    frames = sum(len(source.meta.rows) for source in sources)

    def part(source: Source, cameras: Sequence[str]) -> RobotData:
        return RobotData(
            source.root, cameras, policy.chunk_size, size, seed, episodes=source.episodes, image_size=data.image_size,
            cache_dir=data.cache_dir, cache_gb=data.cache_gb * len(source.meta.rows) / frames, seen=policy.input_size,
            augmented=data.augment, rank=rank, world=world, progress=progress, meta=source.meta,
            window=policy.window,
        )  # fmt: skip

    parts = [part(sources[0], policy.cameras)]
    if len(sources) == 1:
        return parts[0]
    for source in sources[1:]:
        one = part(source, [key for key in parts[0].cameras if key not in source.absent])
        if data.statistics == "own":
            for name, kind in ((ACTION, "ACTION"), (STATE, "STATE")):
                _to_first(one, name, source, sources[0], policy.normalization(kind))
        parts.append(one)
    return MixedData(sources, parts, data.statistics, size, seed, rank=rank, world=world)


def _to_first(data: RobotData, name: str, source: Source, first: Source, mode: str) -> None:
    """Map actions or states of a data set so that the first one's statistics normalise them as its own would."""
    if name == ACTION:
        data.actions = as_first(data.actions, source.stats[name], first.stats[name], mode)
    elif data.states is not None:
        data.states = as_first(data.states, source.stats[name], first.stats[name], mode)
