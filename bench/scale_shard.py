"""Sharded training (FSDP2) on two gloo processes against one process that trains on the same micro-batches.

Two processes with one forward pass in a step, and one with two, see the same samples, draws and dropout, so that
whatever differs is the order of sums.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.types import Batch, PolicyLoss
from burnish.methods.objective import Objective, Run
from burnish.teachers.base import Teacher
from burnish.train.logging import read_rows

STEPS, CUT = 4, 2
LORA = ["--train.peft.method=lora", "--train.peft.rank=3"]
DORA = ["--train.peft.method=dora", "--train.peft.rank=3"]
LANGUAGE = ["--language.root={questions}", "--language.weight=0.5", "--language.batch_size=2",
            "--eval.questions.root={questions}", "--eval.questions.limit=2"]  # fmt: skip
ALIGN = "name: align, teacher: {{name: 'bench.scale_shard:Brightness'}}, pairs: [[0, 0], [1, 0]], cache: 'off'"
ISOLATE = "name: isolate, questions: {questions}, anchor_samples: 6, method: "
PREFER = "name: prefer, pairs: {pairs}, batch_size: 2, pool: 2, score: {{draws: 2}}"
CASES: dict[str, tuple[str, str, list[str]]] = {
    "plain": ("smolvla", "", ["--train.ema_decay=0.9", *LANGUAGE]),
    "plain_clipped": ("smolvla", "", ["--train.max_grad_norm=0.1"]),
    "discrete": ("burnish_discrete", "", []),
    "pi0": ("pi0", "", []),
    "pi05": ("pi05", "", []),
    "lora": ("smolvla", "", [*LORA, "--train.ema_decay=0.9"]),
    "dora": ("smolvla", "", DORA),
    "align": ("smolvla", f"{ALIGN}, weight: 0.5, measure_every: 2", []),
    "align_independent": ("smolvla", f"{ALIGN}, weight: 0.5, sharing: independent", []),
    "isolate_l2sp": ("smolvla", f"{ISOLATE}l2sp", []),
    "isolate_aegis": ("smolvla", f"{ISOLATE}aegis, every: 2", []),
    "isolate_adam": ("smolvla", f"{ISOLATE}aegis, optimiser: preconditioned, granularity: tensor", []),
    "isolate_self_anchor": ("smolvla", f"{ISOLATE}self_anchor", []),
    "isolate_self_penalty": ("smolvla", f"{ISOLATE}self_penalty", []),
    "isolate_self_penalty_bf16": ("smolvla", f"{ISOLATE}self_penalty", ["--train.precision=bf16"]),
    "isolate_agem": ("smolvla", f"{ISOLATE}agem, optimiser: first_moment", []),
    "isolate_insulate": ("smolvla", f"{ISOLATE}insulate", []),
    "isolate_replay": ("smolvla", f"{ISOLATE}replay", []),
    "isolate_random": ("smolvla", f"{ISOLATE}random", []),
    "isolate_lora": ("smolvla", f"{ISOLATE}lora", LORA),
    "capability": ("smolvla", "name: capability, delta: {delta}, weight: 0.1", []),
    "capability_projection": (
        "smolvla", "name: capability, kind: projection, gradient_norm_ratio: 0.3, delta: {delta}", [],
    ),
    "capability_gradient": ("smolvla", "name: capability, kind: gradient, delta: {delta}", []),
    "capability_lora": ("smolvla", "name: capability, kind: cosine, delta: {delta}, weight: 0.1", LORA),
    "capability_dora": ("smolvla", "name: capability, kind: ewc, delta: {delta}, gradient_norm_ratio: 0.3", DORA),
    "prefer": ("smolvla", PREFER, []),
    "prefer_adapter_off": ("smolvla", f"{PREFER}, reference: adapter_off", LORA),
    "together": (
        "smolvla", "}}, {{".join((
            f"{ALIGN}, weight: 0.5, measure_every: 2", f"{ISOLATE}self_anchor", "name: capability, delta: {delta}",
            PREFER,
        )), [],
    ),
    "adapters_together": (
        "smolvla",
        f"name: capability, kind: ewc, delta: {{delta}}, weight: 0.1}}}}, {{{{{PREFER}, reference: adapter_off", DORA,
    ),
    "distill": ("burnish_discrete", "name: distill, teacher: copy", []),
    "distill_adapters_off": ("burnish_discrete", "name: distill, teacher: adapters_off", LORA),
}  # fmt: skip
"""Name to policy, entry in `objectives:` and what else the recipe says; `{...}` are folders of `prepare`."""


class Brightness(Teacher):
    """One layer: how bright each patch is."""

    widths = (3,)

    def __init__(self, grid: Sequence[int]):
        super().__init__()
        self.grid, self.identity = tuple(grid), {"name": "brightness", "grid": list(grid)}

    def features(self, views: Any, layers: Sequence[int]) -> dict[int, Tensor]:
        cells = torch.nn.functional.adaptive_avg_pool2d(views.images.flatten(0, 1), self.grid).permute(0, 2, 3, 1)
        return {layer: cells.unflatten(0, views.images.shape[:2]) for layer in layers}


class Rows(Objective):
    """Notes which frames each micro-batch has, in <run folder>.<rank>.rows."""

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        with open(f"{run.output}.{run.accelerator.process_index}.rows", "a") as file:
            file.write(json.dumps([run.step, run.number, batch["index"].tolist()]) + "\n")
        return {}


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures:
    fsdp_max_difference: worst over plain training and every method: of weights after four steps (absolute), and of
        losses and gradient norms (relative where above 1).
    resume_other_ranks_equal: two processes cut in the middle and one that goes on, and the other way round, see the
        samples of an uninterrupted run and end at its weights, to 1e-6.
    """
    names = ["plain", "lora"] if args.quick else list(CASES)
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as temporary:
        folder = prepare(Path(temporary), {CASES[name][0] for name in names})
        launch(2, folder, "sharded", STEPS, names)
        launch(1, folder, "one", STEPS, names)
        differences = {name: difference(folder / "sharded" / name, folder / "one" / name) for name in names}
        resumed: dict[str, Any] = {}
        for before, after in ((2, 1), (1, 2)):
            where = f"{before}_to_{after}"
            launch(before, folder, where, CUT, ["plain"])
            launch(after, folder, where, STEPS, ["plain"])
            resumed[where] = difference(folder / where / "plain", folder / "sharded" / "plain")
            resumed[f"{where}_samples_equal"] = rows(folder / where) == rows(folder / "sharded")
    worst = max(max(found.values()) for found in differences.values())
    equal = all(found if isinstance(found, bool) else max(found.values()) <= 1e-6 for found in resumed.values())
    return (
        {"fsdp_max_difference": worst, "resume_other_ranks_equal": equal},
        {"cases": differences, "resumed": resumed, "steps": STEPS, "processes": 2},
    )


def prepare(folder: Path, kinds: Iterable[str]) -> Path:
    """Data, questions and pairs; of each policy a base and the task vector of a disturbed one."""
    from safetensors.torch import load_file, save_file

    from bench.isolate import make_questions
    from bench.train import make_frames
    from burnish.data.pairs import Pair, write_index
    from burnish.weights.extract import extract
    from workshop.tiny import make_tiny

    make_frames(folder / "data", episodes=4, frames=12, size=32)
    make_questions(folder / "questions", count=40)
    shutil.copytree(folder / "data", folder / "pairs")
    write_index(folder / "pairs", [Pair((0, i), (2, i)) for i in range(4)], {"source": "bench"}, 1e9)
    for kind in sorted(kinds):
        base, tuned = make_tiny(kind, folder / kind, cameras=("front",), state_dim=8), folder / f"{kind}-tuned"
        shutil.copytree(base, tuned)
        draws = torch.Generator().manual_seed(0)
        moved = {n: w + 0.01 * torch.randn(w.shape, generator=draws).to(w)
                 for n, w in load_file(base / "model.safetensors").items()}  # fmt: skip
        save_file(moved, tuned / "model.safetensors", metadata={"format": "pt"})
        extract(base, tuned, output=folder / f"{kind}-delta")
    return folder


def launch(world: int, folder: Path, where: str, stop: int, names: Sequence[str]) -> None:
    """Train cases up to step `stop` in `world` processes, by torchrun where there are several."""
    command = [sys.executable, "-m"]
    if world > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "-m"]
    command += ["bench.scale_shard", str(folder), where, str(stop), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise BurnishError(f"bench scale: {where} in {world} processes: {done.stderr.strip()[-2000:]}")


def train_cases(folder: Path, where: str, stop: int, names: Sequence[str]) -> None:
    """What every process does: train the cases one after the other, in <folder>/<where>/<name>."""
    from burnish.train import loop
    from burnish.train.setup import process_count

    plain, draw, loop.draw_curves = loop.train_step, loop.draw_curves, lambda *_: None

    def step(run: Any, *rest: Any, **named: Any) -> dict[str, float]:
        if run.step == stop:
            raise KeyboardInterrupt
        return plain(run, *rest, **named)

    loop.train_step = step
    try:
        for name in names:
            with suppress(KeyboardInterrupt):
                loop.train(recipe(folder, where, name, process_count()), progress=False)
    finally:
        loop.train_step, loop.draw_curves = plain, draw


def recipe(folder: Path, where: str, name: str, world: int) -> Any:
    """The recipe of a case: the processes' passes in a step make two micro-batches together."""
    from burnish.core.recipe import load_recipe

    kind, entry, more = CASES[name]
    places = {place: folder / place for place in ("questions", "pairs")} | {"delta": folder / f"{kind}-delta"}
    entries = [f"{{{entry.format(**places)}}}"] if entry else ["{name: 'bench.scale_shard:Rows'}"]
    overrides = {"block_size": 28, "noise": "pipeline"} if kind == "burnish_discrete" else {}
    return load_recipe(None, [
        f"--policy.path={folder / kind}", f"--policy.overrides={json.dumps(overrides)}",
        f"--data.root={folder / 'data'}", f"--output={folder / where / name}",
        f"--objectives=[{', '.join(entries)}]", f"--train.steps={STEPS}",
        "--train.batch_size=2", f"--train.grad_accumulation={2 // world}", "--train.log_every=1",
        f"--train.save_every={CUT}", "--train.lr=1e-4", "--train.warmup_steps=2", "--data.workers=1",
        "--train.shard=true", *(one.format(**places) for one in more),
    ])  # fmt: skip


def difference(one: Path, other: Path) -> dict[str, float]:
    """Largest differences of two runs: weights that they export, and the losses and gradient norms of their rows."""
    found = {"weights": moved(one, other)}
    for x, y in zip(*(read_rows(run / "metrics.jsonl") for run in (one, other)), strict=True):
        for name in (n for n in x.keys() & y.keys() if n == "grad_norm" or n.startswith("loss")):
            found[name] = max(found.get(name, 0.0), abs(x[name] - y[name]) / max(1.0, abs(y[name])))
    return found


def moved(one: Path, other: Path) -> float:
    """Largest difference of a weight between the policies of two runs."""
    from safetensors.torch import load_file

    a, b = (load_file(run / "policy" / "model.safetensors") for run in (one, other))
    if a.keys() != b.keys():
        return math.inf
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel())


def rows(folder: Path) -> list[Any]:
    """Step, number and frames of every micro-batch of the plain case, in order."""
    lines = [line for path in folder.glob("plain.*.rows") for line in path.read_text().splitlines()]
    return sorted(json.loads(line) for line in lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_cases(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
