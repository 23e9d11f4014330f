"""What alignment costs: time of a step with kept and with live teacher features, memory, and filling the cache."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, IMAGE = 32, 96
MEASURE_EVERY = 50
VARIANTS = ("plain", "cached", "live", "matched")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """SmolVLA-small on random images, with a scene3d teacher of full size and random weights (which cost the same).

    Figures:
        step_ratio_cached, step_ratio_live, step_ratio_matched: time of an aligned step over a plain one beside it, the
            share of a gradient measurement (every 50 steps) included. Live runs the teacher in every step; matched
            reads kept features and sets its strength by `gradient_norm_ratio`, which measures two gradients each step.
        cache_fill_speedup: five epochs of the teacher in the loop over filling the cache once.
        half_exact: half precision equals the pooled features, rounded.
        pca_cosine: mean cosine of the compressed features with those.
        bytes_half, bytes_pca: of a sample (one view, three layers).
        peak_mb_plain, peak_mb_cached, peak_mb_live, peak_mb_matched: most memory of a process that trains so.
    """
    from burnish.core.provenance import machine
    from burnish.train.setup import own_accelerate_state

    with tempfile.TemporaryDirectory() as temporary, own_accelerate_state():
        folder = Path(temporary)
        name = _prepare(folder)
        ratios, detail = _steps(folder, 8 if args.quick else 60)
        cache = _cache(folder, 512 if args.quick else 32768)
        peaks = {f"peak_mb_{variant}": _peak(folder, variant) for variant in VARIANTS}
    info = machine()
    return {
        "name": "align",
        "device": info.pop("device"),
        "versions": info,
        "n": detail.pop("n"),
        "figures": ratios | {k: v for k, v in cache.items() if k != "detail"} | peaks,
        "detail": {"policy": name, "batch_size": BATCH, "image_size": IMAGE, **detail, **cache["detail"]},
    }


def _prepare(folder: Path) -> str:
    """Data, a teacher and the name of the policy."""
    import json

    from safetensors.torch import save_file

    from bench.train import _base, make_frames
    from burnish.core.seeding import seeded
    from burnish.teachers.scene3d import DEFAULTS, SceneNet

    make_frames(folder / "data", episodes=4, frames=60, size=IMAGE)
    (folder / "teacher").mkdir()
    with seeded(0):
        save_file(SceneNet(**DEFAULTS).state_dict(), folder / "teacher" / "model.safetensors")
    (folder / "teacher" / "config.json").write_text(json.dumps({"model": DEFAULTS}))
    policy, name = _base(folder)
    (folder / "policy.txt").write_text(policy)
    return name


def _run(folder: Path, variant: str):
    from burnish.core.recipe import load_recipe
    from burnish.train.run import Run

    recipe = load_recipe(None, [
        "--name=bench", f"--output={folder / variant}", f"--data.root={folder / 'data'}",
        f"--policy.path={(folder / 'policy.txt').read_text()}", f"--train.batch_size={BATCH}",
        "--train.steps=100000", "--train.self_check=false",
    ])  # fmt: skip
    if variant != "plain":
        recipe.objectives = [{
            "name": "align", "teacher": {"name": "scene3d", "path": str(folder / "teacher")},
            "cache": "off" if variant == "live" else "", "measure_every": MEASURE_EVERY,
            "gradient_norm_ratio": 1.0 if variant == "matched" else 0.0,
        }]  # fmt: skip
    (folder / variant).mkdir(exist_ok=True)
    return Run(recipe, progress=False)


class _Stepper:
    """A run that does one step after another and says how long each took."""

    def __init__(self, folder: Path, variant: str):
        from burnish.train.selfcheck import DivergenceGuard
        from burnish.train.step import Streams

        self.run = _run(folder, variant)
        self.streams = Streams(self.run)
        self.watch = DivergenceGuard(self.run.output, 0, late=self.run.device.type != "cpu")

    def step(self) -> float:
        from bench.train import _wait
        from burnish.train.loop import train_step

        _wait(self.run.device)
        begin = time.perf_counter()
        train_step(self.run, self.streams, self.watch)
        _wait(self.run.device)
        return time.perf_counter() - begin


def _steps(folder: Path, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Ratios of the variants' steps, taken in turns."""
    from tqdm import tqdm

    steppers = {variant: _Stepper(folder, variant) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    measuring: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for k in tqdm(range(rounds + 3), desc="steps in turns", unit="round", file=sys.stderr):
        for variant, stepper in steppers.items():
            measured = stepper.run.step % MEASURE_EVERY == 0
            seconds = stepper.step()
            if k >= 3:
                (measuring if measured and variant != "plain" else times)[variant].append(seconds)
    for variant, stepper in steppers.items():  # one more measurement each, whatever the number of rounds
        stepper.run.step = -(-stepper.run.step // MEASURE_EVERY) * MEASURE_EVERY
        measuring[variant].append(stepper.step())
        stepper.streams.close()
    plain = statistics.median(times["plain"])
    ratios, detail = {}, {"n": rounds, "plain_step_seconds": plain}
    for variant in VARIANTS[1:]:
        ordinary = [a / b for a, b in zip(times[variant], times["plain"], strict=False)]
        extra = max(0.0, statistics.median(measuring[variant]) / plain - statistics.median(ordinary))
        ratios[f"step_ratio_{variant}"] = statistics.median(ordinary) + extra / MEASURE_EVERY
        quartiles = statistics.quantiles(ordinary, n=4)
        detail[f"{variant}_quartiles"] = [quartiles[0], quartiles[2]]
        detail[f"{variant}_measuring_step_over_plain"] = extra + statistics.median(ordinary)
    return ratios, detail


def _cache(folder: Path, rows: int) -> dict[str, Any]:
    """Filling time against the teacher in the loop, exactness and size of both formats."""
    from dataclasses import replace

    import torch

    from burnish.data.feature_cache import CacheKey
    from burnish.data.feature_fill import BLOCK, FeatureJob, Pooled, open_cache
    from burnish.data.views import FrameSource, FrameViews
    from burnish.teachers.base import Views, make_teacher

    spec = {"name": "scene3d", "path": str(folder / "teacher")}
    teacher = make_teacher(spec, (4, 4))
    frames = np.lib.format.open_memmap(folder / "frames.npy", "w+", np.uint8, (rows, IMAGE, IMAGE, 3))
    drawn = np.random.default_rng(0).integers(0, 256, (64, 12, 12, 3), dtype=np.uint8)
    for first in range(0, rows, 64):  # blocks of colour, another order of them in every image
        part = drawn.transpose(0, 2, 1, 3) if first // 64 % 2 else drawn
        smooth = np.roll(part, first, (1, 2)).repeat(IMAGE // 12, 1).repeat(IMAGE // 12, 2)
        frames[first : first + 64] = smooth[: rows - first]
    frames.flush()
    source = FrameSource({"front": folder / "frames.npy"}, folder, geometry=False)
    key = CacheKey(teacher.identity, "bench", ["front"], [[IMAGE, IMAGE]], [1, 3, 5], [4, 4], standardise=True)
    widths = tuple(teacher.widths)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    half = open_cache(folder / "half", FeatureJob(spec, key, source, None, rows, widths), device=device)
    filling = time.perf_counter() - begin
    smaller = FeatureJob(spec, replace(key, format="pca"), source, None, rows, widths)
    small = open_cache(folder / "pca", smaller, progress=False, device=device)
    views, pooled = FrameViews(source), Pooled(teacher.to(device), key)
    inputs = views(np.arange(BATCH), None).images.to(device)
    live = Views(inputs, torch.ones(BATCH, 1, dtype=torch.bool, device=device), ("front",))
    seconds = []
    for _ in range(12):
        begin = time.perf_counter()
        pooled(live)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    in_loop = 5 * rows / BATCH * statistics.median(seconds[2:])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the filling processes have it
    block = torch.arange(min(BLOCK, rows))
    exact = pooled(views(block.numpy(), None).to(device))
    torch.set_num_threads(threads)
    kept, back = half.read(block), small.read(block)
    equal = all(torch.equal(half.statistics[t].encode(f.cpu()).float(), kept[t]) for t, f in exact.items())
    cosines = [torch.cosine_similarity(kept[t], back[t], dim=-1).mean() for t in key.layers]
    return {
        "cache_fill_speedup": in_loop / filling,
        "half_exact": equal,
        "pca_cosine": float(torch.stack(cosines).mean()),
        "bytes_half": half.bytes_per_sample,
        "bytes_pca": small.bytes_per_sample,
        "detail": {"rows_filled": rows, "fill_seconds": filling, "five_epochs_in_loop_seconds": in_loop},
    }


def _peak(folder: Path, variant: str) -> float:
    """Most memory, in MB, of a process of its own that trains a few steps."""
    from burnish.core.workers import WorkerPool

    with WorkerPool(_peaks, folder, count=1) as pool:
        return dict(pool.run([variant]))[variant]


def _peaks(variants: Iterable[str], folder: Path) -> Generator[float, None, None]:
    import torch

    for variant in variants:
        stepper = _Stepper(folder, variant)
        if stepper.run.device.type == "cuda":  # what training takes, not what was taken to begin it
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            stepper.step()
        stepper.streams.close()
        if stepper.run.device.type == "cuda":
            yield torch.cuda.max_memory_allocated() / 1e6
        else:  # getrusage would do, but a started process inherits its parent's highest mark there
            status = Path("/proc/self/status").read_text().splitlines()
            yield int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1e3
