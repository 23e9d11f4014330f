"""Which order of unmasking, in how many passes: one policy of masked diffusion in closed loop, order and passes apart.

Trains burnish_discrete on tabletop lift for each seed (steps beyond an episode's end are trained as repeats) and lets
every plan act from the same initial states, a block of states at a time, so that whatever is there when it is stopped
compares all plans on the same trials. The same command continues. Raw outcomes go to the result file as they come.
"""

import argparse
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.provenance import commit, machine
from burnish.core.reading import read_object
from burnish.core.recipe import load_recipe
from burnish.data.demos import make_demos
from burnish.evaluate.rollout import evaluate
from burnish.evaluate.stats import wilson
from burnish.policies import load_policy
from burnish.train.loop import train

ORDERS = ("confidence", "executed", "time", "random")
PASSES = (2, 4, 12)
FIRST_STATE = 1_000_000


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
    result = _open(args)
    for seed in seeds:
        _measure(args, seed, _trained(args, seed), result)
    return 0


def _open(args: argparse.Namespace) -> dict[str, Any]:
    """The result so far, or an empty one; raises BurnishError where it was made with other settings."""
    settings = {name: getattr(args, name) for name in ("steps", "demos", "block")}
    path = Path(args.output)
    if path.exists():
        found = read_object(path)
        if found.get("settings") != settings:
            raise BurnishError(f"{path} was made with {found.get('settings')}", f"{settings}", "another --output")
        return found
    info = machine()
    return {
        "name": "decode/unmasking", "command": "python -m workshop unmasking", "device": info.pop("device"),
        "versions": info, "commit": commit(), "settings": settings, "rows": [],
        "outcomes": {name: {} for name in plans()},
    }  # fmt: skip


def _trained(args: argparse.Namespace, seed: int) -> Path:
    """The policy of a seed."""
    output = Path(args.work) / f"weights-{seed}"
    words = [f"--train.seed={seed}", f"--train.steps={args.steps}", f"--data.root={args.data}", f"--output={output}",
             "--eval.questions.root="]  # fmt: skip
    return train(load_recipe("decode/train_bidirectional", words)).policy


def _measure(args: argparse.Namespace, seed: int, policy: Path, result: dict[str, Any]) -> None:
    """All plans of one seed, a block of states at a time; the result file is written after each."""
    loaded = {name: load_policy(policy, overrides=fields) for name, fields in plans().items()}
    for first in range(0, args.states, args.block):
        count = min(args.block, args.states - first)
        for name, model in loaded.items():
            done = result["outcomes"][name].setdefault(str(seed), {})
            if all(str(FIRST_STATE + first + i) in done for i in range(count)):
                continue
            found = evaluate(
                model, "tabletop:lift", episodes=count, first_state=FIRST_STATE + first, workers=args.threads,
                output=Path(args.work) / f"eval-{seed}" / name / f"{first:06d}", video=False, progress=False,
            )  # fmt: skip
            done |= {str(record.initial_state): record.success for record in found.records}
            result["rows"] = [_row(label, by_seed) for label, by_seed in result["outcomes"].items()]
            write_json(Path(args.output), result)
            print(f"seed {seed}, states {first} to {first + count - 1}: {name} {found.overall}", flush=True)


def _row(label: str, by_seed: dict[str, dict[str, bool]]) -> dict[str, Any]:
    every = [success for outcomes in by_seed.values() for success in outcomes.values()]
    rate = wilson(sum(every), len(every)).to_dict() if every else {}
    return {
        "label": label, **rate,
        "by_seed": {seed: sum(o.values()) / len(o) for seed, o in by_seed.items() if o},
    }  # fmt: skip
