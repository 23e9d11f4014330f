"""Reads what a run left behind. Every part is optional: a page is made of whatever is there."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.core.reading import inside, read_object, read_text, regular_file
from burnish.evaluate.compare import OFFLINE
from burnish.evaluate.records import rows_of
from burnish.evaluate.stats import Rate, wilson

# variant folder under eval/: (how the page calls it, colour)
VARIANTS = {
    "tuned": ("Fine-tuned", "tuned"),
    "base": ("Base, not tuned", "base"),
    "swap": ("Told another object", "swap"),
    "expert_random_object": ("Random-object expert", "expert"),
    "offline": ("Fine-tuned, held-out episodes", "tuned"),
    "offline_base": ("Base, held-out episodes", "base"),
}
FILM_KINDS = {"video": (".mp4",), "film_strip": (".png", ".jpg", ".jpeg")}
_KINDS = {dict: "object", list: "list"}
log = logging.getLogger("burnish")


@dataclass(frozen=True)
class Film:
    """One filmed episode; a file is None where it is missing or not the run's own."""

    task: str
    initial_state: str
    instruction: str
    success: bool
    video: Path | None
    strip: Path | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluated variant of a run.

    Args:
        overall: all episodes together.
        tasks: per task.
        latency_ms: percentile name to milliseconds for one call of the policy.
        other: for the instruction swap, success on the object that the sentence named instead.
        films: what was filmed.
        failures: how many episodes failed in which way.
    """

    variant: str
    overall: Rate
    tasks: dict[str, Rate]
    latency_ms: dict[str, float]
    other: Rate | None
    films: list[Film]
    failures: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return VARIANTS.get(self.variant, (self.variant.replace("_", " "), "base"))[0]

    @property
    def role(self) -> str:
        return VARIANTS.get(self.variant, ("", "base"))[1]


@dataclass(frozen=True)
class RunFolder:
    """Everything a report shows. `info` is run.json, `metrics` the rows of metrics.jsonl."""

    path: Path
    info: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    offline: dict[str, dict[str, Any]] = field(default_factory=dict)
    retention: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.path.resolve().name)


def load_run(path: Path) -> RunFolder:
    if not os.path.isdir(path):
        raise BurnishError(f"no run folder at {path}", "a folder that `burnish run` or `burnish train` wrote")
    recipe = path / "recipe.yaml"
    run = RunFolder(
        path=path, info=_info(path), metrics=read_jsonl(path / "metrics.jsonl", path),
        recipe=read_text(recipe, path) if os.path.lexists(recipe) else "",
        retention=_retention(path), **_evaluations(path),
    )  # fmt: skip
    if not (run.info or run.metrics or run.evaluations or run.offline or run.retention):
        raise BurnishError(f"nothing to report in {path}", "at least one of run.json, metrics.jsonl, retention.json, "
                           "eval/<variant>/summary.json")  # fmt: skip
    return run


def read_jsonl(path: Path, root: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file in `root`, [] when it does not exist; a last line cut short by a kill is left out."""
    return [row for _, row in rows_of(read_text(path, root), path)] if os.path.lexists(path) else []


def _read_object(path: Path, root: Path) -> dict[str, Any]:
    return read_object(path, root) if os.path.lexists(path) else {}


def _part[T](row: dict[str, Any], key: str, kind: type[T], where: str) -> T:
    """`row[key]`, an empty `kind` where it is missing or null; raises BurnishError where it is something else."""
    value = kind() if row.get(key) is None else row[key]
    if not isinstance(value, kind):
        raise BurnishError(f"{where}: {key} is no {_KINDS[kind]}", "what burnish writes")
    return value


def _number(row: dict[str, Any], key: str, where: str) -> float:
    if not number(row.get(key)):
        raise BurnishError(f"{where}: {key} is {str(row.get(key))[:60]!r}", "a number")
    return float(row[key])


def _parts(row: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = _part(row, key, list, where)
    if not all(isinstance(one, dict) for one in found):
        raise BurnishError(f"{where}: {key} holds something else than objects", "what burnish writes")
    return found


def _info(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    info = _read_object(file, path)
    for key, kind in (("versions", dict), ("commands", list)):
        _part(info, key, kind, str(file))
    for stage in _parts(info, "stages", str(file)):
        stage["minutes"] = _number({"minutes": stage.get("minutes") or 0}, "minutes", f"{file}: a stage")
    return info


def _retention(path: Path) -> dict[str, Any]:
    file = path / "retention.json"
    content = _read_object(file, path)
    for name in ("base", "tuned"):
        part = _part(content, name, dict, str(file))
        rates = _part(part, "by_kind", dict, f"{file}: {name}") | ({"accuracy": part.get("accuracy")} if part else {})
        for kind, row in rates.items():
            read_rate(row, f"{file}: {name} {kind}")
    paired = content.get("comparison") or content.get("mcnemar_p")
    for key in ("low", "high", "forgotten", "learned", "difference", "p") if isinstance(paired, dict) else ():
        _number(paired, key, f"{file}: comparison")
    return content


def _evaluations(path: Path) -> dict[str, dict[str, Any]]:
    """`evaluations` in closed loop and `offline` ones, the fine-tuned policy's first."""
    summaries = {file: read_object(file, path) for file in sorted(path.glob("eval/*/summary.json"))}
    found = {f.parent.name: read_evaluation(f, path, one) for f, one in summaries.items() if OFFLINE not in one}
    known = [name for name in VARIANTS if name in found]
    offline = {f.parent.name: _offline(f, one) for f, one in summaries.items() if OFFLINE in one}
    return {"evaluations": {name: found[name] for name in dict.fromkeys([*known, *found])}, "offline": offline}


def read_evaluation(file: Path, root: Path, summary: dict[str, Any]) -> Evaluation:
    """An evaluation in the folder `root`, of what its summary.json says, checked."""
    where, latency = str(file), _part(summary, "latency_ms", dict, str(file))
    failures = _part(summary, "failures", dict, where)
    return Evaluation(
        variant=file.parent.name,
        overall=read_rate(summary.get("overall"), f"{file}: overall"),
        tasks={
            task: read_rate(row, f"{file}: {task}") for task, row in _part(summary, "per_task", dict, where).items()
        },
        latency_ms={name: _number(latency, name, f"{file}: latency_ms") for name in latency},
        other=read_rate(summary["other"], f"{file}: other") if summary.get("other") else None,
        films=_films(_parts(summary, "videos", where), file.parent, root),
        failures={kind: _number(failures, kind, f"{file}: failures") for kind in failures},
    )


def _offline(file: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """What `OfflineEvaluation.to_dict` wrote, checked, with "latency_ms" and "plots" as (instruction, picture)."""
    where, found = str(file), _part(summary, OFFLINE, dict, str(file))
    tables = [_part(found, key, dict, where) for key in ("figures", "by_dimension")]
    intervals = [*tables[0].values(), *tables[1].values(), *_part(found, "by_horizon", list, where)]
    whole = all(one is None or isinstance(one, list) and len(one) == 3 and number(one[0])
                and all(end is None or number(end) for end in one) for one in intervals)  # fmt: skip
    if not whole or not tables[0].get("error"):
        raise BurnishError(
            f"{where}: {OFFLINE} is damaged", "means and the ends of their intervals, an error among them"
        )
    for key in ("episodes", "calls"):
        _number(found, key, where)
    latency = _part(summary, "latency_ms", dict, where)
    plots = [(str(one.get("instruction")), _file(file.parent, one.get("plot"), (".png",)))
             for one in _parts(summary, "plots", where)]  # fmt: skip
    return found | {"latency_ms": {k: _number(latency, k, f"{where}: latency_ms") for k in latency}, "plots": plots}


def _films(videos: list[dict[str, Any]], folder: Path, root: Path) -> list[Film]:
    """What was filmed, with the sentence that the policy was given."""
    rows = read_jsonl(folder / "episodes.jsonl", root) if videos else []
    said = {(str(row.get("task")), str(row.get("initial_state"))): row.get("instruction") for row in rows}
    films = []
    for one in videos:
        key = (str(one.get("task")), str(one.get("initial_state")))
        files = (_file(folder, one.get(name), kinds) for name, kinds in FILM_KINDS.items())
        films.append(Film(*key, str(said.get(key) or key[0]), bool(one.get("success")), *files))
    return films


def _file(folder: Path, name: Any, kinds: tuple[str, ...]) -> Path | None:
    """A file of the evaluation's folder; None where there is none, or none that belongs on a page, which is told."""
    try:
        path = inside(folder, str(name)) if name else folder
        known = path.suffix.lower() in kinds and os.path.lexists(path)
        return Path(os.path.abspath(regular_file(path, folder))) if known else None
    except BurnishError as error:
        log.warning("%s; it is left out of the page", error)
        return None


def read_rate(row: Any, where: str) -> Rate:
    """A rate as `Rate.to_dict` wrote it; the interval is computed again from the counts."""
    counts = [row.get(key) for key in ("successes", "n")] if isinstance(row, dict) else [None]
    if not all(type(count) is int and number(count) for count in counts):
        raise BurnishError(f"{where} has no whole numbers n and successes", "what `burnish eval` writes")
    try:
        return wilson(*counts)
    except BurnishError as error:
        raise BurnishError(f"{where}: {error}") from None
