"""A policy with image tokens and three residual blocks, for the loop."""

from contextlib import contextmanager

import fake
import torch
from torch import nn

from burnish.core.types import PolicyLoss
from burnish.policies.base import Captured

SIDE, WIDTH = 2, 16


class TokenPolicy(fake.FakePolicy):
    """16 px patches of a 32 px view become 2 x 2 tokens; after them one token of text."""

    num_layers = 3

    def __init__(self, seed=0):
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            self.embed = nn.Linear(3 * 16, WIDTH)
            self.say = nn.Linear(8, WIDTH)
            self.stack = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        self.open = []

    def loss(self, batch, draws=None):
        cells = nn.functional.adaptive_avg_pool2d(batch[fake.CAMERA], 4 * SIDE)
        cells = cells.unflatten(2, (SIDE, 4)).unflatten(4, (SIDE, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        text = self.say(fake._words(batch["task"]).to(cells))
        tokens = torch.cat([self.embed(cells), text[:, None]], 1)
        for captured in self.open:
            captured.layout = {"image": torch.ones(tokens.shape[:2], dtype=torch.bool)}
            captured.layout["image"][:, -1] = False
            captured.cameras = {"front": slice(0, SIDE * SIDE)}
        for i, block in enumerate(self.stack):
            tokens = tokens + block(tokens)
            for captured in self.open:
                captured.hidden[i] = tokens
        time = draws.time[:, None, None]
        noisy = time * draws.noise + (1 - time) * batch["action"]
        x = torch.cat([tokens.mean(1), batch["observation.state"], noisy.flatten(1), draws.time[:, None]], 1)
        error = (self.head(x).view(-1, 4, 3) - (draws.noise - batch["action"])) ** 2
        keep = ~batch["action_is_pad"][..., None]
        per_sample = (error * keep).sum((1, 2)) / (3 * keep.sum((1, 2)).clamp_min(1))
        return PolicyLoss(per_sample.mean(), per_sample, {"flow": per_sample.mean()})

    @contextmanager
    def capture(self, layers):
        captured = Captured()
        self.open.append(captured)
        try:
            yield captured
        finally:
            self.open.remove(captured)


def load_student(path="", overrides=None, dataset_stats=None, features=None, **_):
    """Stands in for burnish.policies.load_policy."""
    return TokenPolicy()


def recipe(root, output, *objectives, more=()):
    """A short run of the student with these objectives."""
    listed = ", ".join(objectives)
    return fake.recipe(root, output, f"--objectives=[{listed}]", *more)
