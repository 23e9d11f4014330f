"""A policy small enough to train in milliseconds, a data set, questions and a recipe to go with it."""

import json
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from burnish.core.types import Chunk, Draws, LanguageLoss, PolicyLoss
from burnish.policies.base import Captured, Policy

CAMERA = "observation.images.front"
ANSWERS = ("red", "green", "blue", "yes", "no")


def _words(texts, width=8):
    """[B, width] a fixed embedding of each text."""
    seeds = [zlib.crc32(t.encode()) for t in texts]
    return torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(s)) for s in seeds])


class FakePolicy(Policy):
    cameras = ("front",)
    chunk_size, action_dim, num_layers = 4, 3, 1

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = nn.Sequential(nn.Linear(3 * 16 + 8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.1))
            self.head = nn.Linear(16 + 4 + 12 + 1, 12)
            self.words = nn.Linear(16, len(ANSWERS))

    def _features(self, images, texts):
        pooled = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return self.backbone(torch.cat([pooled, _words(texts).to(pooled)], 1))

    def draw(self, batch_size, generator):
        noise = torch.randn(batch_size, 4, 3, generator=generator, device=generator.device)
        return Draws(noise, torch.rand(batch_size, generator=generator, device=generator.device))

    def loss(self, batch, draws=None):
        h = self._features(batch[CAMERA], batch["task"])
        time = draws.time[:, None, None]
        noisy = time * draws.noise + (1 - time) * batch["action"]
        x = torch.cat([h, batch["observation.state"], noisy.flatten(1), draws.time[:, None]], 1)
        error = (self.head(x).view(-1, 4, 3) - (draws.noise - batch["action"])) ** 2
        keep = ~batch["action_is_pad"][..., None]
        per_sample = (error * keep).sum((1, 2)) / (3 * keep.sum((1, 2)).clamp_min(1))
        return PolicyLoss(per_sample.mean(), per_sample, {"flow": per_sample.mean()})

    def score(self, batch, actions, draws):
        return -self.loss({**batch, "action": actions}, draws).per_sample

    def act(self, batch, draws=None, prefix=None):
        return Chunk(torch.zeros(len(batch["task"]), 4, 3))

    def language(self, batch):
        logits = self.words(self._features(batch[CAMERA], batch["question"]))
        target = torch.tensor([ANSWERS.index(a) for a in batch["answer"]], device=logits.device)
        per_token = nn.functional.cross_entropy(logits, target, reduction="none")[:, None]
        return LanguageLoss(per_token, torch.ones_like(per_token, dtype=torch.bool))

    def answer(self, batch, max_new_tokens=8):
        return [ANSWERS[0]] * len(batch["question"])

    @contextmanager
    def capture(self, layers):
        yield Captured()

    def backbone_parameters(self):
        yield from ((f"backbone.{n}", p) for n, p in self.backbone.named_parameters())

    def save(self, folder):
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps({"type": "fake"}))
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()},
                  Path(folder) / "model.safetensors")  # fmt: skip


def load_fake(path="", overrides=None, dataset_stats=None, features=None):
    """Stands in for burnish.policies.load_policy."""
    from safetensors.torch import load_file

    policy = FakePolicy()
    if path:
        policy.load_state_dict(load_file(Path(path) / "model.safetensors"))
    return policy


def make_dataset(root, episodes=3, frames=9, size=32, seed=0, cameras=("front",), action_dim=3):
    """A LeRobotDataset with h264 videos of moving gradients; the red channel encodes the row."""
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    features = {
        **{
            f"observation.images.{c}": {
                "dtype": "video",
                "shape": (size, size, 3),
                "names": ["height", "width", "channels"],
            }
            for c in cameras
        },
        "observation.state": {"dtype": "float32", "shape": (4,), "names": [f"s{i}" for i in range(4)]},
        "action": {"dtype": "float32", "shape": (action_dim,), "names": [f"a{i}" for i in range(action_dim)]},
    }
    dataset = LeRobotDataset.create(
        "local/fake", fps=10, root=root, features=features, rgb_encoder=RGBEncoderConfig(vcodec="h264", g=2, crf=10)
    )
    rng = np.random.default_rng(seed)
    for episode in range(episodes):
        for k in range(frames + episode):
            image = np.zeros((size, size, 3), dtype=np.uint8)
            image[..., 0] = 8 * (dataset.meta.total_frames + k) % 256
            image[..., 1] = np.linspace(0, 255, size)[:, None]
            image[..., 2] = np.linspace(0, 255, size)[None, :]
            frame = {f"observation.images.{c}": image for c in cameras}
            state = np.array([episode, k, *rng.normal(size=2)], dtype=np.float32)
            action = np.array([episode, k, *rng.normal(size=action_dim - 2)], dtype=np.float32)
            dataset.add_frame({**frame, "observation.state": state, "action": action, "task": f"task {episode % 2}"})
        dataset.save_episode()
    dataset.finalize()
    return Path(root)


def make_questions(root, count=20, seed=0):
    rng = np.random.default_rng(seed)
    Path(root).mkdir(parents=True)
    np.save(Path(root) / "images.npy", rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    lines = [
        json.dumps(
            {"image": int(rng.integers(5)), "question": f"q{i % 7}?", "answer": ANSWERS[i % 5], "kind": "colour"}
        )
        for i in range(count)
    ]
    (Path(root) / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (Path(root) / "meta.json").write_text(json.dumps({"camera": "front"}))
    return Path(root)
