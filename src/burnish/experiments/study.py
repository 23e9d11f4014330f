"""A study: variants x seeds, each an ordinary run, measured on the same trials and put into one table.

Every stage continues where a killed study left it, and the result is written again after each run. Several processes
may share the work (seed 0 in one, seed 1 in another); a last call with all seeds finds it done and collects it.
"""

import logging
import shlex
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from burnish.core.cluster import choose_engine
from burnish.core.config import EvalConfig, RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.files import alone, make_folder, new_folder, write_json
from burnish.core.options import check, option, refuse_unknown
from burnish.core.outputs import share
from burnish.core.provenance import weights_hash
from burnish.core.reading import read_object
from burnish.core.recipe import (
    check_name,
    demos_root,
    find_recipe,
    load_recipe,
    merge,
    read_yaml,
    recipe_from_dict,
    recipe_to_dict,
    run_folder,
)
from burnish.core.renames import STUDY, rename
from burnish.core.workers import Engine, WorkerPool
from burnish.envs.base import expand
from burnish.experiments.measures import asked_before, measure_file, read_answers, run_figures, study_rows
from burnish.experiments.pipeline import Stages, evaluate_as, make_data, run_facts
from burnish.experiments.results import FROM_RUN, check_place, write_result
from burnish.experiments.steps import (
    Link,
    SetupRunner,
    chain,
    check_command,
    fill,
    read_steps,
    set_up,
    step_minutes,
    take,
)
from burnish.experiments.variants import ALIASES, ANSWER_LOSS, MAIN, MARGIN, read_gates

log = logging.getLogger("burnish")

MOST_RUNS = 1000


@dataclass
class StudyConfig:
    """A study file. `{seed}` and `{out}` in `setup`, `steps` and `variants` stand for the seed and the study's folder.

    A study with `steps` trains nothing but those: a variant is the policy at their end.

    A measure is `success` (of `eval`), the name of one of `evals` or of `measures`, `answers` (share of exact answers
    to `eval.questions`), `answer_loss` (nats per token), or a number that training logs.
    """

    name: str = option("", "result name; runs go to runs/<name>/<variant>-<seed>")
    recipe: str = option("", "what all variants share: a recipe file, beside the study file or shipped", path=True)
    seeds: list[int] = option([0, 1, 2], "training seeds (and seeds of the policy's noise in evaluation)")
    reference: str = option("", "the variant that the others are compared with; empty means the first")
    setup: list[str] = option([], "burnish commands to run once for each seed before its variants")
    steps: dict[str, dict[str, Any]] = option({}, "name to run, otherwise, eval: what makes a policy, one by one")
    variants: dict[str, dict[str, Any]] = option({}, "name to changes of the recipe; without: steps that it leaves out")
    evals: dict[str, dict[str, Any]] = option(
        {}, 'further evaluations: name to changes of `eval`; "main" is `eval` itself'
    )
    measures: dict[str, str] = option({}, "name to a command that measures {policy} or {run} and writes {file}")
    endpoint: str = option("success", "the measure that decides; the others only inform")
    lower: list[str] = option([ANSWER_LOSS], "measures that are good where they are small")
    margin: float | None = option(None, "differences of the endpoint up to this do not matter", above=0.0)
    stopping: int = option(0, "number of seeds, fixed before the first run; 0: as many as `seeds` lists", least=0)
    gates: list[dict[str, str]] = option([], "what must hold before a verdict counts: name, measure, check")

    def declared(self) -> dict[str, Any]:
        """What was said before the first run, as it stands in the result."""
        names = ("endpoint", "lower", "margin", "reference", "stopping", "gates")
        said = {name: getattr(self, name) for name in names}
        return said | ({"without": {name: one.get("without", []) for name, one in self.variants.items()},
                        "steps": list(self.steps)} if self.steps else {})  # fmt: skip


@dataclass
class _Run:
    variant: str
    seed: int
    recipe: RecipeConfig

    @property
    def folder(self) -> Path:
        return run_folder(self.recipe)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> tuple[StudyConfig, RecipeConfig]:
    """Read a study and its recipe.

    Args:
        path: study file, or the name of a shipped one, see `find_recipe`.
        overrides: changes of the recipe that all variants share, see `load_recipe`.

    Raises:
        BurnishError: a missing file, an unknown key, a value of the wrong type, a reference that is no variant.
    """
    path = find_recipe(path)
    values = rename(read_yaml(path), STUDY)
    refuse_unknown(StudyConfig, values, str(path), "key")
    study = StudyConfig(**values)
    missing = [key for key in ("name", "recipe", "seeds", "variants") if not getattr(study, key)]
    if missing:
        raise BurnishError(f"{path}: '{missing[0]}' is empty", "name, recipe, seeds and variants")
    _check(study, str(path))
    study.steps = read_steps(study.steps, study.variants, str(path))
    study.reference = study.reference or next(iter(study.variants))
    if study.reference not in study.variants:
        expected = f"one of {', '.join(study.variants)}"
        raise BurnishError(f"{path}: reference '{study.reference}' is no variant", expected)
    if "main" in study.evals:
        raise BurnishError(f"{path}: an evaluation is called 'main'", "another name; 'main' is the recipe's own")
    _check_declared(study, str(path))
    return study, load_recipe(find_recipe(study.recipe, beside=path), overrides)


def _check(study: StudyConfig, where: str) -> None:
    check(study, where)
    check_name(study.name, f"{where}: name")
    whole = all(type(seed) is int and abs(seed) < 2**62 for seed in study.seeds)
    if not whole or len({*study.seeds}) < len(study.seeds):
        raise BurnishError(f"{where}: seeds is {str(study.seeds)[:100]}", "whole numbers, each once")
    for what, lines in (("setup", study.setup), ("measures", study.measures.values())):
        for line in lines:
            check_command(line, f"{where}: {str(line)[:100]!r} in {what}")
    for what, entries in (("variants", study.variants), ("evals", study.evals), ("measures", study.measures)):
        for name, changes in entries.items():
            if not isinstance(name, str):
                raise BurnishError(f"{where}: the name {name!r} in {what} is no text", f"'{name}' in quotes")
            check_name(name, f"{where}: a name in {what}", parts=1)
            if what == "measures":
                continue
            if not isinstance(changes, dict) or not all(isinstance(key, str) for key in changes):
                raise BurnishError(f"{where}: '{name}' of {what} is {str(changes)[:100]}", "fields and their values")


def _check_declared(study: StudyConfig, where: str) -> None:
    """Endpoint, margin, gates and number of seeds: they are settled before the first run."""
    taken = {MAIN, *ALIASES, *ALIASES.values(), ANSWER_LOSS, *study.evals}
    for name in study.measures:
        if name in taken:
            raise BurnishError(f"{where}: a measure is called '{name}'", "a name that no other measure has")
    for name, line in study.measures.items():
        if not ("{run}" in line or "{policy}" in line) or "{file}" not in line:
            raise BurnishError(f"{where}: measure '{name}' is {line[:100]!r}", "a command with {run} and {file}")
    if not all(isinstance(name, str) for name in study.lower):
        raise BurnishError(f"{where}: lower is {str(study.lower)[:100]}", "names of measures")
    study.stopping = study.stopping or len(study.seeds)
    if study.stopping != len(study.seeds):
        found = f"{where}: stopping says {study.stopping} seeds, seeds lists {len(study.seeds)}"
        raise BurnishError(found, "as many; seeds added after looking need `burnish compare --sequential`")
    gates = read_gates(study.gates, list(study.variants), where)
    study.gates = [{**vars(gate), "measure": gate.measure or study.endpoint} for gate in gates]
    share = study.endpoint not in (ANSWER_LOSS, *study.measures) and study.endpoint in taken
    if study.margin is None and share:
        study.margin = MARGIN


def choose(study: StudyConfig, variants: str = "", seeds: str = "") -> None:
    """Keep only the variants (the reference among them) and seeds of comma-separated lists; "" keeps all."""
    if variants:
        wanted = variants.split(",")
        unknown = [name for name in wanted if name not in study.variants]
        if unknown or study.reference not in wanted:
            known = ", ".join(study.variants)
            raise BurnishError(f"the variants '{variants}'", f"some of {known}, with {study.reference}")
        study.variants = {name: study.variants[name] for name in wanted}
    if seeds:
        declared = {str(seed): seed for seed in study.seeds}
        found = [seed.strip() for seed in seeds.split(",")]
        if not declared.keys() >= {*found} or len({*found}) < len(found):
            raise BurnishError(f"the seeds '{seeds[:100]}'", f"some of {', '.join(declared)[:100]}, each once",
                               "other seeds in a study file of another name")  # fmt: skip
        study.seeds = [declared[seed] for seed in found]


def run_study(
    study: StudyConfig, base: RecipeConfig, *, command: str = "", result: Path | None = None,
    run_setup: SetupRunner | None = None, engine: str = "processes", workers: int = 0, num_gpus: float | None = None,
) -> Path:  # fmt: skip
    """Train and measure every variant with every seed; finished runs are not repeated.

    Args:
        study, base: from `load_study`.
        command: the command line that the result names.
        result: the committed outcome, e.g. results/align/core.json; it grows with every finished run.
        run_setup: runs the lines of `setup`; a study that has some needs it.
        engine: "processes", one run after the other in this one, or "ray", see `core.cluster.choose_engine`.
        workers: on Ray, runs at a time; 0 means as many as there is room for.
        num_gpus: on Ray, GPUs for each run; None means one where the cluster has any.

    Returns:
        The study's folder.

    Raises:
        BurnishError: a mistake in any variant (before anything is trained), a setup command that failed, a folder that
            holds something else, a run that another process is at.
    """
    import torch

    folder, place = study_folder(study), choose_engine(engine, num_gpus, trains=True)
    check_place(result, f"recipes/{study.name}.yaml")
    facts = run_facts(study.name, command, {"train": ", ".join(map(str, study.seeds)), "demos": base.demos.seed})
    runs = _all_runs(study, base)
    share(folder, "study", is_study_folder)

    def clock(name: str) -> Stages:
        """As its file says now: another process may have been at it."""
        return Stages(folder / f"{name}.json", facts)

    with alone(folder):
        make_data(base, clock("data"))
    for seed in study.seeds:
        for line in study.setup:
            with nullcontext() if "{seed}" in line else alone(folder):
                set_up(fill(line, seed, shlex.quote(str(folder))), clock(f"setup-{seed}"), run_setup)
    new = not any(run.recipe.policy.path for run in runs.values())
    if (base.policy.path or new) and _ask_questions(runs.values()):
        with alone(folder), clock("data").stage("questions to the base"):
            _ask(base.policy.path or _start(base, folder / "start"), base.eval, folder / "base")
    links = list(dict.fromkeys(link for seed, variant in runs for link in study_chain(study, base, variant, seed)[0]))
    take(links, facts, run_setup)
    finished: list[_Run] = []
    names = ["data", *(f"setup-{seed}" for seed in study.seeds)]
    minutes = sum(clock(name).minutes for name in names) + step_minutes(links)
    arguments = asdict(study), recipe_to_dict(base), facts, torch.get_num_threads()
    parallel = engine != "processes"
    for key, taken in _on_workers(arguments, runs, place, workers) if parallel else finish_runs(runs, *arguments):
        finished.append(runs[key])
        minutes += taken + _measure(study, runs[key], facts, run_setup)
        if result:
            _write(study, base, finished, facts, minutes, result)
    return folder


Runs = dict[tuple[int, str], _Run]


def _all_runs(study: StudyConfig, base: RecipeConfig) -> Runs:
    """By seed and variant. A mistake in the last one should not wait for hours to show."""
    from burnish.train.setup import make_objectives

    if len(study.seeds) * len(study.variants) > MOST_RUNS:
        raise BurnishError(f"{len(study.seeds)} seeds of {len(study.variants)} variants", f"at most {MOST_RUNS} runs")
    runs = {
        (seed, variant): _Run(variant, seed, variant_recipe(study, base, variant, seed))
        for seed in study.seeds
        for variant in study.variants
    }
    for run in runs.values():
        make_objectives(run.recipe)
        _settings(study, run)
    return runs


def _on_workers(arguments: tuple, runs: Runs, place: Engine, workers: int) -> Iterator[tuple[tuple[int, str], float]]:
    """As `finish_runs`, in the same order, on the workers of an engine; a run whose worker dies goes on in another."""
    names: dict[str, Any] = {"name": "worker", "fix": "the same command again, which continues"}
    todo, done = list(runs), {}
    with place:
        count = min(place.count(workers), len(runs))
        with WorkerPool(finish_runs, *arguments, count=count, engine=place, **names) as pool:
            for key, (_, taken) in pool.run(runs, label=lambda key: f"{key[1]}, seed {key[0]}"):
                log.info("%s, seed %d: done", key[1], key[0])
                done[key] = taken
                while todo and todo[0] in done:
                    yield todo[0], done[todo.pop(0)]


def finish_runs(
    tasks: Iterable[tuple[int, str]], study: dict[str, Any], base: dict[str, Any], facts: dict[str, Any], threads: int
) -> Generator[tuple[tuple[int, str], float], None, None]:
    """The worker of a study: trains and measures each (seed, variant); yields them with the minutes that they took."""
    import torch

    torch.set_num_threads(threads)  # sums depend on it
    settings, recipe = StudyConfig(**study), recipe_from_dict(base, "the recipe of the study")
    for seed, variant in tasks:
        run = _Run(variant, seed, variant_recipe(settings, recipe, variant, seed))
        yield (seed, variant), _finish(settings, run, facts)


def _finish(study: StudyConfig, run: _Run, facts: dict[str, Any]) -> float:
    from burnish.train.run import claim_run

    with claim_run(run.folder):
        clock = Stages(run.folder / "run.json", facts)
        with clock.stage(f"{run.variant}, seed {run.seed}"):
            _train_and_measure(study, run)
    return clock.minutes


def variant_recipe(study: StudyConfig, base: RecipeConfig, variant: str, seed: int) -> RecipeConfig:
    """The ordinary recipe of one variant and seed."""
    folder = study_folder(study)
    values = recipe_to_dict(base)
    values["data"]["root"] = str(demos_root(base))
    values["policy"]["path"] = study_chain(study, base, variant, seed)[1]
    changes = dict(study.variants[variant])
    without = changes.pop("without", [])
    for name, step in study.steps.items():
        merge(values["eval"], {} if name in without else step["eval"])
    merge(values, fill(changes, seed, folder))
    values |= {"name": f"{study.name}/{variant}-{seed}", "output": str(folder / f"{variant}-{seed}")}
    recipe = recipe_from_dict(values, f"variant '{variant}'")
    recipe.train.seed = recipe.eval.seed = seed
    if recipe.train.keep_checkpoints is None:
        recipe.train.keep_checkpoints = 0
    return recipe


def study_chain(study: StudyConfig, base: RecipeConfig, variant: str, seed: int) -> tuple[list[Link], str]:
    """`chain` of a variant and seed: no steps, and the recipe's own policy, in a study without any."""
    return chain(study.steps, study.variants[variant].get("without", []), base.policy.path, seed, study_folder(study))


def _policy(study: StudyConfig, run: _Run) -> Path:
    return Path(run.recipe.policy.path) if study.steps else run.folder / "policy"


def study_folder(study: StudyConfig) -> Path:
    """Where the runs of a study lie."""
    return Path("runs") / study.name


def is_study_folder(folder: Path) -> bool:
    """Whether a folder without a marker holds a study: stages of its data or setup, or runs."""
    from burnish.train.run import is_run

    stages = [file for pattern in ("data.json", "setup-*.json") for file in folder.glob(pattern)]
    with suppress(BurnishError):
        if any("stages" in read_object(file) for file in stages):
            return True
    return any(is_run(one) for one in folder.iterdir() if one.is_dir())


def _measure(study: StudyConfig, run: _Run, facts: dict[str, Any], run_setup: SetupRunner | None) -> float:
    """The measuring commands of a finished run, each once; minutes that they took now."""
    clock = Stages(run.folder / "run.json", facts)
    before = clock.minutes
    for name, line in study.measures.items():
        file = measure_file(run.folder, name)
        make_folder(file.parent)
        places = {"run": run.folder, "file": file, "policy": _policy(study, run)}
        quoted = {key: shlex.quote(str(place)) for key, place in places.items()}
        set_up(fill(line, run.seed, shlex.quote(str(study_folder(study))), **quoted), clock, run_setup)
    return clock.minutes - before


def _settings(study: StudyConfig, run: _Run) -> dict[str, EvalConfig]:
    settings = {}
    for name, change in {"main": {}, **study.evals}.items():
        values = recipe_to_dict(run.recipe)
        merge(values["eval"], {"instruction_swap": False, **change})
        settings[name] = recipe_from_dict(values, f"evals: {name}").eval
        expand(settings[name].env or run.recipe.demos.env)
    return settings


def _train_and_measure(study: StudyConfig, run: _Run) -> None:
    from burnish.train.loop import train

    every = _settings(study, run)
    policy = _policy(study, run) if study.steps else train(run.recipe).policy
    for name, settings in every.items():
        found = evaluate_as(
            settings, policy, settings.env or run.recipe.demos.env, run.folder / "eval" / name,
            instruction_swap=settings.instruction_swap,
        )  # fmt: skip
        log.info("%s, seed %d, %s: %s", run.variant, run.seed, name, found.overall)
    _ask(policy, run.recipe.eval, run.folder)


def _start(recipe: RecipeConfig, folder: Path) -> Path:
    """What a policy that is made new starts from, as a folder: its language model is the one that training finds."""
    from burnish.train.setup import policy_and_data

    if not folder.is_dir():
        with new_folder(folder) as inside:
            policy_and_data(recipe, False)[0].save(inside, home=folder)
    return folder


def _ask(policy: str | Path, settings: EvalConfig, folder: Path) -> None:
    """Answers to the held-out questions, as retention.json; those that the same weights gave to the same stay."""
    from burnish.evaluate.retention import retention
    from burnish.policies import load_policy
    from burnish.policies.load import resolve

    questions = settings.questions
    if not questions.root:
        return
    asked = {"root": questions.root, "limit": questions.limit, "weights": weights_hash(resolve(policy))}
    if asked_before(folder, asked):
        return
    asker = load_policy(policy, device=settings.device)
    found = retention(asker, questions.root, limit=questions.limit, progress=True)
    make_folder(folder)
    write_json(folder / "retention.json", {"asked": asked, "tuned": found.to_dict()})


def _ask_questions(runs: Iterable[_Run]) -> bool:
    """Whether the variants answer the held-out questions: they may turn off what the base recipe asks."""
    return any(run.recipe.eval.questions.root for run in runs)


def _write(
    study: StudyConfig, base: RecipeConfig, runs: list[_Run], facts: dict[str, Any], minutes: float, path: Path
) -> None:
    folders = {v: {run.seed: run.folder for run in runs if run.variant == v} for v in study.variants}
    asked, start = _ask_questions(runs), study_folder(study) / "base"
    start = start if (start / "retention.json").is_file() else None
    names = [study.endpoint, *(gate["measure"] for gate in study.gates)]
    rows = study_rows(folders, names, study.evals, study.measures, start, asked)
    metrics: dict[str, Any] = {"runs": {f"{run.variant}-{run.seed}": run_figures(run.folder) for run in runs}}
    for run in runs if study.steps else []:
        links = study_chain(study, base, run.variant, run.seed)[0]
        metrics["runs"][f"{run.variant}-{run.seed}"]["minutes"] = step_minutes(links)
    if asked and start:
        metrics["base"] = {ANSWER_LOSS: read_answers(start)["loss"]}
    write_result(
        path, recipe=f"recipes/{study.name}.yaml", command=" ".join(facts["commands"]), rows=rows, minutes=minutes,
        metrics=metrics, declared=study.declared(), **{name: facts[name] for name in FROM_RUN},
    )  # fmt: skip
