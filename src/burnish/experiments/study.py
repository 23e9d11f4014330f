"""`burnish study FILE`: arms x seeds, each an ordinary run, measured on the same trials and put into one table.

Every stage continues where a killed study left it, and the result is written anew after each run. Several processes
may share the work (`--seeds 0` beside `--seeds 1`); a last call without the option finds it done and collects it.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from burnish.core.config import EvalConfig, RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.files import alone, read_object
from burnish.core.options import refuse_unknown
from burnish.core.recipe import demos_root, load_recipe, merge, read_yaml, recipe_from_dict, recipe_to_dict, run_folder

QUESTIONS = "questions, exact"
"""Name of the questions among the evaluations."""


@dataclass
class StudyConfig:
    """A study file. `{seed}` and `{out}` in `before` and `arms` stand for the seed and the study's folder."""

    name: str = ""
    """Result name; runs go to runs/<name>/<arm>-<seed>."""
    recipe: str = ""
    """What all arms share: a recipe file, relative to the study file."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Training seeds (and seeds of the policy's noise in evaluation)."""
    reference: str = ""
    """The arm that the others are compared with; empty means the first."""
    before: list[str] = field(default_factory=list)
    """Burnish commands to run once for each seed before its arms."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name to changes of the recipe."""
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further evaluations: name to changes of the recipe's eval section; "main" is the section itself."""


@dataclass
class _Run:
    arm: str
    seed: int
    recipe: RecipeConfig

    @property
    def folder(self) -> Path:
        return run_folder(self.recipe)


def load_study(path: str | Path) -> tuple[StudyConfig, RecipeConfig]:
    """Read a study and its recipe.

    Raises:
        BurnishError: a missing file, an unknown key, a reference that is no arm.
    """
    path = Path(path)
    values = read_yaml(path)
    refuse_unknown(StudyConfig, values, str(path), "key")
    study = StudyConfig(**values)
    missing = [key for key in ("name", "recipe", "seeds", "arms") if not getattr(study, key)]
    if missing:
        raise BurnishError(f"{path}: '{missing[0]}' is empty", "name, recipe, seeds and arms")
    study.reference = study.reference or next(iter(study.arms))
    if study.reference not in study.arms:
        raise BurnishError(f"{path}: reference '{study.reference}' is no arm", f"one of {', '.join(study.arms)}")
    if "main" in study.evals:
        raise BurnishError(f"{path}: an evaluation is called 'main'", "another name; 'main' is the recipe's own")
    return study, load_recipe(path.parent / study.recipe)


def run_study(study: StudyConfig, base: RecipeConfig, *, command: str = "", result: Path | None = None) -> Path:
    """Train and measure every arm with every seed; finished runs are not repeated.

    Args:
        result: the committed outcome, e.g. results/align/core.json; it grows with every finished run.

    Returns:
        The study's folder.
    """
    from burnish.experiments.pipeline import Stages, make_data, run_facts
    from burnish.train.setup import make_objectives

    folder = study_folder(study)
    folder.mkdir(parents=True, exist_ok=True)
    facts = run_facts(study.name, command, {"train": ", ".join(map(str, study.seeds)), "demos": base.demos.seed})
    clocks = {"data": Stages(folder / "data.json", facts)}
    # A mistake in the last arm should not wait for hours to show.
    runs = {
        (seed, arm): _Run(arm, seed, arm_recipe(study, base, arm, seed)) for seed in study.seeds for arm in study.arms
    }
    for run in runs.values():
        make_objectives(run.recipe)
        _settings(study, run)
    with alone(folder):
        make_data(base, clocks["data"])
    if base.policy.path and _ask_questions(runs.values()):
        with alone(folder), clocks["data"].stage("questions to the base"):
            _ask(base.policy.path, base.eval, folder / "base")
    finished: list[_Run] = []
    for seed in study.seeds:
        clock = clocks[f"before {seed}"] = Stages(folder / f"before-{seed}.json", facts)
        for line in study.before:
            with nullcontext() if "{seed}" in line else alone(folder):  # another process may be at it
                _before(_fill(line, seed, folder), clock)
        for arm in study.arms:
            run = runs[seed, arm]
            run.folder.mkdir(exist_ok=True)
            clock = clocks[f"{arm} {seed}"] = Stages(run.folder / "run.json", facts)
            with clock.stage(f"{arm}, seed {seed}"):
                _train_and_measure(study, run)
            finished.append(run)
            if result:
                minutes = sum(clock.minutes for clock in clocks.values())
                _write(study, finished, facts, minutes, result)
    return folder


def arm_recipe(study: StudyConfig, base: RecipeConfig, arm: str, seed: int) -> RecipeConfig:
    """The ordinary recipe of one arm and seed.

    Raises:
        BurnishError: the arm changes a field that recipes lack, or gives it an impossible value.
    """
    folder = study_folder(study)
    values = recipe_to_dict(base)
    values["data"]["root"] = str(demos_root(base))
    merge(values, _fill(study.arms[arm], seed, folder))
    values |= {"name": f"{study.name}/{arm}-{seed}", "output": str(folder / f"{arm}-{seed}")}
    values["train"]["seed"] = values["eval"]["seed"] = seed
    return recipe_from_dict(values, f"arm '{arm}'")


def study_folder(study: StudyConfig) -> Path:
    """Where the runs of a study lie."""
    return Path("runs") / study.name


def _fill(value: Any, seed: int, folder: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{seed}", str(seed)).replace("{out}", str(folder))
    if isinstance(value, dict):
        return {key: _fill(item, seed, folder) for key, item in value.items()}
    return [_fill(item, seed, folder) for item in value] if isinstance(value, list) else value


def _before(line: str, stages: Any) -> None:
    """One preparing command; the stages file remembers those that came to their end."""
    from burnish.cli.main import main as burnish

    if line in stages.content.setdefault("done", []):
        return
    with stages.stage(f"burnish {line}"):
        if burnish(shlex.split(line)):
            raise BurnishError(f"the preparing command failed: burnish {line}")
    stages.content["done"].append(line)
    stages.write()


def _settings(study: StudyConfig, run: _Run) -> dict[str, EvalConfig]:
    changes = {name: {"instruction_swap": False, **change} for name, change in {"main": {}, **study.evals}.items()}
    try:
        return {name: replace(run.recipe.eval, **change) for name, change in changes.items()}
    except TypeError as error:
        raise BurnishError(f"an entry of evals has a field that eval lacks ({error})") from error


def _train_and_measure(study: StudyConfig, run: _Run) -> None:
    from burnish.experiments.pipeline import evaluate_as
    from burnish.train.loop import train

    every = _settings(study, run)
    policy = train(run.recipe).policy
    for name, settings in every.items():
        found = evaluate_as(
            settings, policy, settings.env or run.recipe.demos.env, run.folder / "eval" / name,
            instruction_swap=settings.instruction_swap,
        )  # fmt: skip
        print(f"{run.arm}, seed {run.seed}, {name}: {found.overall}", file=sys.stderr)
    _ask(policy, run.recipe.eval, run.folder)


def _ask(policy: str | Path, settings: EvalConfig, folder: Path) -> None:
    """Answers to the held-out questions, as retention.json; those that the same weights gave to the same stay."""
    from burnish.core.files import write_json
    from burnish.core.provenance import weights_hash
    from burnish.evaluate.retention import retention
    from burnish.policies import load_policy
    from burnish.policies.load import resolve

    questions, path = settings.questions, folder / "retention.json"
    if not questions.root:
        return
    asked = {"root": questions.root, "limit": questions.limit, "weights": weights_hash(resolve(policy))}
    if path.is_file() and read_object(path).get("asked") == asked:
        return
    asker = load_policy(policy, device=settings.device)
    found = retention(asker, questions.root, limit=questions.limit, progress=True)
    folder.mkdir(exist_ok=True)
    write_json(path, {"asked": asked, "tuned": found.to_dict()})


def _ask_questions(runs: Iterable[_Run]) -> bool:
    """Whether the arms answer the held-out questions: they may turn off what the base recipe asks."""
    return any(run.recipe.eval.questions.root for run in runs)


def _write(study: StudyConfig, runs: list[_Run], facts: dict[str, Any], minutes: float, path: Path) -> None:
    from burnish.experiments.results import write_result
    from burnish.experiments.variants import arm_rows, read_successes

    def of(arm: str) -> dict[int, _Run]:
        return {run.seed: run for run in runs if run.arm == arm}

    rows = []
    several = bool(study.evals or _ask_questions(runs))
    for name in ["main", *study.evals]:
        arms = {arm: read_successes({s: r.folder / "eval" / name for s, r in of(arm).items()}) for arm in study.arms}
        rows += arm_rows(arms, study.reference, **({"eval": name} if several else {}))
    metrics: dict[str, Any] = {"runs": {f"{run.arm}-{run.seed}": _figures(run) for run in runs}}
    if _ask_questions(runs):
        answers = {arm: {seed: _answers(run.folder) for seed, run in of(arm).items()} for arm in study.arms}
        rows += _question_rows(answers, study, metrics)
    write_result(
        path, recipe=f"recipes/{study.name}.yaml", command=" ".join(facts["commands"]), rows=rows,
        commit=facts["commit"], date=facts["date"], seeds=facts["seeds"], hardware=facts["hardware"],
        minutes=minutes, metrics=metrics,
    )  # fmt: skip


def _question_rows(answers: dict[str, dict[int, Any]], study: StudyConfig, metrics: dict[str, Any]) -> list[Any]:
    """Rows of the held-out questions; also against the base, where the arms start from one."""
    from burnish.experiments.variants import arm_rows

    rows = arm_rows(answers, study.reference, eval=QUESTIONS)
    folder = study_folder(study) / "base"
    if not (folder / "retention.json").is_file():
        return rows
    before = _answers(folder)
    metrics["base"] = {"answer_loss": _retention(folder)["loss"]}
    for row in rows:
        seeds = answers[row["label"]]
        pair = arm_rows({"base": dict.fromkeys(seeds, before), row["label"]: seeds}, "base")
        row["minus_base"] = pair[1]["minus_reference"]
    return arm_rows({"base": {0: before}}, "", eval=QUESTIONS) + rows


def _retention(folder: Path) -> dict[str, Any]:
    return read_object(folder / "retention.json")["tuned"]


def _answers(folder: Path) -> dict[int, float]:
    return {number: float(flag) for number, flag in enumerate(_retention(folder)["correct"])}


def _figures(run: _Run) -> dict[str, Any]:
    """What a run logged last, and how well it still answers."""
    content = read_object(run.folder / "train.json")
    figures = {"steps": content["steps"], **content["final"]}
    if (run.folder / "retention.json").is_file():
        figures["answer_loss"] = _retention(run.folder)["loss"]
    return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  burnish study recipes/align/core.yaml --result results/align/core.json"
    parser.add_argument("study", help="study file; fields of its recipe can follow as --section.field=value")
    parser.add_argument("--result", default="", help="also write the outcome to this file, e.g. results/x.json")
    parser.add_argument("--arms", default="", help="only these arms, separated by commas (the reference among them)")
    parser.add_argument("--seeds", default="", help="only these seeds, separated by commas")


def main(args: argparse.Namespace) -> int:
    study, base = load_study(args.study)
    if args.overrides:
        base = load_recipe(Path(args.study).parent / study.recipe, args.overrides)
    if args.arms:
        wanted = args.arms.split(",")
        unknown = [arm for arm in wanted if arm not in study.arms]
        if unknown or study.reference not in wanted:
            raise BurnishError(f"--arms={args.arms}", f"some of {', '.join(study.arms)}, with {study.reference}")
        study.arms = {arm: study.arms[arm] for arm in wanted}
    if args.seeds:
        if not all(seed.strip().isdigit() for seed in args.seeds.split(",")):
            raise BurnishError(f"--seeds={args.seeds}", "whole numbers, separated by commas")
        study.seeds = [int(seed) for seed in args.seeds.split(",")]
    only = [word for name in ("arms", "seeds") if getattr(args, name) for word in (f"--{name}", getattr(args, name))]
    command = shlex.join(["burnish", "study", args.study, *only, *args.overrides])
    folder = run_study(study, base, command=command, result=Path(args.result) if args.result else None)
    print(f"runs: {folder}")
    return 0
