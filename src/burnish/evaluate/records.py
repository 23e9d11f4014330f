"""`episodes.jsonl`: one line per episode, written as it ends, so that a killed evaluation continues."""

import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.files import disk_errors, write_json
from burnish.core.options import number
from burnish.core.outputs import claim
from burnish.core.reading import MOST_BYTES, parse_json, read_object, regular_file
from burnish.envs.base import FAILURES

EPISODES = "episodes.jsonl"
SETTINGS = "settings.json"
SUMMARY = "summary.json"
EVALUATION = "evaluation"
"""What the marker of an output folder says (see core.outputs)."""
EXAMPLE = '{"task": "t", "seed": 3, "success": true}'
log = logging.getLogger("burnish")


@dataclass(frozen=True)
class Record:
    """One episode.

    Args:
        task: single-task id, e.g. "libero:spatial/3".
        initial_state: which of the fixed initial states.
        seed: seed of the policy's noise.
        success: whether the task was solved, always judged on the original instruction.
        steps: control steps taken; -1 where it is not known.
        latency_ms: one policy call in milliseconds for each replan (the call serves a whole batch).
        instruction: the sentence that the policy was given.
        weights: hash of the policy's weights, or the name of the expert.
        commit: git commit of burnish ("" outside a checkout).
        variant: "plain" or "instruction_swap".
        other_success: under an instruction swap, whether the newly named object's task was solved.
        motion: of a policy under delay: how smoothly it moved, see `evaluate.delay.motion`.
        failure: why it was not solved, one of `envs.base.FAILURES`; "" where it was, or where nobody knows.
        distances: of a policy with a watchdog: how far from its training set each replan was, see `data.watchdog`.
    """

    task: str
    initial_state: int
    seed: int
    success: bool
    steps: int
    latency_ms: tuple[float, ...] = ()
    instruction: str = ""
    weights: str = ""
    commit: str = ""
    variant: str = "plain"
    other_success: bool | None = None
    motion: dict[str, float] | None = None
    failure: str = ""
    distances: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        """What a trial is paired on."""
        return self.task, self.initial_state

    def to_line(self) -> str:
        """As a line of `episodes.jsonl`."""
        row = {k: v for k, v in asdict(self).items() if v or k not in ("motion", "failure", "distances")}
        return json.dumps(row, ensure_ascii=False) + "\n"


_STATES = ("initial_state", "trial", "seed")
_LIKE_A_TASK = ("task_id", "task_name", "task_index", "task_idx", "task_description")
_LIKE_A_STATE = (
    "episode", "episode_id", "episode_index", "episode_idx", "episode_ix", "init_state_id", "init_state_idx",
    "trial_id", "trial_idx",
)  # fmt: skip


def parse_row(row: dict[str, Any], where: str) -> Record:
    """One line of ours or of another tool's result file; null means that it does not say."""
    row = {key: value for key, value in row.items() if value is not None}
    state = next((key for key in _STATES if key in row), None)
    names = [key for key in _LIKE_A_TASK if "task" not in row and key in row]
    if names or state is None:
        names += [key for key in _LIKE_A_STATE if key in row]
    if names:
        raise _misnamed(where, where.rpartition(":")[0], names)
    if "success" not in row or state is None:
        missing = "success" if "success" not in row else "initial_state, trial or seed"
        raise BurnishError(f"{where} lacks {missing}", f"a line such as {EXAMPLE}")
    success = _flag(row["success"], f"{where}: success")
    latency = _numbers(row, "latency_ms", where, "milliseconds, or a list of them")
    task, variant, steps = row.get("task", ""), row.get("variant", "plain"), _whole(row.get("steps", -1))
    if isinstance(task, bool) or not isinstance(task, str | int):
        raise BurnishError(f"{where}: task is {_short(task)}", "text")
    if not isinstance(variant, str):
        raise BurnishError(f"{where}: variant is {_short(variant)}", "text")
    if steps is None or not -1 <= steps <= 10**9:
        raise BurnishError(f"{where}: steps is {_short(row['steps'])}", "a whole number from 0 on")
    initial_state, seed = _integer(row, state, where), _integer(row, "seed", where)
    texts = {key: row[key] for key in ("instruction", "weights", "commit") if isinstance(row.get(key), str)}
    texts |= {"failure": row["failure"]} if row.get("failure") in FAILURES else {}
    other = _flag(row["other_success"], f"{where}: other_success") if "other_success" in row else None
    moved = row.get("motion")
    if moved is not None and not (isinstance(moved, dict) and all(map(number, moved.values()))):
        raise BurnishError(f"{where}: motion is {_short(moved)}", "numbers by name")
    return Record(
        task=str(task), initial_state=initial_state, seed=0 if state == "seed" else seed, success=success, steps=steps,
        latency_ms=latency, variant=variant, other_success=other, motion=moved,
        distances=_numbers(row, "distances", where, "numbers from 0 on"), **texts,
    )  # fmt: skip


def _numbers(row: dict[str, Any], key: str, where: str, expected: str) -> tuple[float, ...]:
    found = row.get(key, [])
    found = [one for one in found if one is not None] if isinstance(found, list) else [found]
    if not all(number(one) and one >= 0 for one in found):
        raise BurnishError(f"{where}: {key} is {_short(row[key])}", expected)
    return tuple(map(float, found))


def _integer(row: dict[str, Any], key: str, where: str) -> int:
    value = _whole(row.get(key, 0))
    if value is None:
        raise BurnishError(f"{where}: {key} is {_short(row[key])}", "a whole number")
    return value


def _misnamed(where: str, file: str, names: list[str]) -> BurnishError:
    new = {name: "task" if name in _LIKE_A_TASK else "initial_state" for name in names}
    first = {to: name for name, to in reversed(new.items())}
    edits = "; ".join(f's/"{name}":/"{to}":/' for to, name in first.items())
    fix = f"sed {shlex.quote(edits)} {shlex.quote(file)} > renamed.jsonl"
    found = f"{where} has {', '.join(map(repr, names))}, names that are not read"
    return BurnishError(found, f"those in {EXAMPLE}", fix)


def _flag(value: Any, what: str) -> bool:
    if not number(value) and not isinstance(value, bool) or value not in (0, 1):
        raise BurnishError(f"{what} is {_short(value)}", "true, false, 0 or 1")
    return bool(value)


def _whole(value: Any) -> int | None:
    """A whole number, which pandas writes as 3.0 in a column with gaps; None for anything else."""
    return int(value) if number(value) and abs(value) < 2**63 and math.floor(value) == value else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def rows_of(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every filled line of JSON; a last line that a kill has cut off is left out and told."""
    lines = text.split("\n")
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{file}:{index}")
        except BurnishError:
            if index < len(lines) or index == 1 or line.rstrip().endswith("}"):
                raise
            log.warning("the last line of %s is cut off and left out", file)
            return
        if not isinstance(row, dict):
            raise BurnishError(f"{file}:{index} holds {_short(row)}", "one JSON object per line")
        yield f"{file}:{index}", row


def parse_lines(text: str, file: Path) -> list[Record]:
    """The episodes in lines of JSON."""
    records, spare = [], set()
    for where, row in rows_of(text, file):
        records.append(parse_row(row, where))
        spare |= row.keys() & set(_LIKE_A_STATE) if not row.keys() & {"initial_state", "trial"} else set()
    unique(records, file, sorted(spare))
    return records


def unique(records: Iterable[Record], file: Path, spare: list[str] | None = None) -> None:
    """Raise BurnishError where an episode stands twice; `spare` are columns that may be what tells the two apart."""
    seen: set[tuple[str, int, int]] = set()
    for one in records:
        key = (one.task, one.initial_state, one.seed)
        if key in seen and spare:
            where = f"{file} repeats task {one.task!r} with seed {one.initial_state} and"
            raise _misnamed(where, str(file), spare)
        if key in seen:
            found = f"{file} holds task {one.task!r}, initial state {one.initial_state} more than once"
            raise BurnishError(found, "each trial once for each seed")
        seen.add(key)


def is_evaluation(folder: Path) -> bool:
    """Whether a folder is an evaluation of a version that left no marker: its settings.json says so."""
    file = folder / SETTINGS
    return os.path.lexists(file) and {"env", "weights", "seed"} <= read_object(file, folder).keys()


class Journal(AbstractContextManager):
    """The open `episodes.jsonl` of one evaluation: what is done, and where the next episode is appended.

    Args:
        folder: evaluation folder; made when missing.
        settings: JSON-able facts that every episode in the folder shares (weights, seed, limits).
        parse: makes an episode of a row and its place, where they are no `Record`s.
        kind, name: what the folder holds, and its file of lines.

    Raises:
        BurnishError: the folder was started with other settings, holds something else than an evaluation, or another
            process writes to it now.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], parse: Callable[[dict, str], Any] | None = None,
        kind: str = EVALUATION, name: str = EPISODES,
    ):  # fmt: skip
        self.settings, self._parse, self.kind = settings, parse, kind
        self.path = folder / name
        with ExitStack() as opening:
            opening.enter_context(claim(folder, kind, is_evaluation if kind == EVALUATION else None))
            self._check(folder, settings)
            self.records, end = self._read(folder)
            with disk_errors(self.path):
                self._file = opening.enter_context(open(self.path, "ab", buffering=0))
                if self._file.seek(0, os.SEEK_END) > end:
                    log.warning("the last line of %s is cut off and left out", self.path)
                    self._file.truncate(end)
            self._held = opening.pop_all()

    def _check(self, folder: Path, settings: dict[str, Any]) -> None:
        file = folder / SETTINGS
        if not os.path.lexists(file):
            write_json(file, settings)
            return
        before = read_object(file, folder)
        now = json.loads(json.dumps(settings))
        different = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        if different:
            k = different[0]
            found = f"{folder} holds an earlier {self.kind} with other {', '.join(different)}"
            found += f" ({k}: {_short(before.get(k))} there, {_short(now.get(k))} now)"
            raise BurnishError(found, "the same policy and settings, which continues it", "another --output")

    def _read(self, folder: Path) -> tuple[list[Any], int]:
        """The episodes that are done, and where they end: an episode whose line a kill has cut off is run again."""
        if not os.path.lexists(self.path):
            return [], 0
        content = regular_file(self.path, folder, MOST_BYTES).read_bytes()
        end = content.rfind(b"\n") + 1
        try:
            text = content[:end].decode()
            if self._parse is None:
                return parse_lines(text, self.path), end
            return [self._parse(row, where) for where, row in rows_of(text, self.path)], end
        except UnicodeDecodeError as error:
            raise BurnishError(f"{self.path} is no UTF-8 text (byte {error.start})", "our own lines") from None

    def append(self, record: Any) -> None:
        """Add an episode; on the disk when this returns. Where that fails the file is as before: another may follow."""
        line, end = record.to_line().encode(), self._file.seek(0, os.SEEK_END)
        try:
            with disk_errors(self.path):
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
        except (OSError, BurnishError):
            self._file.truncate(end)
            raise
        self.records.append(record)

    def __exit__(self, *_: object) -> None:
        self._held.close()
