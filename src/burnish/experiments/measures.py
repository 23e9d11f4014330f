"""What the runs of a study measured: evaluations, answers, files of measuring commands, logged numbers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.core.reading import read_object
from burnish.envs.base import FAILURES
from burnish.evaluate.records import SUMMARY, Record
from burnish.evaluate.results import read_results
from burnish.experiments.variants import ALIASES, ANSWER_LOSS, MAIN, QUESTIONS, START, measure_rows

Folders = Mapping[str, Mapping[int, Path]]
"""Variant to training seed to the folder of the run."""


def measure_file(run: Path, name: str) -> Path:
    """Where the measuring command `name` of a study writes."""
    return run / "measures" / f"{name}.json"


def read_successes(evaluation: Path) -> dict[Any, float]:
    """Success of every episode at what the policy was told, by task and initial state.

    Under an instruction swap that is the task with the newly named object.
    """

    def told(record: Record) -> float:
        return float(record.success if record.other_success is None else record.other_success)

    return {r.key: told(r) for r in read_results(evaluation)}


def read_measure(path: Path) -> tuple[dict[int, float], bool]:
    """The numbers that a measuring command wrote, by unit, and whether they are shares (true and false).

    The file holds {"values": one number, or a list of numbers, or of true and false}.
    """
    values = read_object(path).get("values")
    values = values if isinstance(values, list) else [values]
    shares = bool(values) and all(isinstance(one, bool) for one in values)
    if not shares and not (values and all(map(number, values))):
        raise BurnishError(f"{path} holds no measure", '{"values": [...]} with numbers, or with true and false')
    return dict(enumerate(map(float, values))), shares


def read_answers(run: Path) -> dict[str, Any]:
    """`retention.json` of a run: `correct` flags, `losses` of each question and their mean `loss`."""
    path = run / "retention.json"
    found = read_object(path).get("tuned")
    right = isinstance(found, dict) and isinstance(found.get("correct"), list) and number(found.get("loss"))
    losses = found.get("losses") if right else None
    right = isinstance(losses, list) and len(losses) == len(found["correct"]) and all(map(number, losses))
    if not right or not all(flag in (True, False) for flag in found["correct"]):
        raise BurnishError(f"{path} is damaged, or of an earlier version", "what `burnish run` wrote", f"rm '{path}'")
    return found


def asked_before(run: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """`retention.json` of a run, if it holds what the same weights answered to the same questions (`asked`)."""
    path = run / "retention.json"
    content = read_object(path) if path.is_file() else {}
    if content.get("asked") != asked or "losses" not in content.get("tuned", {}):
        return None
    read_answers(run)
    return content


def study_rows(runs: Folders, names: Iterable[str], evals: Iterable[str], measures: Iterable[str], start: Path | None,
               asked: bool) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of everything that a study measured.

    Args:
        names: measures that the study's endpoint and gates name; a logged number is shown only if it is among them.
        evals, measures: names of further evaluations, and of measuring commands.
        start: folder of what the base answered; None where it was not asked.
        asked: whether the variants answered the held-out questions.
    """
    evals, measures = [MAIN, *evals], list(measures)
    found: dict[str, tuple[dict[str, Any], bool]] = {}
    for name in evals:
        found[name] = _each(runs, lambda run, name=name: read_successes(run / "eval" / name)), True
    if asked:
        found[QUESTIONS] = _answers(runs, "correct", start), True
        found[ANSWER_LOSS] = _answers(runs, "losses", start), False
    for name in measures:
        read = _each(runs, lambda run, name=name: read_measure(measure_file(run, name)))
        kinds = [shares for seeds in read.values() for _, shares in seeds.values()]
        values = {variant: {seed: one for seed, (one, _) in seeds.items()} for variant, seeds in read.items()}
        found[name] = values, all(kinds)
    for name in dict.fromkeys(ALIASES.get(name, name) for name in names):
        if name not in found:
            found[name] = _each(runs, lambda run, name=name: {0: _logged(run, name)}), False
    several = len(found) > 1
    return [
        row
        for name, (values, shares) in found.items()
        for row in measure_rows(values, shares=shares, **({"eval": name} if several else {}))
    ]


def _each(runs: Folders, read: Any) -> dict[str, dict[int, Any]]:
    return {variant: {seed: read(run) for seed, run in seeds.items()} for variant, seeds in runs.items()}


def _answers(runs: Folders, what: str, start: Path | None) -> dict[str, Any]:
    def numbered(run: Path) -> dict[str, float]:
        """By what was asked too: answers to other questions make no pair."""
        asked = read_object(run / "retention.json").get("asked", {})
        which = f"{asked.get('root')} {asked.get('limit')}"
        return {f"{which} {i}": float(one) for i, one in enumerate(read_answers(run)[what])}

    return ({"base": {START: numbered(start)}} if start else {}) | _each(runs, numbered)


def _logged(run: Path, name: str) -> float:
    final = read_object(run / "train.json").get("final", {})
    value = final.get(name)
    if not number(value):
        logged = ", ".join(key for key, one in final.items() if number(one))
        raise BurnishError(f"{run} measured no '{name}'", f"an evaluation, a measure, or a logged number ({logged})")
    return float(value)


def run_figures(run: Path) -> dict[str, Any]:
    """What a run logged last, how its episodes failed, how well it still answers, and when and with which commit it
    was made."""
    trained, made = run / "train.json", read_object(run / "run.json")
    figures: dict[str, Any] = {}
    if trained.is_file():  # nothing is where the study has steps
        content = read_object(trained)
        figures = {"steps": content["steps"], **content["final"]}
    figures |= {name: made.get(name) for name in ("commit", "date")}
    summary = read_object(run / "eval" / MAIN / SUMMARY)
    if others := sorted({*summary.get("commits", [])} - {made.get("commit"), ""}):  # an evaluation that went on later
        figures["measured_with"] = others
    known, episodes = summary.get("failures", {}), summary["overall"]["n"]
    figures |= {f"{kind.replace(' ', '_')}_share": known.get(kind, 0) / episodes for kind in FAILURES if known}
    if (run / "retention.json").is_file():
        figures[ANSWER_LOSS] = read_answers(run)["loss"]
    kinds = ("motion", "reused", "latency_ms")
    return figures | {f"{kind}_{name}": value for kind in kinds for name, value in summary.get(kind, {}).items()}
