"""Does the score of a flow policy order chunks as its exact log-probability does?"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.progress import progress_bar
from burnish.core.seeding import generator
from burnish.core.types import Batch, Draws
from burnish.data.dataset import open_named
from burnish.data.loader import RobotData, to_device
from burnish.methods.prefer.draws import ScoreConfig, weigh
from burnish.methods.prefer.scoring import one_set
from burnish.policies.base import Policy, require
from burnish.runtime.flow_likelihood import agreement, ode_scores

_BATCH = 8
"""Observations in a forward pass."""


def verify_score(
    policy: Policy, data: Path | str, *, reference: Policy | None = None, observations: int = 16, candidates: int = 4,
    draws: Sequence[int] = (1, 4, 16, 64), steps: int = 24, probes: int = 0, disturbance: float = 0.3, seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare scores with exact log-probabilities.

    Args:
        data: LeRobot data set with its cameras.
        reference: the policy before preference optimisation; None compares plain differences of scores.
        observations, candidates: how many, and chunks for each.
        steps, probes: see burnish.runtime.flow_likelihood.ode_scores.
        disturbance: standard deviation of the noise on the disturbed chunk, in standard deviations of the actions.

    Returns:
        One row for each weight (elbo, uniform), number of draws, and shared or independent draws: rank_correlation,
        sign_agreement, both against the exact value.

    Raises:
        BurnishError: a policy that is no flow policy, or numbers out of range.
    """
    if steps < 1 or probes < 0 or not draws or min(draws) < 1 or not disturbance >= 0:
        raise BurnishError(f"steps {steps}, probes {probes}, draws {draws}, disturbance {disturbance}",
                           "steps and draws from 1, the others from 0")  # fmt: skip
    models = [policy] if reference is None else [policy, reference]
    for model in models:
        require(model, "velocity", "verify score")
        model.eval()
    if reference is not None and reference.chunk_size != policy.chunk_size:
        raise BurnishError(f"a reference with chunks of {reference.chunk_size} steps", f"{policy.chunk_size}")
    sets = _candidates(policy, Path(data), observations, candidates, disturbance, seed)
    truth = _exact(models, sets, steps, probes, seed, progress)
    rows = []
    for name, config in (("elbo", ScoreConfig()), ("uniform", ScoreConfig(times="uniform", weight="uniform"))):
        for count in draws:
            for shared in (True, False):
                settings = replace(config, draws=count, shared=shared)
                found = torch.cat([_margin(models, batch, chunks, settings, seed) for batch, chunks in sets])
                rows.append({"weight": name, "draws": count, "shared": shared, **agreement(found, truth)})
    return rows


def _candidates(
    policy: Policy, root: Path, count: int, candidates: int, disturbance: float, seed: int
) -> list[tuple[Batch, Tensor]]:
    """(batch, chunks [B, C, T, A]) in groups: the data's chunk, a disturbed one, samples of the policy."""
    if candidates < 2 or count < 1:
        raise BurnishError(f"{count} observations of {candidates} candidates", "at least 1 of 2")
    data = RobotData(root, policy.cameras, policy.chunk_size, min(count, _BATCH), seed, augmented=False,
                     cache_gb=0, window=policy.window, meta=open_named(root))  # fmt: skip
    random = generator("verify score", seed)
    scale = torch.from_numpy(data.actions.std(0))
    found = []
    for k in range(-(-count // _BATCH)):
        batch = data.finish(data.raw(k), k)
        chunk = batch["action"]
        batch = {key: v for key, v in batch.items() if key == "task" or key.startswith("observation.")}
        chunks = [chunk, chunk + disturbance * scale * torch.randn(chunk.shape, generator=random)]
        chunks += [policy.act(batch, policy.draw(len(chunk), random)).actions for _ in range(candidates - 2)]
        found.append((batch, torch.from_numpy(np.stack([c.float().cpu().numpy() for c in chunks], 1))))
    return found


def _exact(
    models: list[Policy], sets: list[tuple[Batch, Tensor]], steps: int, probes: int, seed: int, progress: bool
) -> Tensor:
    """[observations, C] exact log-probabilities, less those of the reference."""
    with progress_bar(
        total=len(sets) * len(models), desc="exact log-probabilities", unit="batch", shown=progress
    ) as bar:
        exact = []
        for batch, chunks in sets:
            values = []
            for model in models:
                values.append(ode_scores(model, batch, chunks, steps=steps, probes=probes, seed=seed))
                bar.update()
            exact.append(values[0] - values[1] if len(values) == 2 else values[0])
    return torch.cat(exact)


@torch.no_grad()
def _margin(models: list[Policy], batch: Batch, chunks: Tensor, config: ScoreConfig, seed: int) -> Tensor:
    """[B, C] scores, less those of the reference."""
    B, C = chunks.shape[:2]
    device = next(models[0].parameters()).device
    observed = to_device(batch, device)
    scores = []
    for m, model in enumerate(models):
        columns = []
        for c in range(C):
            label = () if config.shared else (m, c)
            sets = [one_set(model, replace(config, shared=True), "verify", seed, b, *label) for b in range(B)]
            draws = Draws(torch.stack([s.draws.noise for s in sets]), torch.stack([s.draws.time for s in sets]))
            per_draw = model.scores(observed, chunks[:, c : c + 1].to(device), draws)
            columns.append(weigh(per_draw, torch.stack([s.weight for s in sets]).to(device)).mean(-1)[:, 0])
        scores.append(torch.stack(columns, 1).cpu())
    return scores[0] - scores[1] if len(scores) == 2 else scores[0]
