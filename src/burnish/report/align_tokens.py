"""Tokens of a policy before and after training beside those of its teacher, as one figure."""

from pathlib import Path

import torch
from torch import Tensor

from burnish.core.seeding import generator
from burnish.methods.align.analysis import image_tokens, student_batch
from burnish.methods.align.objective import Align
from burnish.methods.objective import Run
from burnish.policies.base import Policy
from burnish.report.align_plots import draw_tokens

SHOWN = 8
"""Images shown; the principal components are those of the whole batch."""


@torch.no_grad()
def show_tokens(run: Run, objective: Align, policies: dict[str, Policy], layer: int, path: Path) -> None:
    """Draw image, teacher and each policy's tokens, coloured by three principal components.

    Args:
        run: says the data; its first batch is used.
        objective: set up; says teacher and pairs.
        policies: name to policy, in the order of the rows.
        layer: student layer; negative means the deepest aligned one.
        path: PNG to write.
    """
    student, teacher = max(objective.aligner.pairs)
    student = student if layer < 0 else layer
    batch = student_batch(run, 0)
    rows: dict[str, Tensor] = {f"teacher\nlayer {teacher}": objective.targets(batch)[teacher].flatten(1, 3)}
    for name, policy in policies.items():
        policy.eval()
        draws = policy.draw(len(batch["action"]), generator("align picture"))
        with policy.capture([student]) as captured:
            policy.loss(batch, draws)
        rows[f"{name}\nlayer {student}"] = image_tokens(captured, captured.hidden[student], policy.cameras)
    # Without the mean of each place all would show the same: where in the image a token lies.
    rows = {name: (tokens - tokens.mean(0)).flatten(0, 1) for name, tokens in rows.items()}
    images = batch[run.data.cameras[0]][:SHOWN].permute(0, 2, 3, 1)
    height, width = objective.targets.key.grid
    draw_tokens((images * 255).byte().numpy(), rows, (height * len(run.policy.cameras), width), path)
