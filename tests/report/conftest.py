"""A run folder as the pipeline leaves it, made of synthetic numbers and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest


def write_video(path: Path, frames: np.ndarray, fps: int = 20) -> None:
    """h264 video of frames [T, H, W, 3] uint8."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def moving_square(rng: np.random.Generator, count: int = 40, size: int = 128) -> np.ndarray:
    """[count, size, size, 3] uint8: a square that crosses a table-coloured picture."""
    frames = np.empty((count, size, size, 3), np.uint8)
    frames[:] = rng.integers(120, 200, size=3)
    colour, row = rng.integers(0, 255, size=3), int(rng.integers(10, size - 34))
    for index, frame in enumerate(frames):
        left = index * (size - 24) // count
        frame[row : row + 24, left : left + 24] = colour
    return frames


def make_run(folder: Path, seed: int = 0) -> Path:
    """Write every file that a run can leave behind."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    recipe = "name: put-on\ndemos:\n  env: tabletop:put_on\n  episodes: 3000\ntrain:\n  steps: 3000\n  lr: 0.0004\n"
    (folder / "recipe.yaml").write_text(recipe)
    info = {
        "name": "tabletop/quickstart",
        "commands": ["make quickstart", "burnish run recipes/tabletop/quickstart.yaml"],
        "commit": "4b3ebee0c9d1f2a3b4c5d6e7f8a9b0c1d2e3f4a5",
        "hardware": {"cpu": "2 cores", "gpu": "none", "memory": "24 GiB"},
        "versions": {"burnish": "0.1.0", "lerobot": "0.6.1", "torch": "2.11.0", "mujoco": "3.3.0"},
        "seeds": {"demos": 0, "train": 0, "eval": 0},
        "date": "2026-11-21 09:30",
        "stages": [
            {"name": "demonstrations", "minutes": 4.2},
            {"name": "training", "minutes": 9.1},
            {"name": "evaluation", "minutes": 3.4},
            {"name": "retention", "minutes": 0.3},
        ],
    }
    (folder / "run.json").write_text(json.dumps(info))
    rows = []
    for step in range(0, 3000, 10):
        row = {
            "step": step,
            "loss": float(0.9 * np.exp(-step / 700) + 0.06 + abs(rng.normal(0, 0.02))),
            "lr": float(4e-4 * min(1, step / 200) * 0.5 * (1 + np.cos(np.pi * step / 3000))),
            "grad_norm": float(np.exp(rng.normal(0, 0.3)) * (1 + 4 * np.exp(-step / 400))),
            "data_wait_share": float(rng.uniform(0, 0.03)),
            "l2sp": float(step / 3000 * 0.01),
        }
        if step % 500 == 0:
            row |= {"retention_loss": 0.4 + step * 1e-5, "retention_accuracy": 0.83 - step * 1e-5}
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    for variant, rate in {"tuned": 0.83, "base": 0.03, "swap": 0.18, "expert_random_object": 0.21}.items():
        _evaluation(folder / "eval" / variant, rate, rng, swap=variant == "swap")
    for index in range(4):
        frames = moving_square(rng)
        outcome = "failure" if index == 3 else "success"
        write_video(folder / f"eval/tuned/put_on_{1_000_000 + index}_{outcome}.mp4", frames)
    _strip(folder / "eval/base/put_on_1000000_failure_strip.png", moving_square(rng))
    kinds = {"colour": 0.95, "left_of": 0.78, "count": 0.66, "existence": 0.9, "which_moves": 0.88}
    (folder / "retention.json").write_text(json.dumps({
        name: {
            "loss": 0.41 + shift, "accuracy": 0.834 - shift, "n": 1000, "interval": [0.81 - shift, 0.856 - shift],
            "by_kind": {kind: {"n": 200, "accuracy": value - shift} for kind, value in kinds.items()},
        }
        for name, shift in (("base", 0.0), ("tuned", 0.03))
    } | {"mcnemar_p": 0.021}))  # fmt: skip
    return folder


def _evaluation(folder: Path, rate: float, rng: np.random.Generator, swap: bool) -> None:
    folder.mkdir(parents=True)
    summary: dict = {"variant": folder.name, "tasks": {}}
    total = 0
    for task in ("tabletop:put_on", "tabletop:stack"):
        successes = int(rng.binomial(60, rate))
        summary["tasks"][task] = {"n": 60, "successes": successes}
        total += successes
    summary |= {"n": 120, "successes": total, "latency_ms": {"p50": 41.2, "p95": 55.0, "p99": 80.1}}
    if swap:
        summary["other_successes"] = 78
    (folder / "summary.json").write_text(json.dumps(summary))


def _strip(path: Path, frames: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(np.concatenate(list(frames[::5]), axis=1)).save(path)


@pytest.fixture(scope="session")
def fake_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "quickstart")
