"""Figures: the CKA heatmap, gradients over training, and what aligned tokens see."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from burnish.core.figures import new_figure, save_figure
from burnish.methods.align.analysis import Comparison


def draw_cka(comparison: Comparison, pairs: Sequence[tuple[int, int]], path: Path) -> None:
    """CKA of all layers, the best one-to-one matching marked."""
    rows, columns = comparison.cka.shape
    figure = new_figure(1.6 + 0.55 * columns, 1.4 + 0.5 * rows)
    axes = figure.subplots()
    image = axes.imshow(comparison.cka, vmin=0, vmax=max(0.1, float(comparison.cka.max())), cmap="viridis")
    axes.set(xlabel="teacher layer", ylabel="student layer", xticks=range(columns), yticks=range(rows))
    for row in range(rows):
        for column in range(columns):
            axes.text(
                column, row, f"{comparison.cka[row, column]:.2f}", ha="center", va="center", size=7, color="white"
            )
    for student, teacher in pairs:
        axes.plot(teacher, student, "s", mfc="none", mec="red", ms=18)
    axes.set_title(f"linear CKA over {comparison.tokens} tokens", size=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    save_figure(figure, path, dpi=130)


def draw_gradients(runs: dict[str, list[dict]], path: Path) -> None:
    """Coherence, cosine with the task, push and lambda over training, a line for each run.

    Args:
        runs: name to the rows of its metrics.jsonl.
    """
    from burnish.core.errors import BurnishError

    wanted = {
        "align_coherence_": "coherence of the pairs' gradients", "align_task_cosine_": "cosine with the task",
        "align_push_": "alignment gradient", "align_lambda": "lambda",
        "align_projector_similarity": "projectors' cosine",
    }  # fmt: skip
    if not any(key.startswith("align_") for rows in runs.values() for row in rows for key in row):
        raise BurnishError(f"no align figures in {', '.join(runs)}", "runs with the objective align")
    pairs = sorted({key for rows in runs.values() for row in rows for key in row if _is_pair(key)})
    figure = new_figure(12, 6)
    grid = figure.subplots(2, 3).ravel()
    for axes, (prefix, title) in zip(grid, wanted.items(), strict=False):
        for name, rows in runs.items():
            keys = sorted({key for row in rows for key in row if key.startswith(prefix)})
            for key in keys[:1]:  # the shallowest layer: what alignment does to all that follow
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                axes.plot(*zip(*points, strict=True), label=name, lw=1.2)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    for name, rows in runs.items():
        for key in pairs:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                grid[5].plot(*zip(*points, strict=True), label=f"{name} {key.removeprefix('align_')}", lw=0.9)
    grid[5].set(title="loss of each pair", xlabel="step")
    grid[5].legend(fontsize=5, ncols=2)
    grid[0].legend(fontsize=7)
    save_figure(figure, path, dpi=130)


def _is_pair(key: str) -> bool:
    parts = key.split("_")
    return len(parts) == 3 and parts[0] == "align" and parts[1].isdigit() and parts[2].isdigit()


def principal(tokens_ND: Tensor) -> Tensor:
    """[N, 3] the first three principal components, each scaled to unit variance."""
    centred = tokens_ND.double() - tokens_ND.double().mean(0)
    left, _, _ = torch.linalg.svd(centred, full_matrices=False)
    return left[:, :3] * len(centred) ** 0.5


def turned_like(components_N3: Tensor, reference_N3: Tensor) -> Tensor:
    """Rotated (and mirrored) to agree with the reference, so that equal colours mean equal things."""
    left, _, right = torch.linalg.svd(components_N3.T @ reference_N3)
    return components_N3 @ (left @ right)


def draw_tokens(images: np.ndarray, rows: dict[str, Tensor], grid: tuple[int, int], path: Path) -> None:
    """Images on top, below them for each name its tokens coloured by three principal components.

    Args:
        images: [n, H, W, 3] uint8 shown.
        rows: name to tokens [N, D] of N / (h * w) images, of which the first n are shown; the first name is the
            reference for colours.
        grid: tokens h, w of an image.
    """
    count = len(images)
    figure = new_figure(1.3 * count + 1.2, 1.35 * (len(rows) + 1))
    axes = figure.subplots(len(rows) + 1, count, squeeze=False)
    reference = None
    for ax, image in zip(axes[0], images, strict=True):
        ax.imshow(image)
    for line, (name, tokens) in zip(axes[1:], rows.items(), strict=True):
        parts = principal(tokens)
        reference = parts if reference is None else reference
        parts = turned_like(parts, reference)
        shown = (0.5 + parts / 4).clamp(0, 1).reshape(-1, *grid, 3)[:count].numpy()
        for ax, colours in zip(line, shown, strict=True):
            ax.imshow(colours)
        line[0].set_ylabel(name, size=8)
    axes[0, 0].set_ylabel("image", size=8)
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
    save_figure(figure, path, dpi=130)
