"""A policy small enough to train in milliseconds, a data set, questions and a recipe to go with it."""

import json
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from burnish.core.types import Chunk, Draws, LanguageLoss, PolicyLoss
from burnish.methods.objective import OBJECTIVES, Objective
from burnish.policies.base import Captured, Policy

CAMERA = "observation.images.front"
ANSWERS = ("red", "green", "blue", "yes", "no")


def _words(texts, width=8):
    """[B, width] a fixed embedding of each text."""
    seeds = [zlib.crc32(t.encode()) for t in texts]
    return torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(s)) for s in seeds])


class FakePolicy(Policy):
    name, capabilities, cameras = "fake", frozenset({"language", "capture", "score"}), ("front",)
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

    def save(self, folder, *, home=None):
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps({"type": "fake"}))
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()},
                  Path(folder) / "model.safetensors")  # fmt: skip


def load_fake(path="", overrides=None, dataset_stats=None, features=None, **_):
    """Stands in for burnish.policies.load_policy."""
    from safetensors.torch import load_file

    policy = FakePolicy()
    if Path(path).is_dir():
        policy.load_state_dict(load_file(Path(path) / "model.safetensors"))
    return policy


def make_dataset(root, episodes=3, frames=9, size=32, seed=0, cameras=("front",), action_dim=3):
    """A LeRobotDataset with h264 videos of moving gradients, the red channel of which encodes the frame.

    `size` is a side in pixels, or (height, width).
    """
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    height, width = (size, size) if isinstance(size, int) else size
    features = {
        **{
            f"observation.images.{c}": {
                "dtype": "video",
                "shape": (height, width, 3),
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
            image = np.zeros((height, width, 3), dtype=np.uint8)
            image[..., 0] = 8 * (dataset.meta.total_frames + k) % 256
            image[..., 1] = np.linspace(0, 255, height)[:, None]
            image[..., 2] = np.linspace(0, 255, width)[None, :]
            frame = {f"observation.images.{c}": image for c in cameras}
            state = np.array([episode, k, *rng.normal(size=2)], dtype=np.float32)
            action = np.array([episode, k, *rng.normal(size=max(0, action_dim - 2))], dtype=np.float32)[:action_dim]
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


class Probe(Objective):
    """A method with everything that a method may have: parameters, a buffer, draws, an extra state, gradient edits."""

    def __init__(self, weight: float = 0.1):
        super().__init__()
        self.weight = weight
        self.calls = 0

    def setup(self, run):
        self.project = nn.Linear(12, 3)
        with torch.no_grad():
            self.project.weight.normal_(generator=run.generator)
            self.project.bias.zero_()
        self.register_buffer("seen", torch.zeros(3))

    def loss(self, run, batch, out):
        noise = torch.randn(12, generator=run.generator, device=run.device)
        self.seen = 0.9 * self.seen + 0.1 * batch["action"].mean((0, 1))
        return {"probe": self.weight * ((self.project(noise + batch["action"].flatten(1)) - self.seen) ** 2).mean()}

    def edit_gradients(self, run, batch, grads):
        self.calls += 1
        grads["head.bias"].mul_(0.5)
        grads["head.weight"] = grads["head.weight"] * (1 + 0.1 * torch.rand((), generator=run.shared_generator))
        own = next(name for name in grads if name.startswith("objectives.") and name.endswith("project.weight"))
        return {"probe_norm": float(grads[own].norm())}

    def metrics(self):
        return {"probe_calls": self.calls}

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def recipe(root, output, *more):
    """A short run of the fake policy on `root`."""
    from burnish.core.recipe import load_recipe

    return load_recipe(None, [
        f"--data.root={root}", f"--output={output}", "--policy.path=fake", "--train.steps=12", "--train.batch_size=5",
        "--train.log_every=3", "--train.save_every=4", "--train.warmup_steps=2", "--train.lr=0.01", *more,
    ])  # fmt: skip


def everything(questions):
    """Overrides that switch on all that a step can have."""
    return [
        "--train.grad_accumulation=2", "--train.ema_decay=0.9", f"--language.root={questions}",
        "--language.weight=0.5", "--language.batch_size=4", "--objectives=[{name: probe, weight: 0.2}]",
    ]  # fmt: skip


def register(setter=setattr):
    """Put the fake policy and the probe where the loop looks for them; `setter` may be monkeypatch.setattr."""
    import burnish.policies

    setter(burnish.policies, "load_policy", load_fake)
    if "probe" not in OBJECTIVES:
        OBJECTIVES.register("probe")(Probe)


def weights(folder):
    from safetensors.torch import load_file

    return {p.relative_to(folder).as_posix(): load_file(p) for p in sorted(Path(folder).rglob("*.safetensors"))}


def assert_same_weights(a, b):
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys() and one
    for name in one:
        assert one[name].keys() == two[name].keys()
        for key in one[name]:
            assert torch.equal(one[name][key], two[name][key]), (name, key)


def figures(path):
    """The rows of metrics.jsonl without those that depend on the clock."""
    clock = ("minutes", "step_seconds", "data_wait_share")
    return [
        {k: v for k, v in json.loads(line).items() if k not in clock} for line in Path(path).read_text().splitlines()
    ]
