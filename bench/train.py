"""What our training loop costs: waiting for data, and time over a bare PyTorch loop on the same model and batches."""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from burnish.core.errors import BurnishError

BATCH, IMAGE, BLOCK = 32, 96, 4


class Seconds(NamedTuple):
    """Of one block: on the clock, and of the main thread's work (which a busy machine does not change)."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.perf_counter(), time.thread_time())

    def since(self, begin: "Seconds") -> "Seconds":
        return Seconds(self.wall - begin.wall, self.cpu - begin.cpu)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train on a data set made on the spot: first alone, for the waiting; then in turns with the bare loop.

    Figures:
        data_wait_share: share of our step spent waiting for data (no bare steps in between that hide it).
        loop_overhead: median over neighbouring blocks of our time / bare time, minus 1. Ours includes loading with
            augmentation, logging, the progress bar and the checks; the bare loop gets finished batches from memory.
    """
    from burnish.core.provenance import machine
    from burnish.train.setup import own_accelerate_state

    alone, pairs = (8, 4) if args.quick else (40, 30)
    with tempfile.TemporaryDirectory() as temporary, own_accelerate_state():
        folder = Path(temporary)
        policy, name = _base(folder)
        training, metrics = _start(folder, policy)
        waits = _alone(training, metrics, alone)
        ours, bare = _in_turns(training, metrics, pairs)
    ratios = [a.wall / b.wall for a, b in zip(ours, bare, strict=True)]
    on_cpu = statistics.median(a.cpu / b.cpu for a, b in zip(ours, bare, strict=True))
    info = machine()
    device = info.pop("device")
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "name": "train",
        "device": device,
        "versions": info,
        "n": len(ratios),
        "figures": {
            "data_wait_share": statistics.median(waits),
            "loop_overhead": statistics.median(ratios) - 1,
        },
        "detail": {
            "policy": name, "parameters": sum(p.numel() for p in training.policy.parameters()),
            "batch_size": BATCH, "image_size": IMAGE, "steps_in_a_block": BLOCK,
            "our_step_seconds": statistics.median(a.wall for a in ours) / BLOCK,
            "bare_step_seconds": statistics.median(b.wall for b in bare) / BLOCK,
            "overhead_in_cpu_seconds_of_the_main_thread": on_cpu - 1,
            "overhead_quartiles": [quartiles[0] - 1, quartiles[2] - 1], "steps_alone": alone,
        },
    }  # fmt: skip


def make_frames(root: Path, episodes: int, frames: int, size: int) -> Path:
    """A LeRobotDataset of random moving images with one camera "front", state 8 and action 7."""
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    features = {
        "observation.images.front": {
            "dtype": "video",
            "shape": (size, size, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (8,), "names": [f"s{i}" for i in range(8)]},
        "action": {"dtype": "float32", "shape": (7,), "names": [f"a{i}" for i in range(7)]},
    }
    dataset = LeRobotDataset.create(
        "local/bench", fps=10, root=root, features=features, rgb_encoder=RGBEncoderConfig(vcodec="h264")
    )
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        for k in range(frames):
            moments = rng.normal(size=15).astype(np.float32)
            dataset.add_frame({
                "observation.images.front": np.roll(image, k, 1), "observation.state": moments[:8],
                "action": moments[8:], "task": "put the red cube on the green plate",
            })  # fmt: skip
        dataset.save_episode()
    dataset.finalize()
    return root


def _base(folder: Path) -> tuple[str, str]:
    """The shipped base where there is one, otherwise a tiny SmolVLA."""
    from burnish.policies.load import resolve
    from workshop.tiny import make_tiny

    try:
        resolve("small")
        return "small", "small"
    except BurnishError:
        return str(make_tiny("smolvla", folder / "tiny", cameras=("front",), image_size=IMAGE)), "tiny smolvla"


def _start(folder: Path, policy: str):
    from burnish.core.recipe import load_recipe
    from burnish.train.run import Run, start_files

    root = make_frames(folder / "data", episodes=4, frames=60, size=IMAGE)
    recipe = load_recipe(None, [
        "--name=bench", f"--output={folder / 'run'}", f"--data.root={root}", f"--policy.path={policy}",
        f"--train.batch_size={BATCH}", "--train.steps=1", "--train.log_every=10", "--train.save_every=1000000",
        "--train.self_check=false",
    ])  # fmt: skip
    training = Run(recipe, progress=False)
    return training, start_files(training, resumed=False)


def _alone(training, metrics, steps: int) -> list[float]:
    """Waiting share of each log line of `steps` uninterrupted steps; the first ones warm up."""
    from burnish.train.logging import read_rows
    from burnish.train.loop import loop

    training.recipe.train.log_every = 4
    training.recipe.train.steps = steps
    print("python -m bench train: measuring our loop alone", file=sys.stderr)
    loop(training, metrics)
    return [row["data_wait_share"] for row in read_rows(metrics.path)][1:]


def _in_turns(training, metrics, pairs: int) -> tuple[list[Seconds], list[Seconds]]:
    """Time of each block of our steps (all that the loop does in them) and of the bare block beside it."""
    from tqdm import tqdm

    from burnish.train.loop import loop, train_step

    training.recipe.train.log_every = 10
    training.recipe.train.steps = training.step + (pairs + 1) * BLOCK
    bare_block = _bare(training)
    ours: list[Seconds] = []
    bare: list[Seconds] = []
    bar = tqdm(total=pairs + 1, desc="in turns", unit="pair", file=sys.stderr)
    steps, begin = 0, Seconds.now()

    def step(*given, **options):
        nonlocal steps, begin
        edits = train_step(*given, **options)
        steps += 1
        if steps % BLOCK == 0:
            _wait(training.device)
            ours.append(Seconds.now().since(begin))
            bare.append(bare_block())
            bar.update()
            begin = Seconds.now()
        return edits

    loop(training, metrics, step=step)
    bar.close()
    return ours[1:], bare[1:]  # the first pair warms both up


def _bare(training):
    """A function that runs BLOCK steps of the plainest loop on a copy of the policy and returns its time."""
    import copy

    import torch

    from burnish.data.loader import to_device
    from burnish.train.optim import adamw

    config, data = training.recipe.train, training.data
    policy = copy.deepcopy(training.policy)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = adamw(trained, config)
    batches = [data.finish(to_device(data.raw(k), training.device), k) for k in range(BLOCK)]
    draws = torch.Generator(device=training.device).manual_seed(0)

    def block() -> Seconds:
        _wait(training.device)
        begin = Seconds.now()
        for batch in batches:
            policy.loss(batch, policy.draw(BATCH, draws)).total.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait(training.device)
        return Seconds.now().since(begin)

    return block


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
