"""What student and teacher layers have in common, measured on a data set before anything is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.progress import progress_bar
from burnish.core.seeding import generator
from burnish.data.loader import to_device
from burnish.methods.align.aligner import token_grid
from burnish.methods.align.layers import StreamingCka, by_depth, choose_pairs, match_by_cka, similar_layers
from burnish.methods.align.objective import Align, cache_key, place_views
from burnish.methods.align.targets import choose_teacher, make_targets
from burnish.methods.objective import Run
from burnish.teachers.base import make_teacher


@dataclass
class Comparison:
    """CKA [student layers, teacher layers]; mean cosine of each student layer with the next one; tokens used."""

    cka: np.ndarray
    similarity: list[float]
    tokens: int


@torch.no_grad()
def compare_layers(run: Run, objective: Align, batches: int, progress: bool = True) -> Comparison:
    """Run student and teacher over some batches of a run's data.

    Args:
        run: with the policy as it starts.
        objective: whose teacher is meant; not set up.
    """
    policy, config = run.policy, objective.config
    layers = list(range(policy.num_layers))
    cka, sums, targets, tokens = None, torch.zeros(len(layers) - 1), None, 0
    policy.eval()
    for k in progress_bar(range(batches), desc="comparing layers", unit="batch", shown=progress):
        batch = student_batch(run, k)
        with policy.capture(layers) as captured:
            policy.loss(batch, policy.draw(len(batch["action"]), generator("align select", k, device=str(run.device))))
        if targets is None:
            placements = place_views(run)
            grid = token_grid(captured, policy.cameras, placements)
            spec = config.teacher or choose_teacher(Path(run.data.root), policy.cameras)
            teacher = make_teacher(spec, grid)
            pairs = [(0, t) for t in range(len(teacher.widths))]
            key = cache_key(config, teacher, pairs, run.data, policy.cameras, grid, placements)
            shown = key.shown().flatten()
            targets = make_targets(spec, teacher, key, run.data, cache="off", device=run.device)
            cka = StreamingCka([captured.hidden[i].shape[-1] for i in layers], teacher.widths)
        states = [image_tokens(captured, captured.hidden[i], policy.cameras) for i in layers]
        student = [tokens[:, shown].flatten(0, 1) for tokens in states]
        cka.add(student, [t.flatten(1, 3)[:, shown].flatten(0, 1) for t in targets(batch).values()])
        sums += torch.stack(
            [F.cosine_similarity(a, b, dim=-1).mean().cpu() for a, b in zip(student, student[1:], strict=False)]
        )
        tokens += len(student[0])
    return Comparison(cka.matrix(), (sums / batches).tolist(), tokens)


def student_batch(run: Run, k: int) -> dict[str, Any]:
    """Batch k of a run's data without augmentation, on its device."""
    batch = run.data.raw(k)
    for key in run.data.cameras:
        batch[key] = batch[key].permute(0, 3, 1, 2).float() / 255
    return to_device(batch, run.device)


def image_tokens(captured, hidden_BSD: Tensor, cameras) -> Tensor:
    """[B, V * T, D] the rows of the image tokens."""
    return torch.cat([hidden_BSD[:, captured.cameras[camera]] for camera in cameras], 1)


def all_selections(comparison: Comparison, count: int) -> dict[str, list[tuple[int, int]]]:
    """The pairs that every strategy chooses."""
    num_student, num_teacher = comparison.cka.shape
    chosen = {
        name: choose_pairs(name, count, num_student, num_teacher)
        for name in ("depth", "single", "e2m_last1", f"uniform-{count}", "shallow", "middle", "deep")
    }
    for name, top in (("sim-1-top", True), ("sim-1-last", False)):
        students = similar_layers(comparison.similarity, min(count, num_student - 1), top=top)
        chosen[name] = by_depth(students, num_student, num_teacher)
    chosen["cka"] = match_by_cka(comparison.cka, min(count, num_student, num_teacher))
    return chosen
