"""`python -m workshop align-gradients|align-tokens`: the figures of docs/methods/align.md, from run folders."""

import argparse
from json import loads
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.figures import new_figure, save_figure
from burnish.core.recipe import load_recipe
from burnish.core.seeding import generator
from burnish.methods.align.analysis import image_tokens, student_batch
from burnish.methods.align.objective import Align
from burnish.methods.objective import Run
from burnish.policies import load_policy
from burnish.policies.base import Policy

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


def draw_gradients(runs: dict[str, list[dict]], path: Path) -> None:
    """Coherence, cosine with the task, push and lambda over training, a line for each run.

    Args:
        runs: name to the rows of its metrics.jsonl.
    """
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop align-tokens runs/align/core/single-0 --figure tokens.png"
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the first one's teacher is shown")
    parser.add_argument("--layer", type=int, default=-1, help="align-tokens: student layer; the deepest aligned one")
    parser.add_argument("--figure", "--picture", type=Path, default=Path("align.png"), help="where the figure goes")


def main(args: argparse.Namespace) -> int:
    {"align-gradients": _gradients, "align-tokens": _tokens}[args.command](args)
    print(args.figure)
    return 0


def _gradients(args: argparse.Namespace) -> None:
    rows = {}
    for folder in args.runs:
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise BurnishError(f"no metrics.jsonl in {folder}", "a run folder")
        rows[folder.name] = [loads(line) for line in path.read_text().splitlines()]
    draw_gradients(rows, args.figure)


def _tokens(args: argparse.Namespace) -> None:
    from burnish.train.run import Run as TrainingRun
    from burnish.train.setup import own_accelerate_state

    recipe = load_recipe(args.runs[0] / "recipe.yaml", ["--train.batch_size=128", "--train.self_check=false"])
    recipe.objectives = [entry for entry in recipe.objectives if entry["name"] == "align"]
    if not recipe.objectives:
        raise BurnishError(f"{args.runs[0]} was trained without the objective align", "an aligned run first")
    with own_accelerate_state():
        run = TrainingRun(recipe, progress=False)
        policies = {folder.name: load_policy(folder / "policy") for folder in args.runs}
        show_tokens(run, run.objectives["align"], {"before": run.policy, **policies}, args.layer, args.figure)
