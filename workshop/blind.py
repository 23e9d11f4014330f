"""`python -m workshop blind`: a base that has forgotten how a word finds its object, and the loss that teaches it.

For studies of auxiliary losses. On the shipped base none helps: it was trained to point and knows where things are.
Here the queries with which tokens of the language model look at one another are drawn anew; all else stays.
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.files import new_folder
from burnish.core.reading import inside, read_lines
from burnish.core.types import Batch, PolicyLoss
from burnish.data.views import _episodes
from burnish.methods.align.objective import _probe
from burnish.methods.objective import Objective, Run
from burnish.policies import load_policy
from burnish.policies.base import Captured, require

QUERIES = r"text_model\.layers\.\d+\.self_attn\.q_proj"
REACH = 0.2
"""Metres; places on the table are told in this unit."""


def blind(policy: str, output: Path, names: str = QUERIES, seed: int = 0) -> int:
    """Write `policy` with the backbone's parameters whose names match drawn anew, each with the spread that it had.

    Returns:
        How many parameters (tensors) that were; raises BurnishError for none.
    """
    loaded, generator = load_policy(policy, device="cpu").float(), torch.Generator().manual_seed(seed)
    chosen = [p for name, p in loaded.backbone_parameters() if re.search(names, name)]
    if not chosen:
        raise BurnishError(f"'{names}' is in no name of the backbone's parameters", "a regular expression over them")
    with torch.no_grad():
        for parameter in chosen:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std())
    with new_folder(output) as folder:
        loaded.save(folder, home=output)
    return len(chosen)


class Grounding(Objective):
    """At the words of the instruction every layer must tell where on the table the object is that they name.

    One linear head a layer on the mean over the words, thrown away afterwards. Places come from the ground truth beside
    the data set.

    Args:
        weight: of the loss.
    """

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight, self._captured, self._figures = weight, None, {}

    def setup(self, run: Run) -> None:
        require(run.policy, "capture", "grounding")
        layers = range(run.policy.num_layers)
        width = _probe(run).hidden[0].shape[-1]
        draws = torch.Generator().manual_seed(run.recipe.train.seed)
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in layers).to(run.device)
        for head in self.heads:
            nn.init.normal_(head.weight, std=width**-0.5, generator=draws)
            nn.init.zeros_(head.bias)
        self.register_buffer("places", torch.from_numpy(places(Path(run.data.root))).to(run.device), persistent=False)

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        with run.policy.capture(range(run.policy.num_layers)) as self._captured:
            yield

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        captured: Captured | None = self._captured
        self._captured = None
        if captured is None:
            return {}
        words, truth = captured.layout["text"][..., None].float(), self.places[batch["index"]]
        means = [(captured.hidden[i] * words).sum(1) / words.sum(1).clamp_min(1) for i in range(len(self.heads))]
        told = torch.stack([head(F.rms_norm(x, x.shape[-1:])) for head, x in zip(self.heads, means, strict=True)])
        self._figures = {"grounding_cm": 100 * REACH * (told[-2] - truth).detach().norm(dim=-1).mean()}
        return {"grounding": self.weight * F.smooth_l1_loss(told, truth.expand_as(told), beta=0.1)}

    def metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._figures.items()}


def places(root: Path) -> np.ndarray:
    """[N, 2] float32: where the object in question is in each frame of a data set, in units of REACH."""
    found: list[Any] = []
    for episode in _episodes(root):
        folder = root / "ground_truth"
        for _, facts in read_lines(inside(folder, episode["frames"]), folder):
            found.append(facts["objects"][facts["source"]]["position"][:2])
    return np.array(found, np.float32) / np.float32(REACH)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop blind small -o runs/capability/blind"
    parser.add_argument("policy", help="policy folder or name of a base")
    parser.add_argument("-o", "--output", required=True, help="folder to write")
    parser.add_argument("--names", default=QUERIES, help="regular expression over the backbone's parameters")
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> int:
    if Path(args.output).exists():
        print(f"{args.output} is there")
        return 0
    print(f"{blind(args.policy, Path(args.output), args.names, args.seed)} tensors drawn anew: {args.output}")
    return 0
