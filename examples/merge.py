"""Take out what a fine-tune has learnt as a task vector, and have it in several doses (CapVector).

    python examples/merge.py
    python examples/merge.py --base path/to/base --tuned path/to/tuned --data path/to/dataset

With a dose of 1 the merged policy is the fine-tune; between 0 and 1 it is on the way there. What is left of the dose is
taken off the fine-tune, so that it keeps the cameras and statistics of its robot, which the base may lack.
"""

import argparse
from pathlib import Path

from burnish import load_recipe, make_demos, train
from burnish.evaluate.offline import evaluate_offline
from burnish.weights.extract import extract
from burnish.weights.inspect import inspect
from burnish.weights.merge import merge
from burnish.weights.verify import verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="small", help="what was fine-tuned")
    parser.add_argument("--tuned", default="", help="the fine-tune; made here where none is named")
    parser.add_argument("--data", default="data/examples/lift", help="LeRobotDataset; recorded where it is missing")
    parser.add_argument("--demos", type=int, default=60, help="demonstrations to record")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps of the fine-tune")
    parser.add_argument("--output", default="runs/examples/merge")
    args = parser.parse_args()

    out = Path(args.output)
    if not Path(args.data).exists():
        make_demos("tabletop:lift", args.demos, args.data)
    recipe = load_recipe(None, [
        f"--policy.path={args.base}", f"--data.root={args.data}", f"--output={out}/tuned", "--data.held_out=[0, 1]",
        f"--train.steps={args.steps}", "--train.batch_size=32", "--train.lr=5e-4", "--train.warmup_steps=10",
    ])  # fmt: skip
    tuned = args.tuned or train(recipe).policy

    vector = extract(args.base, tuned, output=out / "vector", heads="keep", force=True)
    shares = inspect(vector.path)["groups"]
    print("where it changed: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    for dose in (0.5, 1.0):
        merged = out / f"merged_{dose}"
        merge(tuned, [(vector.path, dose - 1)], output=merged, heads="keep", other_base=True, force=True)
        checked = verify(merged)
        found = evaluate_offline(merged, recipe.data, output=out / f"eval_{dose}", video=False)
        print(
            f"dose {dose}: action error {found.to_dict()['offline']['figures']['error'][0]:.3f}, "
            f"{checked['unequal']} of {checked['elements']:,} weights other than they should be"
        )


if __name__ == "__main__":  # simulators run in processes of their own, which import this file
    main()
