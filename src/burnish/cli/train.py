"""`burnish train`."""

from typing import Annotated

from burnish.cli.parser import Arg
from burnish.core.config import RecipeConfig


def train(
    *overrides: Annotated[str, Arg(fields=RecipeConfig)], config: Annotated[str | None, Arg(metavar="FILE")] = None,
    fresh: bool = False, quiet: bool = False,
) -> None:  # fmt: skip
    """Fine-tune a policy as a recipe says.

    Any field of the recipe can be given as --section.field=value. A run that was killed goes on where it stopped.

    Args:
        config: recipe: a YAML file, or the name of a shipped one; without it the defaults hold
        fresh: delete the run's earlier checkpoints and start over
        quiet: no progress bar

    Examples:
        burnish train --config tabletop/smolvla_small --train.steps=2000 --output=runs/try
        accelerate launch --num_processes 2 -m burnish.cli.main train --config tabletop/smolvla_small
    """
    from burnish.core.recipe import load_recipe
    from burnish.train.loop import train

    result = train(load_recipe(config, overrides), resume=not fresh, progress=not quiet)
    loss = result.final.get("loss")
    print(f"policy: {result.policy}  steps: {result.steps}" + (f"  loss: {loss:.4g}" if loss is not None else ""))
    print(f"curves: {result.curves}  figures: {result.metrics}")
