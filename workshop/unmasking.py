"""Which order of unmasking, in how many passes: one policy of masked diffusion in closed loop, order and passes apart.

Trains burnish_discrete on tabletop lift for each seed (steps beyond an episode's end are trained as repeats) and lets
every plan act from the same initial states, a block of states at a time, so that whatever is there when it is stopped
compares all plans on the same trials. The same command continues. Raw outcomes go to the result file as they come.
"""

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.provenance import commit, machine
from burnish.core.reading import read_object
from burnish.core.recipe import load_recipe
from burnish.data.demos import make_demos
from burnish.evaluate.rollout import evaluate
from burnish.experiments.results import write_result
from burnish.experiments.variants import MARGIN, measure_rows
from burnish.policies import load_policy
from burnish.train.loop import train

ORDERS = ("confidence", "executed", "time", "random")
PASSES = (2, 4, 12)
FIRST_STATE = 1_000_000
REFERENCE = "confidence_12"


def plans() -> dict[str, dict[str, Any]]:
    """Config fields of every plan by name: one pass, and every order at every number of passes (cosine schedule)."""
    found: dict[str, dict[str, Any]] = {"one_pass": {"decoder": "one_pass"}}
    for passes in PASSES:
        for order in ORDERS:
            options = {"steps": passes, "order": order, "ties": "first"}
            found[f"{order}_{passes}"] = {"decoder": "prompt_cached", "decoder_options": options}
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  python -m workshop unmasking --seeds 0,1,2 --output results/decode/unmasking.json"
    parser.add_argument("--seeds", default="0,1,2", help="training seeds, separated by commas")
    parser.add_argument("--states", type=int, default=200, help="initial states, the same for every plan and seed")
    parser.add_argument("--block", type=int, default=25, help="states before the next plan has its turn")
    parser.add_argument("--steps", type=int, default=900, help="training steps")
    parser.add_argument("--demos", type=int, default=2500, help="demonstrations")
    parser.add_argument("--data", default="data/tabletop/quickstart", help="data set, made where it is missing")
    parser.add_argument("--work", default="runs/decode/unmasking", help="folder of policies and episodes")
    parser.add_argument("--output", default="results/decode/unmasking.json", help="result file")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads and simulators; 0 takes all cores")


def main(args: argparse.Namespace) -> int:
    import torch

    if min(args.states, args.block, args.steps, args.demos) < 1 or args.threads < 0:
        raise BurnishError("states, block, steps or demos below 1", "whole numbers of at least 1")
    seeds = [int(word) for word in args.seeds.split(",") if word.strip().isdigit()]
    if not seeds:
        raise BurnishError(f"--seeds {args.seeds}", "whole numbers such as 0,1,2")
    if args.threads:
        torch.set_num_threads(args.threads)
    data = Path(args.data)
    if not data.exists():
        make_demos("tabletop:lift", args.demos, data, image_size=96, cameras=["front"], workers=args.threads)
    metrics, began = _open(args), time.monotonic()
    for seed in seeds:
        _measure(args, seed, _trained(args, seed), metrics, began)
    _write(args, metrics, began)
    return 0


def _open(args: argparse.Namespace) -> dict[str, Any]:
    """Settings, minutes and outcomes so far; raises BurnishError where the file was made with other settings."""
    settings = {name: getattr(args, name) for name in ("steps", "demos", "block")}
    path = Path(args.output)
    if not path.exists():
        return {"settings": settings, "minutes": 0.0, "outcomes": {name: {} for name in plans()}}
    found = read_object(path).get("metrics", {})
    if found.get("settings") != settings:
        raise BurnishError(f"{path} was made with {found.get('settings')}", f"{settings}", "another --output")
    return found


def _trained(args: argparse.Namespace, seed: int) -> Path:
    """The policy of a seed."""
    output = Path(args.work) / f"weights-{seed}"
    words = [f"--train.seed={seed}", f"--train.steps={args.steps}", f"--data.root={args.data}", f"--output={output}",
             "--eval.questions.root="]  # fmt: skip
    return train(load_recipe("decode/train_bidirectional", words)).policy


def _measure(args: argparse.Namespace, seed: int, policy: Path, metrics: dict[str, Any], began: float) -> None:
    """All plans of one seed, a block of states at a time; the result file is written after each."""
    loaded = {name: load_policy(policy, overrides=fields) for name, fields in plans().items()}
    for first in range(0, args.states, args.block):
        count = min(args.block, args.states - first)
        for name, model in loaded.items():
            done = metrics["outcomes"][name].setdefault(str(seed), {})
            if all(str(FIRST_STATE + first + i) in done for i in range(count)):
                continue
            found = evaluate(
                model, "tabletop:lift", episodes=count, first_state=FIRST_STATE + first, workers=args.threads,
                output=Path(args.work) / f"eval-{seed}" / name / f"{first:06d}", video=False, progress=False,
            )  # fmt: skip
            done |= {str(record.initial_state): record.success for record in found.records}
            _write(args, metrics, began)
            print(f"seed {seed}, states {first} to {first + count - 1}: {name} {found.overall}", flush=True)


def _write(args: argparse.Namespace, metrics: dict[str, Any], began: float) -> None:
    """The result file: a row for each plan on the states that all of its seeds have seen."""
    known = {name: {int(seed): {at: float(won) for at, won in done.items()} for seed, done in by_seed.items() if done}
             for name, by_seed in metrics["outcomes"].items()}  # fmt: skip
    words = ["python -m workshop unmasking", f"--seeds {args.seeds}", f"--states {args.states}",
             *(f"--{name} {value}" for name, value in metrics["settings"].items())]  # fmt: skip
    seeds = sorted({seed for by_seed in known.values() for seed in by_seed})
    minutes = metrics["minutes"] + (time.monotonic() - began) / 60
    write_result(
        args.output, recipe="recipes/decode/train_bidirectional.yaml", command=" ".join(words), commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"), hardware=machine()["device"],
        seeds={"train": ", ".join(map(str, seeds)), "demos": 0}, rows=measure_rows(known), minutes=minutes,
        metrics={**metrics, "minutes": minutes},
        declared={"endpoint": "success", "lower": [], "margin": MARGIN, "reference": REFERENCE, "gates": [],
                  "stopping": len(args.seeds.split(","))},
    )  # fmt: skip
