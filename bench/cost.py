"""What `burnish method cost` predicts for the recipes in recipes/real, and what fits into 24 and 80 GB."""

import argparse
import time
from pathlib import Path
from typing import Any

from burnish.core.recipe import load_recipe
from burnish.train.cost import GB, advise, predict

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "real"
PLAIN = ["--train.precision=no", "--train.memory.checkpointing=false", "--train.memory.frozen_dtype=float32",
         "--train.memory.optimizer=adamw", "--train.peft.method=none"]  # fmt: skip
CARDS = (24, 80)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Figures, in GB of 10^9 bytes:

    <recipe>: predicted peak on a GPU of the recipe as it stands.
    <policy>_plain: the same of training everything in float32 with nothing switched on, at the recipe's batch size.
    <policy>_<card>: what has to be switched on then to fit into a card.
    """
    from burnish.core.provenance import commit, machine

    info, figures, detail = machine(), {}, {}
    for path in sorted(RECIPES.glob("*.yaml")):
        start, recipe = time.perf_counter(), load_recipe(path)
        found = predict(recipe, gpu=True)
        figures[path.stem] = found.peak / GB
        detail[path.stem] = {name: size / GB for name, size in found.parts.items()} | {
            "trained": found.trained, "parameters": found.parameters, "assumed": found.assumed,
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        name = recipe.policy.type
        if f"{name}_plain" in figures or args.quick:
            continue
        plain = load_recipe(path, PLAIN)
        figures[f"{name}_plain"] = predict(plain, gpu=True).peak / GB
        for card in CARDS:
            figures[f"{name}_{card}"] = _fit(plain, figures[f"{name}_plain"], card)
    return {"name": "cost", "device": info.pop("device"), "versions": info, "n": 1, "figures": figures,
            "command": f"python -m bench cost{' --quick' * args.quick} --json",
            "detail": {"commit": commit(), **detail}}  # fmt: skip


def _fit(plain: Any, peak: float, card: int) -> str:
    if peak <= card:
        return "fits as it is"
    for said, found in advise(plain, card * GB, gpu=True):
        if found.peak <= card * GB:
            return f"{found.peak / GB:.1f} with {' '.join(said)}"
    return f"{found.peak / GB:.1f} with {' '.join(said)}: too much"
