"""Reads what a run left behind. Every part is optional: a page is made of whatever is there."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.reading import read_object
from burnish.evaluate.stats import Rate, wilson

# variant folder under eval/: (how the page calls it, colour)
VARIANTS = {
    "tuned": ("Fine-tuned", "tuned"),
    "base": ("Base, not tuned", "base"),
    "swap": ("Told another object", "swap"),
    "expert_random_object": ("Random-object expert", "expert"),
}


@dataclass(frozen=True)
class Evaluation:
    """One evaluated variant of a run.

    Args:
        overall: all episodes together.
        tasks: per task.
        latency_ms: percentile name to milliseconds for one call of the policy.
        other: for the instruction swap, success on the object that the sentence named instead.
        films: what was filmed: {"task", "initial_state", "success", "video", "film_strip", "instruction"}; the two
            paths are within `folder`.
    """

    variant: str
    overall: Rate
    tasks: dict[str, Rate]
    latency_ms: dict[str, float]
    other: Rate | None
    folder: Path
    films: list[dict[str, Any]]

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
    retention: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.path.resolve().name)


def load_run(path: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        BurnishError: the folder is missing, holds nothing to report, or a file in it is malformed.
    """
    if not path.is_dir():
        raise BurnishError(f"no run folder at {path}", "a folder that `burnish run` or `burnish train` wrote")
    recipe = path / "recipe.yaml"
    run = RunFolder(
        path=path, info=_read_object(path / "run.json"), metrics=read_jsonl(path / "metrics.jsonl"),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        evaluations=_evaluations(path), retention=_read_object(path / "retention.json"),
    )  # fmt: skip
    if not (run.info or run.metrics or run.evaluations or run.retention):
        raise BurnishError(f"nothing to report in {path}", "at least one of run.json, metrics.jsonl, retention.json, "
                           "eval/<variant>/summary.json")  # fmt: skip
    return run


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, [] when it does not exist; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise BurnishError(f"{path} line {number} is not JSON ({error.msg})", "one JSON object per line") from None
        if not isinstance(row, dict):
            raise BurnishError(f"{path} line {number} is not a JSON object", "one JSON object per line")
        rows.append(row)
    return rows


def _read_object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _evaluations(path: Path) -> dict[str, Evaluation]:
    found = {file.parent.name: _evaluation(file) for file in sorted(path.glob("eval/*/summary.json"))}
    known = [name for name in VARIANTS if name in found]
    return {name: found[name] for name in dict.fromkeys([*known, *found])}


def _evaluation(file: Path) -> Evaluation:
    summary = read_object(file)
    tasks = (summary.get("per_task") or {}).items()
    return Evaluation(
        variant=file.parent.name,
        overall=read_rate(summary.get("overall"), f"{file}: overall"),
        tasks={task: read_rate(row, f"{file}: per_task {task}") for task, row in tasks},
        latency_ms={name: float(value) for name, value in (summary.get("latency_ms") or {}).items()},
        other=read_rate(summary["other"], f"{file}: other") if summary.get("other") else None,
        folder=file.parent,
        films=_films(summary.get("videos") or [], file.parent / "episodes.jsonl"),
    )


def _films(videos: list[dict[str, Any]], episodes: Path) -> list[dict[str, Any]]:
    """What was filmed, with the sentence that the policy was given."""
    said = {(row.get("task"), row.get("initial_state")): row.get("instruction") for row in read_jsonl(episodes)}
    return [film | {"instruction": said.get((film["task"], film["initial_state"])) or ""} for film in videos]


def read_rate(row: Any, where: str) -> Rate:
    """A rate as `Rate.to_dict` wrote it; the interval is computed again from the counts."""
    if not isinstance(row, dict) or not all(isinstance(row.get(key), int) for key in ("n", "successes")):
        raise BurnishError(f"{where} has no whole numbers n and successes", "what `burnish eval` writes")
    return wilson(row["successes"], row["n"])
