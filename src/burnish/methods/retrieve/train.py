"""Training a head alone, on features that an encoder has left beside a data set: minutes on a CPU."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.progress import progress_bar
from burnish.core.seeding import derive_seed, generator
from burnish.data.vectors import Vectors
from burnish.methods.retrieve.head import Head, Moments, partner_frames, save_head
from burnish.methods.retrieve.options import RetrieveConfig

SHOWN = 100
"""Steps whose mean loss is reported."""


class _Frames:
    """Features, and who is who, of the frames that are trained on."""

    def __init__(self, features: Vectors, config: RetrieveConfig):
        views = min(config.cameras or features.values.shape[1], features.values.shape[1])
        self.features = torch.from_numpy(np.array(features.values[:, :views]))
        episodes, self.starts, counts = np.unique(features.frames["episode"], return_index=True, return_counts=True)
        self.ends, self.place = self.starts + counts, np.repeat(np.arange(len(episodes)), counts)
        self.time, self.length = np.array(features.frames["time"]), np.array(features.frames["length"])
        tasks, self.which = np.unique(features.frames["task"], return_inverse=True)
        self.texts = [features.instruction(task) or f"task {task}" for task in tasks]
        self.every, self.config = int(features.about["every"]), config

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Anchors [B]: `frames` from each of so many episodes, or with 1 from anywhere."""
        config = self.config
        if config.frames == 1:
            return rng.integers(len(self.time), size=config.batch)
        count = -(-config.batch // config.frames)
        chosen = rng.permutation(len(self.starts))[:count] if count <= len(self.starts) else rng.integers(
            len(self.starts), size=count)  # fmt: skip
        spots = rng.random((count, config.frames)) * (self.ends - self.starts)[chosen][:, None]
        return (self.starts[chosen][:, None] + spots.astype(int)).flatten()[: config.batch]

    def moments(self, rows: np.ndarray) -> Moments:
        return Moments(torch.from_numpy(self.place[rows]), torch.from_numpy(self.time[rows]))

    def partners(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        at = self.place[rows]
        config = self.config
        if self.every > 1:  # frames in between are not there: the next one kept is as near as it gets
            config = RetrieveConfig(window=max(1, config.window // self.every), exact=config.exact)
        return partner_frames(rng, rows, self.starts[at], self.ends[at], config)

    def losses(self, head: Head, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = self.draw(rng)
        others = self.partners(rng, rows)
        vectors = head(self.features[np.concatenate([rows, others])].float())
        remaining = torch.from_numpy(self.length[rows] - self.time[rows])
        return head.losses(vectors[: len(rows)], vectors[len(rows) :], self.moments(rows), self.moments(others),
                           remaining, torch.from_numpy(self.which[rows]), self.texts)  # fmt: skip


def train_head(
    features: Vectors, config: RetrieveConfig, *, seed: int = 0, progress: bool = True
) -> tuple[Head, dict[str, float]]:
    """A head trained on features by AdamW (cosine to 0, gradients clipped to norm 1), and the mean of its last losses.

    Args:
        features: of the training episodes alone.
    """
    frames = _Frames(features, config)
    if len(frames.starts) < 2:
        raise BurnishError("retrieve: one episode to train on", "several: other episodes are the negatives")
    head = Head(features.values.shape[-1], config, generator("retrieve head", seed))
    if config.standardise:
        head.standardise(frames.features.float())
    if not config.hidden:
        return head.eval().requires_grad_(False), {}
    trained = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay)
    steps = max(1, math.ceil(config.epochs * len(frames.time) / config.batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng, seen = np.random.default_rng(derive_seed("retrieve batches", seed)), []
    for step in progress_bar(range(steps), desc="head", unit="step", shown=progress):
        terms = frames.losses(head, rng)
        if not terms:
            raise BurnishError("retrieve: no loss is left", "a weight above 0, of views where there are several")
        optimizer.zero_grad()
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step >= steps - SHOWN:
            seen.append({name: term.detach() for name, term in terms.items()})
    means = {name: float(torch.stack([one[name] for one in seen]).mean()) for name in seen[0]}
    return head.eval().requires_grad_(False), {**means, "temperature": float(1 / head.scale), "steps": float(steps)}


def train_and_save(
    features: Vectors, config: RetrieveConfig, folder: Path, *, episodes: Sequence[int] = (), seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """`train_head` on some episodes (none named: all) and its folder; returns what was found, with "minutes"."""
    unknown = sorted(set(episodes) - set(features.frames["episode"].tolist()))
    if unknown:
        raise BurnishError(f"retrieve: no episode {unknown[0]}", f"those of {features.about['root']}")
    chosen = features.of(np.isin(features.frames["episode"], episodes)) if episodes else features
    begin = time.perf_counter()
    head, losses = train_head(chosen, config, seed=seed, progress=progress)
    minutes = (time.perf_counter() - begin) / 60
    about = {name: features.about[name] for name in ("spec", "data", "cameras", "every")}
    digest = save_head(folder, head, features.about["encoder"], **about, seed=seed, losses=losses, minutes=minutes,
                       episodes=sorted(set(chosen.frames["episode"].tolist())), frames=len(chosen.frames))  # fmt: skip
    return {**losses, "minutes": minutes, "hash": digest, "frames": len(chosen.frames)}
