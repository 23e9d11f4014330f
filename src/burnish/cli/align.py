"""`burnish align`: fill the cache of a 3D teacher, choose layers, and look at what alignment did."""

import argparse
import json
from pathlib import Path

from burnish.core.errors import BurnishError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    cache = kinds.add_parser("cache", help="compute the teacher features that a recipe needs, before training")
    cache.add_argument("recipe", help="a training recipe; its align entry, or our default one, says what is needed")
    select = kinds.add_parser("select", help="compare layers and print the pairs of every strategy")
    select.add_argument("recipe", help="a training recipe; its align entry names the teacher")
    select.add_argument("--count", type=int, default=3, help="pairs wanted (default 3)")
    select.add_argument("--batches", type=int, default=8, help="batches to measure on (default 8)")
    select.add_argument("--picture", type=Path, default=Path("cka.png"), help="where the CKA heatmap goes")
    plot = kinds.add_parser("plot", help="draw coherence and conflict of the gradients over training")
    plot.add_argument("runs", nargs="+", type=Path, help="run folders")
    plot.add_argument("--picture", type=Path, default=Path("gradients.png"), help="where the picture goes")
    picture = kinds.add_parser("picture", help="what image tokens see before and after, beside the teacher's")
    picture.add_argument("runs", nargs="+", type=Path, help="run folders; the first one's teacher is shown")
    picture.add_argument("--layer", type=int, default=-1, help="student layer; default: the deepest aligned one")
    picture.add_argument("--picture", type=Path, default=Path("tokens.png"), help="where the picture goes")
    parser.epilog = "examples:\n  burnish align select recipes/align/base.yaml --count 3"


def main(args: argparse.Namespace) -> int:
    return {"cache": _cache, "select": _select, "plot": _plot, "picture": _picture}[args.what](args)


def _run(recipe_path: str, objective_set_up: bool):
    """A Run of a recipe with no objective but align (our default where it names none), or with none; and the Align."""
    from burnish.core.recipe import load_recipe
    from burnish.methods.align.objective import Align
    from burnish.train.run import Run

    recipe = load_recipe(recipe_path, ["--train.self_check=false"])
    entries = [dict(entry) for entry in recipe.objectives if entry["name"] == "align"] or [{"name": "align"}]
    options = {k: v for k, v in entries[0].items() if k != "name"}
    recipe.objectives = entries if objective_set_up else []
    return Run(recipe), Align(**options)


def _cache(args: argparse.Namespace) -> int:
    from burnish.methods.align.targets import CachedTargets
    from burnish.train.setup import own_accelerate_state

    with own_accelerate_state():
        run, _ = _run(args.recipe, objective_set_up=True)
    targets = run.objectives["align"].targets
    if not isinstance(targets, CachedTargets):
        raise BurnishError(f"{args.recipe} says cache: off", "a recipe that keeps teacher features")
    cache = targets.cache
    print(f"{cache.folder}: {cache.num_bytes / 1e6:.1f} MB, {cache.bytes_per_sample:.0f} bytes a sample")
    return 0


def _select(args: argparse.Namespace) -> int:
    from burnish.methods.align.analysis import all_selections, compare_layers
    from burnish.report.align_plots import draw_cka
    from burnish.train.setup import own_accelerate_state

    with own_accelerate_state():
        run, objective = _run(args.recipe, objective_set_up=False)
        comparison = compare_layers(run, objective, args.batches)
    chosen = all_selections(comparison, args.count)
    for name, pairs in chosen.items():
        print(f"{name:12s} pairs: {[list(pair) for pair in pairs]}")
    draw_cka(comparison, chosen["cka"], args.picture)
    print(f"CKA of all layers: {args.picture}")
    return 0


def _plot(args: argparse.Namespace) -> int:
    from burnish.report.align_plots import draw_gradients

    runs = {}
    for folder in args.runs:
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise BurnishError(f"no metrics.jsonl in {folder}", "a run folder")
        runs[folder.name] = [json.loads(line) for line in path.read_text().splitlines()]
    draw_gradients(runs, args.picture)
    print(args.picture)
    return 0


def _picture(args: argparse.Namespace) -> int:
    from burnish.core.recipe import load_recipe
    from burnish.policies import load_policy
    from burnish.report.align_tokens import show_tokens
    from burnish.train.run import Run
    from burnish.train.setup import own_accelerate_state

    recipe = load_recipe(args.runs[0] / "recipe.yaml", ["--train.batch_size=128", "--train.self_check=false"])
    recipe.objectives = [entry for entry in recipe.objectives if entry["name"] == "align"]
    if not recipe.objectives:
        raise BurnishError(f"{args.runs[0]} was trained without the objective align", "an aligned run first")
    with own_accelerate_state():
        run = Run(recipe, progress=False)
        policies = {folder.name: load_policy(folder / "policy") for folder in args.runs}
        show_tokens(run, run.objectives["align"], {"before": run.policy, **policies}, args.layer, args.picture)
    print(args.picture)
    return 0
