"""`burnish run`: a recipe from data to report, or a study of many runs."""

import multiprocessing
import os
import runpy
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

from burnish.cli.parser import Arg
from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError

_INSIDE = "BURNISH_INSIDE_A_STUDY"


def run(
    recipe: str, *overrides: Annotated[str, Arg(fields=RecipeConfig)], result: Path | None = None, fresh: bool = False,
    dry_run: bool = False, variants: Annotated[str, Arg(old=("--arms",))] = "", seeds: str = "",
    engine: str = "processes", workers: Annotated[int, Arg(least=0, most=1024)] = 0, num_gpus: float | None = None,
) -> None:  # fmt: skip
    """Run a whole recipe (data, training, evaluation, report), or a study: several variants with several seeds.

    Any field of the recipe can follow as --section.field=value. The same command again goes on where it stopped.

    Args:
        recipe: recipe or study: a YAML file, or the name of a shipped one
        result: also write the outcome to this file, e.g. results/x.json
        dry_run: only say what would be done, with minutes and GB as far as they can be told
        fresh: of a recipe: delete the run's earlier training and measurements
        variants: of a study: only these, separated by commas (the reference among them)
        seeds: of a study: only these of the declared ones, separated by commas
        engine: of a study: processes (one run after the other), ray, or ray:HOST:PORT, a cluster that runs
        workers: of a study on Ray: runs at a time; 0 means as many as there is room for
        num_gpus: of a study on Ray: GPUs for each run; default: one where the cluster has any

    Examples:
        burnish run tabletop/quickstart --train.steps=500
        burnish run align/core --seeds 0,1 --result results/align/core.json
        burnish run align/core --engine ray:10.0.0.1:6379 --num-gpus 1
    """
    from burnish.core.recipe import find_recipe, is_study, read_yaml

    if is_study(read_yaml(find_recipe(recipe))):
        if fresh:
            raise BurnishError("--fresh with a study", "a recipe", "delete the run folders that are to be made again")
        where = {"engine": engine, "workers": workers, "num_gpus": num_gpus}
        _run_study(recipe, overrides, result, variants, seeds, where, dry_run)
    elif variants or seeds or engine != "processes":
        raise BurnishError(f"--variants, --seeds or --engine with {recipe}, which is no study", "a study file")
    else:
        _run_recipe(recipe, overrides, result, fresh, dry_run)


def _run_recipe(path: str, overrides: tuple[str, ...], result: Path | None, fresh: bool, dry_run: bool) -> None:
    from burnish.core.recipe import load_recipe
    from burnish.experiments.pipeline import RESULT_LABELS, run_recipe

    recipe = load_recipe(path, overrides)
    if dry_run:
        from burnish.experiments.plan import plan_recipe

        print("\n".join(plan_recipe(recipe)))
        return
    command = shlex.join(["burnish", "run", path, *overrides])
    outcome = run_recipe(recipe, command=command, result=result, fresh=fresh)
    for variant, found in outcome.evaluations.items():
        print(f"{RESULT_LABELS[variant]}: {found.overall}")
    for variant, offline in outcome.offline.items():
        print(f"{RESULT_LABELS[variant]}:\n{offline}")
    print(f"report: {outcome.report}")


def _run_study(
    path: str, overrides: tuple[str, ...], result: Path | None, variants: str, seeds: str, where: dict[str, Any],
    dry_run: bool,
) -> None:  # fmt: skip
    from burnish.experiments.study import choose, load_study, run_study

    if os.environ.get(_INSIDE):
        raise BurnishError(f"{path} is a study in the setup of a study", "a recipe, or another command")
    study, base = load_study(path, overrides)
    choose(study, variants, seeds)
    if dry_run:
        from burnish.experiments.plan import plan_study

        print("\n".join(plan_study(study, base)))
        return
    only = [word for name, value in (("--variants", variants), ("--seeds", seeds)) if value for word in (name, value)]
    command = shlex.join(["burnish", "run", path, *only, *overrides])
    print(f"runs: {run_study(study, base, command=command, result=result, run_setup=run_setup, **where)}")


def run_setup(line: str) -> int:
    """Run a command of a study (see `burnish.experiments.steps.SETUP`) in a process of its own; its exit status.

    It is forked from one that has imported what most commands need, which takes longer than many of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["burnish.train.loop", "lerobot.policies"])
    process = context.Process(target=_command, args=(line,))
    process.start()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: else it would go on without us
    try:
        process.join()
    finally:
        signal.signal(signal.SIGTERM, before)
        process.terminate()
        process.join()
    return process.exitcode or 0


def _command(line: str) -> None:
    os.environ[_INSIDE] = "1"
    words = shlex.split(line)
    module, *sys.argv[1:] = words[2:] if words[:2] == ["python", "-m"] else ["burnish.cli.main", *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


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
