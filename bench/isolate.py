"""What gradient isolation costs: whole steps against a plain step, and the edit alone against a Python loop."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.train import make_frames

BATCH, IMAGE = 32, 96
VARIANTS = {
    "plain": "",
    "paper": "method: aegis",
    "two_forwards": "method: aegis, share: 0.999",  # a full batch, but in a forward of its own
    "paper_every_4": "method: aegis, every: 4",
    "question_anchor": "method: question_anchor",
    "self_anchor": "method: self_anchor",
    "auto": "method: auto",
}
LARGE = {f"layers.{layer}.{k}.weight": (1024, 1024) for layer in range(8) for k in range(5)}
EVERY = 8
"""Steps in a block: a multiple of every variant's `every`, so that each block pays for its refreshes."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train every variant in turns on data made on the spot, a block of steps each.

    Figures:
        step_ratio_paper: step time of the paper's rule (a second backward over the one forward) over a plain step.
        step_ratio_two_forwards: the same edit with a second forward.
        step_ratio_auto: of `method: auto`.
        step_ratio_default: of the costliest of auto, question_anchor and self_anchor as they are by default.
        default_cosine: least cosine between the gradient edited with a direction refreshed every 4 steps and the one
            edited exactly, over steps without a refresh, of the paper's rule and of question_anchor;
            refreshed_edit_cosine, question_edit_cosine: the same of what was taken out, for each of the two.
        edit_speedup_over_loop: editing matrices of a large VLM's size, every layer in conflict, against a loop over
            parameters that computes the same and makes a new gradient; one thread each.
        edit_speedup_over_inplace_loop: against one that writes into the gradient.
        edit_speedup_small_base: as the first, for the small base's many small tensors.
        edit_error: relative, to float64.
    """
    from burnish.core.provenance import machine
    from burnish.train.setup import own_accelerate_state

    blocks = 1 if args.quick else 6
    editing = edit_against_loop(LARGE, 3 if args.quick else 41)  # first, while memory is as fresh for all contestants
    with tempfile.TemporaryDirectory() as temporary, own_accelerate_state():
        folder = Path(temporary)
        root, questions = make_frames(folder / "data", 4, 60, IMAGE), make_questions(folder / "questions")
        runs = {name: _Training(folder / name, root, questions, inside) for name, inside in VARIANTS.items()}
        seconds = _in_turns(runs, blocks)
        memory = {name: training.peak_bytes(folder / "trace.json") for name, training in runs.items()}
        cosines = {n: _staleness(runs[n], 1 if args.quick else 8) for n in ("paper_every_4", "question_anchor")}
        shapes = {n: p.shape for n, p in runs["plain"].run.policy.backbone_parameters()}
    small = edit_against_loop(shapes, 3 if args.quick else 100)
    plain = seconds["plain"]
    ratios = {n: statistics.median(a / b for a, b in zip(s, plain, strict=True)) for n, s in seconds.items()}
    info = machine()
    return {
        "name": "isolate", "device": info.pop("device"), "versions": info, "n": blocks,
        "figures": {
            "step_ratio_paper": ratios["paper"],
            "step_ratio_two_forwards": ratios["two_forwards"],
            "step_ratio_default": max(ratios[name] for name in ("auto", "question_anchor", "self_anchor")),
            "step_ratio_auto": ratios["auto"],
            "default_cosine": min(min(found["gradient"]) for found in cosines.values()),
            "refreshed_edit_cosine": min(cosines["paper_every_4"]["edit"]),
            "question_edit_cosine": min(cosines["question_anchor"]["edit"]),
            **editing,
            "edit_speedup_small_base": small["edit_speedup_over_loop"],
        },
        "detail": {
            "batch_size": BATCH, "image_size": IMAGE, "ratios": ratios, "edit_speedups_on": "one CPU thread",
            "step_seconds": {n: statistics.median(s) / EVERY for n, s in seconds.items()},
            "peak_megabytes": {n: value / 1e6 for n, value in memory.items()}, "cosines": cosines,
            "backbone_parameters": sum(shape.numel() for shape in shapes.values()), "backbone_tensors": len(shapes),
        },
    }  # fmt: skip


def make_questions(root: Path, count: int = 256) -> Path:
    """A question folder of random images."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    np.save(root / "images.npy", rng.integers(0, 256, (16, IMAGE, IMAGE, 3), dtype=np.uint8))
    asked = {"question": "what colour is the cube?", "answer": "red", "kind": "colour"}
    rows = [{"image": i % 16, **asked} for i in range(count)]
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (root / "meta.json").write_text(json.dumps({"camera": "front"}))
    return root


class _Training:
    """A run whose steps are asked for one block at a time."""

    def __init__(self, folder: Path, root: Path, questions: Path, inside: str):
        from bench.train import _base
        from burnish.core.recipe import load_recipe
        from burnish.train.run import Run
        from burnish.train.selfcheck import DivergenceGuard
        from burnish.train.step import Streams

        method = f"[{{name: isolate, questions: '{questions}', anchor_samples: 64, {inside}}}]" if inside else "[]"
        recipe = load_recipe(None, [
            f"--output={folder}", f"--data.root={root}", f"--policy.path={_base(folder)[0]}", f"--objectives={method}",
            f"--train.batch_size={BATCH}", "--train.steps=1000000", "--train.log_every=1000000",
            "--train.save_every=1000000", "--train.self_check=false",
        ])  # fmt: skip
        self.run = Run(recipe, progress=False)
        self.streams, self.watch = Streams(self.run), DivergenceGuard(folder, 0, late=self.run.device.type != "cpu")

    def steps(self, count: int) -> float:
        """Seconds that `count` steps take."""
        from bench.train import _wait
        from burnish.train.loop import train_step

        _wait(self.run.device)
        begin = time.perf_counter()
        for _ in range(count):
            train_step(self.run, self.streams, self.watch)
        _wait(self.run.device)
        return time.perf_counter() - begin

    def peak_bytes(self, trace: Path) -> float:
        """Most bytes that the tensors of one block's steps held at a time, beyond those held before."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.steps(EVERY)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.steps(EVERY)
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
        changes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
        return float(np.cumsum(changes).max())


def _in_turns(runs: dict[str, _Training], blocks: int) -> dict[str, list[float]]:
    from tqdm import tqdm

    for training in runs.values():  # warm up
        training.steps(1)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(blocks), desc="in turns", unit="block", file=sys.stderr):
        for name, training in runs.items():
            first = training.run.step % EVERY
            training.steps((EVERY - first) % EVERY)  # begin where a refresh is due
            seconds[name].append(training.steps(EVERY))
    return seconds


def _staleness(training: _Training, rounds: int) -> dict[str, list[float]]:
    """Cosines between edits with the direction of some steps ago and with that of the very step."""
    import torch

    from burnish.methods.isolate.project import Direction, edit

    run, method = training.run, training.run.objectives["isolate"]
    found: dict[str, list[float]] = {"gradient": [], "edit": []}
    original = method.edit_gradients

    def both(run, batch, grads):
        layout, mine = method.layout, {name: grads[name] for name in method._backbone if name in grads}
        task, results = torch.cat(layout.parts(mine)), []
        for direction in (method._refresh(run, mine), stale):  # of now, and of some steps ago
            gradient = layout.parts({name: g.clone() for name, g in mine.items()})
            edit(gradient, Direction([part.clone() for part in direction.vector], layout), layout)
            results.append(torch.cat(gradient))
        exact, approximate = results
        found["gradient"].append(float(torch.cosine_similarity(exact, approximate, dim=0)))
        if not torch.equal(exact, task):  # nothing conflicts at this step: there is no edit to compare
            found["edit"].append(float(torch.cosine_similarity(exact - task, approximate - task, dim=0)))
        method._direction = stale
        return original(run, batch, grads)

    for _ in range(rounds):
        training.steps((EVERY - run.step % EVERY) % EVERY + 1)
        for _ in range(3):
            stale = method._direction
            method._due = lambda _: True
            method.edit_gradients = both
            training.steps(1)
            del method._due, method.edit_gradients
    return found


def edit_against_loop(shapes: Mapping[str, Sequence[int]], repeats: int) -> dict[str, float]:
    """Time of the edit and of a loop over parameters, in turns; every layer in conflict, which is checked."""
    import torch

    from burnish.methods.gradients import Layout, group_of
    from burnish.methods.isolate.project import Direction, edit

    draws = torch.Generator().manual_seed(0)
    protected = {n: torch.randn(tuple(shape), generator=draws) for n, shape in shapes.items()}
    task = {n: torch.randn(tuple(shape), generator=draws) - 0.3 * protected[n] for n, shape in shapes.items()}
    layout = Layout(shapes, "layer")
    members = {g: [n for n in shapes if group_of(n, "layer") == g] for g in layout.groups}

    def ours(task: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        edit(layout.parts(task), Direction(layout.parts(protected), layout), layout, measure=False)
        return task

    def loop(task: dict[str, torch.Tensor], inside: bool = False) -> dict[str, torch.Tensor]:
        for names in members.values():
            along = sum((task[n] * protected[n]).sum() for n in names)
            if along < 0:
                square = sum((protected[n] * protected[n]).sum() for n in names)
                for n in names:
                    if inside:
                        task[n].sub_(along / square * protected[n])
                    else:
                        task[n] = task[n] - along / square * protected[n]
        return task

    def fresh() -> dict[str, torch.Tensor]:
        return {n: g.clone() for n, g in task.items()}  # both edit in place, and a conflict is gone after one edit

    error, edited = 0.0, ours(fresh())
    for names in members.values():
        a, b = (torch.cat([t[n].flatten() for n in names]).double() for t in (task, protected))
        along = a @ b
        exact, found = a - along / (b @ b) * b, torch.cat([edited[n].flatten() for n in names]).double()
        if not (along < 0 and (found - a).norm() > 0.1 * a.norm()):
            raise RuntimeError(f"no conflict in {names[0]}: the measurement would be void")
        error = max(error, float((found - exact).norm() / exact.norm()))
    contestants = {"ours": ours, "loop": loop, "inplace_loop": partial(loop, inside=True)}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(repeats + 1):
        for name, contestant in contestants.items():
            gradient = fresh()
            begin = time.thread_time()  # work, not waiting: what else runs on the machine does not count
            contestant(gradient)
            times[name].append(time.thread_time() - begin)
    torch.set_num_threads(threads)
    # Neighbours in time, so that a machine which slows down for a while slows down both.
    speedups = {
        f"edit_speedup_over_{name}": statistics.median(
            a / b for a, b in zip(times[name][1:], times["ours"][1:], strict=True)
        )
        for name in list(contestants)[1:]
    }
    return speedups | {"edit_error": error}
