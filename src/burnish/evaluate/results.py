"""Result files to compare: evaluation folders, lines of JSON, and what lerobot-eval, vla-eval and openvla-oft write.

Of another tool's file, the position of an episode in its task is its initial state where the file names none.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.reading import parse_json, read_text
from burnish.evaluate.records import EPISODES, EXAMPLE, Record, parse_lines, parse_row, unique

LEROBOT = "eval_info.json"
KNOWN = f"lines such as {EXAMPLE}, or a result file of lerobot-eval, vla-eval or openvla-oft"
# The log that openvla-oft keeps (openpi's example has the same lines behind a prefix).
_LOG = re.compile(
    r"^(?:\w+:\w+:)?(?:Task: (?P<task>.*)|Starting episode (?P<episode>\d{1,9})\.\.\.|Success: (?P<success>.*)"
    r"|# episodes completed so far: (?P<total>\d{1,9}))[ \t\r]*$",
    re.M,
)
log = logging.getLogger("burnish")


def read_results(path: Path | str) -> list[Record]:
    """The episodes of `path`, an evaluation folder or a result file of ours or of another tool, in file order.

    `steps` is -1 where the file does not say. A last line cut off by a kill is left out.

    Raises:
        BurnishError: no such file, nothing in it, a malformed line (named by number), an episode that it holds twice.
    """
    path = Path(path)
    file = _file_in(path) if os.path.isdir(path) else path
    text = read_text(file)
    value = _whole(text, file)
    if value is not None:
        rows = list(_rows(value, file))
        records = [parse_row(row, where) for where, row in rows]
        unique(records, file)
    elif not text.lstrip().startswith("{") and any(found["success"] for found in _LOG.finditer(text)):
        records = [parse_row(row, where) for where, row in _openvla(text, file)]
        unique(records, file)
    else:
        records = parse_lines(text, file)
    if not records:
        raise BurnishError(f"{file} holds no episode", KNOWN)
    return records


def _file_in(folder: Path) -> Path:
    found = next((folder / name for name in (EPISODES, LEROBOT) if os.path.lexists(folder / name)), None)
    if found is None:
        raise BurnishError(f"no results at {folder}", f"an evaluation folder with {EPISODES}, or one of {LEROBOT}")
    return found


def _whole(text: str, file: Path) -> Any:
    """The one JSON value that a text is; None for lines of JSON and for other text."""
    lines = text.strip().split("\n")
    if lines[0][:1] not in ("{", "["):
        return None
    try:
        first = json.loads(lines[0])
    except (ValueError, RecursionError):
        first = None
    if isinstance(first, dict) and ("success" in first or not first.keys() & {"per_task", "per_episode", "tasks"}):
        return None
    return parse_json(text, str(file))


def _rows(value: Any, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every episode in another tool's JSON."""
    if isinstance(value, list):
        yield from ((f"{file}: entry {i}", row) for i, row in enumerate(_objects(value, f"{file}")))
    elif "per_task" in value or "per_episode" in value:
        yield from _lerobot(value, file)
    elif "tasks" in value:
        yield from _vla_eval(value, file)
    else:
        keys = ", ".join(list(value)[:4])
        raise BurnishError(f"{file} is one JSON object ({keys}) of no form that is known", KNOWN)


def _lerobot(info: dict[str, Any], file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(info.get("per_task"), dict):
        raise BurnishError(f"{file} is a summary without episodes", f"the folder {file.parent}")
    for i, row in enumerate(_objects(info.get("per_episode") or [], f"{file}: per_episode")):  # before LeRobot 0.4
        yield f"{file}: per_episode {i}", {"initial_state": row.get("episode_ix"), "success": row.get("success")}
    for i, entry in enumerate(_objects(info.get("per_task") or [], f"{file}: per_task")):
        where = f"{file}: per_task {i}"
        metrics = entry.get("metrics")
        if not isinstance(metrics, dict) or not isinstance(metrics.get("successes"), list):
            raise BurnishError(f"{where} has no list of successes", "what lerobot-eval writes")
        task = f"{entry.get('task_group', '')}/{entry.get('task_id', '')}"
        for state, success in enumerate(metrics["successes"]):
            yield f"{where}, episode {state}", {"task": task, "initial_state": state, "success": success}


def _vla_eval(content: dict[str, Any], file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    broken = 0
    for i, task in enumerate(_objects(content["tasks"], f"{file}: tasks")):
        for position, one in enumerate(_objects(task.get("episodes"), f"{file}: episodes of task {i}")):
            if one.get("failure_reason"):  # of the machinery: vla-eval does not count them either
                broken += 1
                continue
            metrics = one.get("metrics")
            success = metrics.get("success") if isinstance(metrics, dict) else None
            row = {"task": task.get("task"), "initial_state": one.get("episode_id", position), "success": success}
            yield f"{file}: task {i}, episode {position}", row | {"steps": one.get("steps")}
    if broken:
        log.warning("%s: %d episodes with a failure_reason are left out", file, broken)


def _openvla(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    task: str | None = None
    state: int | None = None
    count = total = 0
    for found in _LOG.finditer(text):
        if found["task"] is not None:
            task = found["task"]
        elif found["episode"]:
            state = int(found["episode"]) - 1
        elif found["total"]:
            total = int(found["total"])
        else:
            success = {"True": True, "False": False}.get(found["success"].strip(), found["success"])
            yield f"{file}: episode {count}", {"task": task, "initial_state": state, "success": success}
            count, state = count + 1, None
    if total not in (count, 0):
        raise BurnishError(f"{file} tells of {total} episodes and shows {count}", "the whole log of openvla-oft")


def _objects(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BurnishError(f"{where} is no list of JSON objects", KNOWN)
    return value
