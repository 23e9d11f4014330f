"""`python -m workshop probe`: how well a linear map reads from hidden states where the objects of a scene are.

Two questions about scenes that no policy was trained on. *Occupancy*: of each image token, whether the centre of an
object lies in its cell. *Target*: of the words of the instruction, where on the table the object is that they name. A
ridge regression is fitted on four fifths of the scenes and asked about the last, five times in turn.

The file it writes is a measure of a study: of every scene one number, whose mean over scenes is the R2.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.reading import read_object
from burnish.core.seeding import generator
from burnish.envs.base import make_env
from burnish.teachers.base import Views
from burnish.teachers.geometry import GeometryTeacher

if TYPE_CHECKING:
    from burnish.policies.base import Policy

FIRST = 4_000_000
"""The first initial state: neither trained on nor evaluated on."""
FOLDS = 5
PENALTIES = 10.0 ** np.arange(-3, 4)
"""Of which the best on a fifth of the scenes that a fold is fitted on is taken; times the number of rows."""
_BATCH = 50


@dataclass(frozen=True)
class Scenes:
    """N scenes as an environment begins them: images uint8 [N, H, W, 3], states [N, D], instructions, the places of all
    objects in the image [N, K, 2] (u, v from 0 to 1), and of the one that is meant on the table [N, 2] in metres."""

    images: np.ndarray
    states: np.ndarray
    instructions: list[str]
    places: np.ndarray
    target: np.ndarray


def draw_scenes(task: str, count: int, camera: str, size: int, first: int = FIRST) -> Scenes:
    """Scenes `first` to `first + count - 1` of a task whose ground truth names its source."""
    env = make_env(task, size)
    images, states, instructions, places, target = [], [], [], [], []
    for state in range(first, first + count):
        env.reset(state)
        seen, facts = env.observe([camera]), env.ground_truth()
        points = np.array([one["position"] for one in facts["objects"].values()])
        images.append(seen.images[camera])
        states.append(seen.state)
        instructions.append(seen.instruction)
        places.append(env.project(camera, points))
        target.append(facts["objects"][facts["source"]]["position"][:2])
    env.close()
    return Scenes(np.array(images), np.array(states), instructions, np.array(places), np.array(target))


@torch.no_grad()
def hidden_states(policy: "Policy", scenes: Scenes, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one layer: the image tokens [N, T, D], and the mean over the tokens of the instruction [N, D]."""
    policy.eval()
    (camera,) = policy.cameras
    images, texts = [], []
    for first in range(0, len(scenes.images), _BATCH):
        part = slice(first, first + _BATCH)
        n = len(scenes.images[part])
        batch = {
            f"observation.images.{camera}": torch.from_numpy(scenes.images[part]).permute(0, 3, 1, 2).float() / 255,
            "observation.state": torch.from_numpy(scenes.states[part]),
            "task": scenes.instructions[part],
            "action": torch.zeros(n, policy.chunk_size, policy.action_dim),
            "action_is_pad": torch.zeros(n, policy.chunk_size, dtype=torch.bool),
        }
        with policy.capture([layer]) as captured:
            policy.loss(batch, policy.draw(n, generator("probe", first)))
        states, words = captured.hidden[layer].float(), captured.layout["text"][..., None].float()
        images.append(states[:, captured.cameras[camera]].numpy())
        texts.append(((states * words).sum(1) / words.sum(1).clamp_min(1)).numpy())
    return np.concatenate(images), np.concatenate(texts)


def occupied(places: np.ndarray, tokens: int) -> np.ndarray:
    """[N, tokens, 1] whether the centre of any of the objects at `places` [N, K, 2] lies in each cell of the grid."""
    side = round(tokens**0.5)
    cells = np.clip((places * side).astype(int), 0, side - 1)
    found = np.zeros((len(places), tokens, 1))
    found[np.arange(len(places))[:, None], cells[..., 1] * side + cells[..., 0]] = 1
    return found


def explained(features: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[N] whose mean is the R2 of `truth` [N, T, C] from `features` [N, T, D], on scenes that each fit has not seen.

    One linear map serves all T places; what is the same in all scenes of a place explains nothing.
    """
    fold = np.arange(len(truth)) % FOLDS
    wrong, spread = np.zeros(len(truth)), np.zeros(len(truth))
    for held in range(FOLDS):
        fit, choose = fold != held, fold == (held + 1) % FOLDS
        best = min(PENALTIES, key=lambda p: _errors(features, truth, fit & ~choose, choose, p)[0].sum())
        wrong[~fit], spread[~fit] = _errors(features, truth, fit, ~fit, best)
    return 1 - wrong / spread.mean()


def _errors(
    features: np.ndarray, truth: np.ndarray, fit: np.ndarray, ask: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors of the scenes `ask`, summed over each, of a ridge regression and of each place's mean."""
    x, y = features - features[fit].mean(0), truth - truth[fit].mean(0)
    x = x / (x[fit].std((0, 1)) + 1e-12)
    rows, answers = x[fit].reshape(-1, x.shape[-1]), y[fit].reshape(-1, y.shape[-1])
    weights = np.linalg.solve(rows.T @ rows + penalty * len(rows) * 1e-3 * np.eye(rows.shape[1]), rows.T @ answers)
    return ((y[ask] - x[ask] @ weights) ** 2).sum((1, 2)), (y[ask] ** 2).sum((1, 2))


class OtherScene(GeometryTeacher):
    """The exact geometry of another frame: it pulls as hard as that of the right one, and knows nothing of it."""

    def __init__(self, grid):
        super().__init__(grid)
        self.identity |= {"name": "geometry of another scene"}

    def features(self, views: Views, layers) -> dict[int, Tensor]:
        found = super().features(views, layers)
        return {layer: tokens.roll(len(tokens) // 2, 0) for layer, tokens in found.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop probe runs/x/policy --output occupancy.json"
    parser.add_argument("policy", help="folder; or, with --kept, what an earlier call wrote")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--task", default="tabletop:lift", help="whose scenes")
    parser.add_argument("--scenes", type=int, default=1000, help="how many")
    parser.add_argument("--kept", choices=("occupancy", "target"), help="hand out this measure of an earlier call")


def main(args: argparse.Namespace) -> int:
    from burnish.policies import load_policy
    from burnish.policies.base import require

    if args.kept:
        found = read_object(Path(args.policy))
        if args.kept not in found:
            raise BurnishError(f"{args.policy} holds no {args.kept}", "what `python -m workshop probe` wrote")
        write_json(Path(args.output), {"values": found[args.kept]})
        return 0
    if args.scenes < 10 * FOLDS:
        raise BurnishError(f"{args.scenes} scenes", f"at least {10 * FOLDS}")
    policy = load_policy(args.policy, device="cpu")
    require(policy, "capture", "probe")
    layer = max(0, policy.num_layers - 2)  # the last one whose output actions read
    scenes = draw_scenes(args.task, args.scenes, policy.cameras[0], policy.image_size)
    images, texts = hidden_states(policy, scenes, layer)
    found = {
        "occupancy": explained(images, occupied(scenes.places, images.shape[1])).tolist(),
        "target": explained(texts[:, None], scenes.target[:, None]).tolist(),
    }
    write_json(Path(args.output), {"values": found["occupancy"], "layer": layer, **found})
    print(f"R2 of {args.scenes} scenes at layer {layer}: " +
          ", ".join(f"{name} {np.mean(values):.3f}" for name, values in found.items()))  # fmt: skip
    return 0
