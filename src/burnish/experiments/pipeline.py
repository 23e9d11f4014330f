"""One recipe from demonstrations to report: data, training, measurement, page.

Every stage continues where a killed run left it, so the same command can always be given again.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.core.config import EvalConfig, RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.options import number
from burnish.core.provenance import commit, machine, weights_hash
from burnish.core.reading import read_object
from burnish.core.recipe import demos_root, run_folder
from burnish.envs.base import expand, offers_swap
from burnish.experiments.measures import asked_before
from burnish.experiments.results import FROM_RUN, check_place, flags, outcome_row, write_result

if TYPE_CHECKING:
    from burnish.evaluate.evaluation import Evaluation
    from burnish.evaluate.offline import OfflineEvaluation
    from burnish.evaluate.retention import Retention
    from burnish.policies.base import Policy

log = logging.getLogger("burnish")

RESULT_LABELS = {
    "tuned": "fine-tuned",
    "base": "base, not tuned",
    "swap": "fine-tuned, told another object",
    "expert_random_object": "expert that picks its object at random",
    "offline": "fine-tuned, on held-out episodes",
    "offline_base": "base, on held-out episodes",
}


@dataclass
class Outcome:
    """What a run found; `evaluations` and `offline` by variant, `retention` by "base" and "tuned"."""

    folder: Path
    report: Path | None = None
    evaluations: "dict[str, Evaluation]" = field(default_factory=dict)
    offline: "dict[str, OfflineEvaluation]" = field(default_factory=dict)
    retention: "dict[str, Retention]" = field(default_factory=dict)


class Stages:
    """Names, minutes and commands of the stages, kept in `run.json` so that a continued run adds up its time.

    Commit and date are those of the first call: a later one, which finds everything done, made nothing.
    """

    def __init__(self, file: Path, facts: dict[str, Any]):
        self.file = file
        before = _read_stages(file) if file.exists() else {"stages": []}
        self.content = before | facts | {name: before[name] for name in ("commit", "date") if before.get(name)}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        log.info("== %s", name)
        start = time.monotonic()
        try:
            yield
        finally:
            minutes = (time.monotonic() - start) / 60
            earlier = next((s for s in self.content["stages"] if s["name"] == name), None)
            if earlier:
                earlier["minutes"] += minutes
            else:
                self.content["stages"].append({"name": name, "minutes": minutes})
            self.write()

    def at_least(self, name: str, minutes: float) -> None:
        """Correct a stage that was done elsewhere upwards."""
        stage = next(s for s in self.content["stages"] if s["name"] == name)
        stage["minutes"] = max(stage["minutes"], minutes)
        self.write()

    @property
    def minutes(self) -> float:
        return sum(s["minutes"] for s in self.content["stages"])

    def write(self) -> None:
        write_json(self.file, self.content)


def _read_stages(file: Path) -> dict[str, Any]:
    fix = f"rm '{file}'"  # nothing but the minutes of its stages is lost
    try:
        content = read_object(file)
    except BurnishError as error:
        raise BurnishError(str(error), fix=fix) from None
    stages = content.get("stages")
    entries = stages if isinstance(stages, list) else [None]
    if not all(isinstance(s, dict) and isinstance(s.get("name"), str) and number(s.get("minutes")) for s in entries):
        raise BurnishError(f"{file}: 'stages' is damaged", 'a list of {"name": ..., "minutes": ...}', fix)
    if not isinstance(content.get("done", []), list):
        raise BurnishError(f"{file}: 'done' is damaged", "a list of commands", fix)
    return content


def run_recipe(recipe: RecipeConfig, *, command: str = "", result: Path | None = None, fresh: bool = False) -> Outcome:
    """Do everything that `recipe` asks for; finished stages of an earlier call are not repeated.

    Args:
        fresh: delete an earlier training of this run and what was measured of it; the data stays.
        command: the command line to show in the report.
        result: where to write the committed outcome, e.g. results/tabletop/quickstart.json; None writes none.

    Raises:
        BurnishError: a mistake in the recipe, a folder or result file that holds something else, another process that
            writes there, and all that the stages refuse.
    """
    from burnish.train.run import claim_run
    from burnish.train.setup import make_objectives

    if not recipe.demos.env and not recipe.data.root:
        raise BurnishError(f"recipe '{recipe.name}' names neither demos.env nor data.root", "one of them")
    make_objectives(recipe)  # a mistake in their options shows before anything is made
    for env in filter(None, (recipe.demos.env, recipe.eval.env)):
        expand(env)
    check_place(result, f"recipes/{recipe.name}.yaml")
    with claim_run(run_folder(recipe)) as folder:
        return _run(recipe, folder, command, result, fresh)


def _run(recipe: RecipeConfig, folder: Path, command: str, result: Path | None, fresh: bool) -> Outcome:
    from burnish.report.page import write_report
    from burnish.train.run import check_resumable, note_recipe

    if not fresh:
        check_resumable(recipe)
    seeds = {"demos": recipe.demos.seed, "train": recipe.train.seed, "eval": recipe.eval.seed}
    facts = run_facts(recipe.name, command, seeds)
    stages = Stages(folder / "run.json", facts)
    stages.content |= facts if fresh else {}
    note_recipe(recipe, folder / "recipe.yaml")
    outcome = Outcome(folder)
    make_data(recipe, stages)
    _train(recipe, stages, fresh)
    _measure(recipe, stages, outcome)
    with stages.stage("report"):
        outcome.report = write_report(folder)
    if result:
        _write_result(recipe, stages, outcome, result)
    return outcome


def run_facts(name: str, command: str, seeds: dict[str, Any]) -> dict[str, Any]:
    """What run.json says of a run besides its stages: who, when, where, with which versions and seeds."""
    versions = machine()
    return {
        "name": name, "commands": [command] if command else [], "commit": commit(),
        "hardware": versions.pop("device"), "versions": versions, "seeds": seeds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def make_data(recipe: RecipeConfig, stages: Stages) -> None:
    """Demonstrations and held-out questions that the recipe asks for and that are not there yet."""
    demos = recipe.demos
    # A data set that the recipe names is left alone where it exists; where it does not, the recipe says how to make it.
    if demos.env and not (recipe.data.root and Path(recipe.data.root).exists()):
        from burnish.data.demos import make_demos

        with stages.stage("demonstrations"):
            summary = make_demos(
                demos.env, demos.episodes, demos_root(recipe), image_size=demos.image_size,
                cameras=tuple(demos.cameras), seed=demos.seed, workers=demos.workers,
            )  # fmt: skip
            log.info("%s", summary)
    questions = recipe.eval.questions
    if questions.root and not Path(questions.root).exists():
        from burnish.data.questions import make_questions

        with stages.stage("held-out questions"):
            make_questions(
                questions.env or demos.env, questions.scenes, questions.root, image_size=demos.image_size,
                per_scene=questions.per_scene, kinds=questions.kinds, seed=questions.seed,
            )  # fmt: skip


def _train(recipe: RecipeConfig, stages: Stages, fresh: bool) -> None:
    from burnish.train.loop import train

    with stages.stage("training"):
        done = train(recipe, resume=not fresh)
    # Training may have been done by `burnish train` before; its own clock knows.
    stages.at_least("training", done.final.get("minutes", 0.0))


def evaluate_as(settings: EvalConfig, policy: str | Path, env: str, output: Path, **changes: Any) -> "Evaluation":
    """`evaluate` with the settings of a recipe; `changes` are further arguments of it."""
    from burnish.evaluate.rollout import evaluate

    return evaluate(
        policy, env, output=output, batch_size=settings.batch_size, cameras=settings.cameras or None,
        device=settings.device, delay=settings.delay, sampler=settings.sampler, tier=settings.tier,
        cache=settings.cache, watchdog=settings.watchdog,
        **_trials(settings), **changes,
    )  # fmt: skip


def _trials(settings: EvalConfig) -> dict[str, int]:
    names = ("episodes", "first_state", "seed", "workers", "max_steps")
    return {name: getattr(settings, name) for name in names}


def _measure(recipe: RecipeConfig, stages: Stages, outcome: Outcome) -> None:
    from burnish.evaluate.rollout import evaluate_expert

    settings, tuned = recipe.eval, outcome.folder / "policy"
    env, base = settings.env or recipe.demos.env, None
    if settings.base and recipe.policy.path and (env or recipe.data.held_out):
        base = _base(recipe, tuned)
    if env:
        variants: dict[str, Callable[[Path], Evaluation]] = {"tuned": lambda to: evaluate_as(settings, tuned, env, to)}
        if base is not None:
            variants["base"] = lambda to: evaluate_as(settings, base, env, to)
        if settings.instruction_swap and not offers_swap(env):
            log.warning("no instruction swap is measured: %s offers none", env)
        elif settings.instruction_swap:
            variants["swap"] = lambda to: evaluate_as(settings, tuned, env, to, instruction_swap=True)
        if settings.random_object_expert:
            options = {"which": "random_object", **_trials(settings)}
            variants["expert_random_object"] = lambda to: evaluate_expert(env, output=to, **options)
        for variant, measure in variants.items():
            with stages.stage(f"evaluation: {RESULT_LABELS[variant]}"):
                outcome.evaluations[variant] = measure(outcome.folder / "eval" / variant)
                log.info("%s", outcome.evaluations[variant])
    if recipe.data.held_out:
        _measure_offline(recipe, stages, outcome, {"offline": tuned} | ({} if base is None else {"offline_base": base}))
    if settings.questions.root:
        with stages.stage("question retention"):
            _measure_retention(recipe, outcome)


def _measure_offline(
    recipe: RecipeConfig, stages: Stages, outcome: Outcome, policies: "dict[str, str | Path | Policy]"
) -> None:
    from burnish.evaluate.offline import evaluate_offline
    from burnish.evaluate.offline_scores import over_episodes, shown

    names = ("episodes", "every", "seed", "batch_size", "device", "sampler", "tier")
    given = {name: getattr(recipe.eval, name) for name in names}
    data = replace(recipe.data, root=str(demos_root(recipe)))
    for variant, policy in policies.items():
        with stages.stage(f"evaluation: {RESULT_LABELS[variant]}"):
            found = evaluate_offline(policy, data, output=outcome.folder / "eval" / variant, **given)
            outcome.offline[variant] = found
            log.info("action error %s", shown(over_episodes(record.figures["error"] for record in found.records)))


def _base(recipe: RecipeConfig, tuned: Path) -> "str | Policy | None":
    """What training started from, with the recipe's overrides; None where it is made for another robot or cameras."""
    from burnish.policies import load_policy

    if recipe.eval.cache.measured:
        log.warning("the base is not measured: %s is of the fine-tuned policy", recipe.eval.cache.measured)
        return None
    base, after = _load_base(recipe, overrides=recipe.policy.overrides), load_policy(tuned)
    if base is None:
        return None
    for what, one, other in (("actions", base.action_dim, after.action_dim), ("cameras", base.cameras, after.cameras)):
        if one != other:
            log.warning("the base is not measured: it has %s %s, the fine-tuned policy %s", what, one, other)
            return None
    return base if recipe.policy.overrides else recipe.policy.path


def _load_base(recipe: RecipeConfig, **given: Any) -> "Policy | None":
    """What training started from; None where it can be trained but not run: a base of the hub may hold no statistics
    of any robot. What was trained is measured all the same."""
    from burnish.policies import load_policy

    try:
        return load_policy(recipe.policy.path, device=recipe.eval.device, **given)
    except BurnishError as error:
        log.warning("the base is not measured: %s", error)
        return None


def _measure_retention(recipe: RecipeConfig, outcome: Outcome) -> None:
    """Answers of the fine-tuned policy and of the base; those that the same weights gave to the same questions stay."""
    from burnish.evaluate.retention import Retention, compare_retention, retention
    from burnish.policies import load_policy
    from burnish.policies.load import resolve

    questions, tuned = recipe.eval.questions, outcome.folder / "policy"
    asked = {"root": questions.root, "limit": questions.limit, "weights": weights_hash(tuned)}
    if recipe.policy.path:
        with suppress(BurnishError):  # the base is no longer there: `_load_base` says so
            asked["base"] = weights_hash(resolve(recipe.policy.path))
    if before := asked_before(outcome.folder, asked):
        outcome.retention |= {name: Retention.from_dict(before[name]) for name in ("tuned", "base") if name in before}
        return
    policy = load_policy(tuned, device=recipe.eval.device)
    outcome.retention["tuned"] = retention(policy, questions.root, limit=questions.limit, progress=True)
    del policy  # one at a time
    if recipe.policy.path and (base := _load_base(recipe)) is not None:
        outcome.retention["base"] = retention(base, questions.root, limit=questions.limit, progress=True)
    content: dict[str, Any] = {"asked": asked} | {n: found.to_dict() for n, found in outcome.retention.items()}
    if len(outcome.retention) == 2:
        content["comparison"] = compare_retention(outcome.retention["base"], outcome.retention["tuned"])
    write_json(outcome.folder / "retention.json", content)


def _write_result(recipe: RecipeConfig, stages: Stages, outcome: Outcome, path: Path) -> None:
    rows, metrics = [], {}
    seed = str(recipe.train.seed)
    for variant, found in outcome.evaluations.items():
        episodes = sorted(found.records, key=lambda r: str(r.key))
        rows.append(outcome_row(RESULT_LABELS[variant], {seed: [r.success for r in episodes]}))
        if found.other:
            told = [bool(r.other_success) for r in episodes if r.other_success is not None]
            rows.append(outcome_row("… solved the object it was told", {seed: told}))
    for name, found in outcome.retention.items():
        kept = {k: v for k, v in found.to_dict().items() if k not in ("correct", "losses")}
        metrics[f"questions_{name}"] = kept | {"outcomes": flags(found.correct)}
    metrics |= {variant: found.to_dict()["offline"] for variant, found in outcome.offline.items()}
    facts = stages.content
    write_result(
        path, recipe=f"recipes/{recipe.name}.yaml", command=" ".join(facts["commands"]), rows=rows,
        minutes=stages.minutes, metrics=metrics, **{name: facts[name] for name in FROM_RUN},
    )  # fmt: skip
