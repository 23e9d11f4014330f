"""`burnish train`: a thin layer over `burnish.train.loop.train`."""

import argparse

EXAMPLE = """example:
  burnish train --config recipes/tabletop/smolvla_small.yaml --train.steps=2000 --output=runs/try
  accelerate launch --num_processes 2 -m burnish.cli.main train --config recipes/tabletop/smolvla_small.yaml

Any field of the recipe can be given as --section.field=value. A run that was killed goes on where it stopped."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("--config", metavar="FILE", help="recipe (YAML); without it the defaults hold")
    parser.add_argument("--fresh", action="store_true", help="delete the run's earlier checkpoints and start over")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def main(args: argparse.Namespace) -> int:
    from burnish.core.recipe import load_recipe
    from burnish.train.loop import train

    result = train(load_recipe(args.config, args.overrides), resume=not args.fresh, progress=not args.quiet)
    loss = result.final.get("loss")
    print(f"policy: {result.policy}  steps: {result.steps}" + (f"  loss: {loss:.4g}" if loss is not None else ""))
    print(f"curves: {result.curves}  figures: {result.metrics}")
    return 0
