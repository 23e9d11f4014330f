"""Align a policy's image tokens with a 3D teacher while it learns to act (ROCKET, Spatial Forcing).

    python examples/align.py
    python examples/align.py --preset spatial_forcing
    python examples/align.py --data path/to/dataset --teacher '{name: folder, path: data/teachers/vision}'

The teacher is the simulator's own geometry, kept beside the demonstrations. For data of a robot take a vision model,
such as DINOv2: docs/methods/align.md.
"""

import argparse
import json
from pathlib import Path

from burnish import load_recipe, make_demos, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", default="data/examples/lift_depth", help="LeRobotDataset; recorded where it is missing"
    )
    parser.add_argument("--demos", type=int, default=40, help="demonstrations to record")
    parser.add_argument("--teacher", default="geometry", help="see docs/methods/align.md; geometry needs depth")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps")
    parser.add_argument("--preset", default="default", help="default, spatial_forcing, paper or released_code")
    parser.add_argument("--output", default="runs/examples/align")
    args = parser.parse_args()

    if not Path(args.data).exists():
        make_demos("tabletop:lift", args.demos, args.data, geometry=True)
    result = train(load_recipe(None, [
        "--policy.path=small", f"--data.root={args.data}", f"--output={args.output}", f"--train.steps={args.steps}",
        "--train.batch_size=16", "--train.lr=5e-4", "--train.warmup_steps=10", "--train.log_every=5",
        f"--objectives=[{{name: align, preset: {args.preset}, teacher: {args.teacher}}}]",
    ]))  # fmt: skip

    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    for name in sorted(key for key in rows[-1] if key.startswith("align_") or key == "loss"):
        first = next(row[name] for row in rows if name in row)
        print(f"{name:<40} {first:10.4f} -> {rows[-1][name]:10.4f}")
    print(f"curves: {result.curves}; an ordinary LeRobot policy, as fast as before: {result.policy}")


if __name__ == "__main__":  # simulators run in processes of their own, which import this file
    main()
