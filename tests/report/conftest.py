"""A run folder as the pipeline leaves it, made of synthetic numbers and images."""

import json
from pathlib import Path

import numpy as np
import pytest

from burnish.evaluate.simulators import write_film_strip, write_video
from burnish.evaluate.stats import wilson


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
    kinds = {"colour": 0.95, "left_of": 0.78, "count": 0.66, "existence": 0.9, "which_moves": 0.88}
    content = {}
    for name, shift in (("base", 0.0), ("tuned", 0.03)):
        by_kind = {kind: wilson(round(200 * (share - shift)), 200) for kind, share in kinds.items()}
        total = wilson(sum(rate.successes for rate in by_kind.values()), 1000)
        by_kind = {kind: rate.to_dict() for kind, rate in by_kind.items()}
        content[name] = {"loss": 0.41 + shift, "accuracy": total.to_dict(), "by_kind": by_kind}
    content["comparison"] = {
        "n": 1000, "difference": -0.03, "low": -0.052, "high": -0.009, "forgotten": 71, "learned": 41, "p": 0.0063,
        "loss_difference": 0.03,
    }  # fmt: skip
    (folder / "retention.json").write_text(json.dumps(content))
    return folder


def _evaluation(folder: Path, rate: float, rng: np.random.Generator, swap: bool) -> None:
    (folder / "videos").mkdir(parents=True)
    per_task, films, lines = {}, [], []
    for task in ("tabletop:put_on", "tabletop:stack"):
        per_task[task] = wilson(int(rng.binomial(60, rate)), 60)
        for state in (1_000_000, 1_000_001):
            name = f"videos/{task.replace(':', '_')}_{state}"
            film = {"task": task, "initial_state": state, "success": bool(rng.random() < rate)}
            lines.append(json.dumps(film | {"instruction": "put the red cube on the plate"}) + "\n")
            films.append(film | {"video": f"{name}.mp4", "film_strip": f"{name}.png"})
            if folder.name == "tuned":
                frames = moving_square(rng)
                write_video(folder / f"{name}.mp4", frames, 20)
                write_film_strip(folder / f"{name}.png", frames)
            if folder.name == "base" and len(films) == 1:
                write_film_strip(folder / f"{name}.png", moving_square(rng))
    (folder / "episodes.jsonl").write_text("".join(lines))
    total = wilson(sum(rate.successes for rate in per_task.values()), 120)
    summary = {
        "overall": total.to_dict(),
        "per_task": {task: rate.to_dict() for task, rate in per_task.items()},
        "other": wilson(78, 120).to_dict() if swap else None,
        "latency_ms": {}
        if "expert" in folder.name
        else {"p50": 41.2, "p95": 55.0, "p99": 80.1, "mean": 42.0, "n": 900},
        "videos": films,
        **({} if swap else {"failures": {"out of time": 7, "wrong object": 3}}),
    }
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="session")
def fake_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "quickstart")
