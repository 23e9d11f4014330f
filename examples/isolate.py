"""Fine-tune on actions and keep what the language model knows: plain, and held to its start (`isolate`).

    python examples/isolate.py
    python examples/isolate.py --method stop_gradient

Held-out questions about scenes are asked before and after. For questions of your own see docs/questions.md.
"""

import argparse
from pathlib import Path

from burnish import load_policy, load_recipe, make_demos, make_questions, retention, train
from burnish.evaluate.retention import compare_retention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/examples/lift", help="LeRobotDataset; recorded where it is missing")
    parser.add_argument("--demos", type=int, default=60, help="demonstrations to record")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each training")
    parser.add_argument("--scenes", type=int, default=60, help="pictures with five questions each")
    parser.add_argument("--method", default="l2sp", help="a method of docs/methods/isolate.md that needs no question")
    parser.add_argument("--output", default="runs/examples/isolate")
    args = parser.parse_args()

    if not Path(args.data).exists():
        make_demos("tabletop:lift", args.demos, args.data)
    questions = make_questions("tabletop", args.scenes, Path(args.output, "questions"), per_scene=5, seed=5_000_000)
    base = retention(load_policy("small"), questions)
    print(f"before: {base}")
    for method in ("naive", args.method):
        recipe = load_recipe(None, [
            "--policy.path=small", f"--data.root={args.data}", f"--output={args.output}/{method}",
            f"--train.steps={args.steps}", "--train.batch_size=32", "--train.lr=5e-4", "--train.warmup_steps=10",
            f"--objectives=[{{name: isolate, method: {method}}}]",
        ])  # fmt: skip
        after = retention(load_policy(train(recipe).policy), questions)
        change = compare_retention(base, after)
        print(f"{method}: {after}; forgotten {change['forgotten']}, learned {change['learned']}, p = {change['p']:.3f}")


if __name__ == "__main__":  # simulators run in processes of their own, which import this file
    main()
