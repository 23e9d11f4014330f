"""What `burnish run` would do, without doing it: stages, minutes and GB, as far as they can be told before."""

import math
from collections.abc import Iterator
from pathlib import Path

from burnish.core.config import RecipeConfig
from burnish.core.recipe import demos_root, run_folder
from burnish.envs.base import expand, offers_swap
from burnish.experiments.study import StudyConfig, study_chain, study_folder, variant_recipe
from burnish.train.cost import GB, fitted, memory, predicting, seconds
from burnish.train.run import check_resumable
from burnish.train.setup import make_objectives

UNKNOWN = "minutes of simulators and teachers are not counted"


def plan_recipe(recipe: RecipeConfig) -> list[str]:
    """A line for each stage of a run; raises BurnishError for what the run itself would refuse at its start."""
    make_objectives(recipe)
    check_resumable(recipe)
    output, root, demos = run_folder(recipe), demos_root(recipe), recipe.demos
    made = f": {demos.episodes} demonstrations of {demos.env} would be made" if demos.env else ", which is missing"
    lines = [f"run         {output}" + ", which goes on" * (output / "recipe.yaml").is_file(),
             f"data        {root}" + ("" if root.is_dir() else made)]  # fmt: skip
    lines.append(f"training    {_training(recipe)[0]}")
    lines += [f"evaluation  {line}" for line in _evaluations(recipe)]
    return [*lines, f"report      {output / 'report.html'}"]


def plan_study(study: StudyConfig, base: RecipeConfig) -> list[str]:
    """A line for each variant of a study, and the sums."""
    folder, lines, minutes, disk = study_folder(study), [f"setup       {line}" for line in study.setup], 0.0, 0.0
    for name in study.variants:
        if study.steps:
            count = sum(len(link.lines) for link in study_chain(study, base, name, study.seeds[0])[0])
            lines.append(f"{name:<11} {len(study.seeds)} policies, each made by {count} commands")
            continue
        text, each, size = _training(variant_recipe(study, base, name, study.seeds[0]))
        done = sum((folder / f"{name}-{seed}" / "train.json").is_file() for seed in study.seeds)
        lines.append(f"{name:<11} {len(study.seeds)} runs, {done} of them trained, each {text}")
        minutes, disk = minutes + (len(study.seeds) - done) * each, disk + len(study.seeds) * size
    lines += [f"evaluation  {line}" for line in _evaluations(base)]
    lines += [f"evaluation  also {', '.join(study.evals)}"] * bool(study.evals)
    if study.steps:
        return [*lines, f"in all      {folder}; minutes of steps, which are commands, cannot be told"]
    return [*lines, f"in all      {_time(minutes)} of training to do, {disk / GB:.1f} GB in {folder}; {UNKNOWN}"]


def _training(recipe: RecipeConfig) -> tuple[str, float, float]:
    """A training in words, its minutes, and its bytes on the disk."""
    recipe, (room, on_gpu) = fitted(recipe), memory()
    train = recipe.train
    with predicting(recipe, on_gpu) as prediction:
        found = prediction.cost(train.batch_size)
        minutes = seconds(prediction.work(train.batch_size) * train.grad_accumulation, on_gpu) * train.steps / 60
    kept = 2 if train.keep_checkpoints is None else max(1, train.keep_checkpoints)
    # A checkpoint holds the policy and, of what is trained, weights and two moments; the policy lies there once more.
    disk = 4.0 * (found.parameters + kept * (found.parameters + 3 * found.trained))
    text = (f"{train.steps} steps of {train.batch_size * train.grad_accumulation} samples, {_time(minutes)}, "
            f"{found.peak / GB:.1f} of {room / GB:.1f} GB, {disk / GB:.1f} GB on the disk")  # fmt: skip
    return text, minutes, disk


def _evaluations(recipe: RecipeConfig) -> Iterator[str]:
    settings, env = recipe.eval, recipe.eval.env or recipe.demos.env
    variants = ["fine-tuned", *["base"] * bool(settings.base and recipe.policy.path)]
    if env:
        closed = [*variants, *["told another object"] * (settings.instruction_swap and offers_swap(env))]
        closed += ["random-object expert"] * settings.random_object_expert
        yield f"{len(expand(env)) * settings.episodes} episodes of {env} each: {', '.join(closed)}; {UNKNOWN}"
    if recipe.data.held_out:
        yield f"offline on {min(settings.episodes, len(recipe.data.held_out))} held-out episodes: {', '.join(variants)}"
    if settings.questions.root:
        there = "" if Path(settings.questions.root).exists() else ", which would be made"
        yield f"questions in {settings.questions.root}{there}"


def _time(minutes: float) -> str:
    return f"about {math.ceil(minutes)} min" if minutes < 180 else f"about {minutes / 60:.1f} hours"
