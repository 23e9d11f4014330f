"""Fine-tune the shipped base on demonstrations, and measure it on episodes that it was not trained on.

    python examples/finetune.py
    python examples/finetune.py --data path/to/dataset --output runs/mine

Needs no simulator where --data names a data set of yours; otherwise demonstrations of "lift the red cube" are recorded.
"""

import argparse
from pathlib import Path

from burnish import compare, load_recipe, make_demos, run_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/examples/lift", help="LeRobotDataset; recorded where it is missing")
    parser.add_argument("--demos", type=int, default=60, help="demonstrations to record")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--output", default="runs/examples/finetune")
    args = parser.parse_args()

    if not Path(args.data).exists():
        make_demos("tabletop:lift", args.demos, args.data)
    recipe = load_recipe(None, [
        "--policy.path=small", f"--data.root={args.data}", f"--output={args.output}", f"--train.steps={args.steps}",
        "--data.held_out=[0, 1]", "--train.batch_size=32", "--train.lr=5e-4", "--train.warmup_steps=10",
    ])  # fmt: skip
    done = run_recipe(recipe)  # trains, then measures what came out, and the base where it has this robot's cameras
    for name, found in done.offline.items():
        print(f"\n{name}: {found}")
    if len(done.offline) > 1:
        print(f"\n{compare(*(done.folder / 'eval' / name for name in ('offline_base', 'offline')))}")
    print(f"\neverything on one page: {done.report}")


if __name__ == "__main__":  # simulators run in processes of their own, which import this file
    main()
