"""Training the scene3d teacher on scenes of the simulator, and its accuracy on scenes that it has not seen."""

import argparse
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.files import new_folder, write_json
from burnish.core.options import refuse_unknown
from burnish.core.recipe import find_recipe, read_yaml
from burnish.core.seeding import derive_seed, generator, seeded
from burnish.data.augment import colour_jitter
from burnish.teachers.scene3d import DEFAULTS, SceneNet
from workshop.scene_data import make_scenes

HELD_OUT_SEED = 7_000_000
ABOVE = 0.008
"""Metres above the table from which a point counts as an object's, the hand's or the arm's."""


@dataclass
class SceneRecipe:
    """What is trained; read from a YAML file."""

    output: str = "data/teachers/scene3d"
    data: str = "data/scene3d"
    """Where scenes are kept."""
    scenes: int = 12000
    held_out: int = 512
    steps: int = 2500
    batch_size: int = 32
    lr: float = 2.0e-3
    warmup_steps: int = 100
    above_weight: float = 4.0
    """Weight of places above the table: unweighted, the net answers the empty table for thousands of steps."""
    one_view: float = 0.6
    """Share of batches that show the first view only."""
    seed: int = 0
    model: dict[str, int] = field(default_factory=lambda: dict(DEFAULTS))


def read_scene_recipe(path: Path) -> SceneRecipe:
    """Raises BurnishError for a missing file or an unknown key."""
    values = read_yaml(find_recipe(path))
    refuse_unknown(SceneRecipe, values, str(path), "key")
    recipe = SceneRecipe(**values)
    recipe.model = {**DEFAULTS, **recipe.model}
    return recipe


def train_scene_net(recipe: SceneRecipe, progress: bool = True) -> dict[str, Any]:
    """Train, measure on held-out scenes, write the folder; a finished folder of this recipe is left as it is.

    Returns:
        Facts: the recipe, minutes, and accuracy for one and two views.
    """
    import json

    target = Path(recipe.output)
    done = target / "config.json"
    if done.is_file() and json.loads(done.read_text()).get("recipe") == asdict(recipe):
        return json.loads(done.read_text())
    size, points = (
        recipe.model["image_size"],
        recipe.model["image_size"] // recipe.model["patch"] * recipe.model["cells"],
    )
    data = make_scenes(Path(recipe.data) / "train", recipe.scenes, size, points, recipe.seed, progress)
    held_out = make_scenes(Path(recipe.data) / "held_out", recipe.held_out, size, points, HELD_OUT_SEED, progress)
    begin = time.monotonic()
    net = _train(recipe, data, progress)
    facts = {
        "model": recipe.model,
        "recipe": asdict(recipe),
        "minutes": (time.monotonic() - begin) / 60,
        "accuracy": accuracy(net, held_out),
    }
    from safetensors.torch import save_file

    with new_folder(target) as folder:
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")
        write_json(folder / "config.json", facts)
    return facts


def _train(recipe: SceneRecipe, data: Path, progress: bool) -> SceneNet:
    from tqdm import tqdm

    images, maps = _open(data)
    sample = torch.from_numpy(np.array(maps[:512])).float()
    with seeded(derive_seed("scene3d", recipe.seed)):
        net = SceneNet(**recipe.model)
    net.centre.copy_(sample.mean(0))
    net.scale.copy_((sample - sample.mean(0)).flatten(0, -2).std(0))
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}], lr=recipe.lr
    )
    rise, steps = recipe.warmup_steps, recipe.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / rise, 0.02 + 0.49 * (1 + np.cos(np.pi * min(1.0, k / steps))))
    )
    rng = np.random.default_rng(derive_seed("scene3d order", recipe.seed))
    draws = generator("scene3d jitter", recipe.seed)
    bar = tqdm(range(steps), desc="training scene3d", unit="step", disable=not progress)
    order: list[int] = []
    for step in bar:
        if len(order) < recipe.batch_size:
            order = rng.permutation(len(images)).tolist()
        rows = sorted(order.pop() for _ in range(recipe.batch_size))
        pixels, points = _batch(images, maps, rows, rng, recipe.one_view)
        pixels = colour_jitter(pixels.flatten(0, 1), draws).unflatten(0, pixels.shape[:2])
        weight = torch.where(points[..., 2:] > ABOVE, recipe.above_weight, 1.0)
        loss = (weight * ((net(pixels) - points) / net.scale).abs()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
    return net.eval()


def _open(data: Path) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.load(data / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("images", "points"))


def _batch(images: np.ndarray, maps: np.ndarray, rows: list[int], rng, one_view: float) -> tuple[Tensor, Tensor]:
    views = 1 if rng.random() < one_view else images.shape[1]
    return _pixels(images, rows, views), torch.from_numpy(maps[rows, :views]).float()


def _pixels(images: np.ndarray, rows: list[int], views: int) -> Tensor:
    """Float [B, V, 3, H, W] in [0, 1] of some scenes."""
    return torch.from_numpy(images[rows, :views]).permute(0, 1, 4, 2, 3).float() / 255


@torch.no_grad()
def accuracy(net: SceneNet, held_out: Path) -> dict[str, float]:
    """Distances to the true points on held-out scenes, for the first view alone and for two views.

    `*_cm` is the mean over all places, `*_object_cm` over those more than 8 mm above the table (objects, hand, arm),
    `*_object_within_1cm` the share of these that are right to a centimetre. `guess_*` are those of the mean point of
    every place: what knowing nothing of the image gives.
    """
    images, maps = _open(held_out)
    truth = torch.from_numpy(np.array(maps[:, 0])).float()
    above = truth[..., 2] > ABOVE
    found = {"guess": net.centre[0].expand_as(truth)}
    for views, name in ((1, "one_view"), (2, "two_views")):
        rows = [list(range(first, min(first + 64, len(images)))) for first in range(0, len(images), 64)]
        found[name] = torch.cat([net(_pixels(images, part, views))[:, 0] for part in rows])
    figures: dict[str, float] = {"scenes": len(images)}
    for name, points in found.items():
        error = (points - truth).norm(dim=-1) * 100
        figures |= {
            f"{name}_cm": float(error.mean()),
            f"{name}_object_cm": float(error[above].mean()),
            f"{name}_object_within_1cm": float((error[above] < 1).float().mean()),
        }
    return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop teacher recipes/align/scene3d.yaml"
    parser.add_argument("recipe", type=Path, help="e.g. recipes/align/scene3d.yaml")
    parser.add_argument("--result", type=Path, help="also write its accuracy here, e.g. results/align/scene3d.json")


def main(args: argparse.Namespace) -> int:
    facts = train_scene_net(read_scene_recipe(args.recipe))
    for name, value in facts["accuracy"].items():
        print(f"{name:24s} {value:.4g}")
    if args.result:
        from burnish.core.files import write_json
        from burnish.core.provenance import machine

        versions = machine()
        figures = {name: value for name, value in facts["accuracy"].items() if name != "scenes"}
        detail = {"minutes": facts["minutes"], "recipe": facts["recipe"]}
        write_json(args.result, {
            "name": "align/scene3d", "command": f"python -m workshop teacher {args.recipe}",
            "device": versions.pop("device"), "versions": versions,
            "n": facts["accuracy"]["scenes"], "figures": figures, "targets": {}, "detail": detail,
        })  # fmt: skip
    return 0
