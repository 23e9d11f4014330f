"""`episodes.jsonl`: one line per episode, written as it ends, so that a killed evaluation continues.

Also reads the result files of other tools: one JSON object per line with task, seed (or initial_state, or
trial) and success.
"""

import fcntl
import json
import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.files import disk_errors, write_json

EPISODES = "episodes.jsonl"
SETTINGS = "settings.json"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Record:
    """One episode.

    Args:
        task: single-task id, e.g. "libero:spatial/3".
        initial_state: which of the fixed initial states.
        seed: seed of the policy's noise.
        success: whether the task was solved, always judged on the original instruction.
        steps: control steps taken.
        latency_ms: one policy call in milliseconds for each replan (the call serves a whole batch).
        instruction: the sentence that the policy was given.
        weights: hash of the policy's weights, or the name of the expert.
        commit: git commit of burnish ("" outside a checkout).
        variant: "plain" or "instruction_swap".
        other_success: under an instruction swap, whether the newly named object's task was solved.
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

    @property
    def key(self) -> tuple[str, int]:
        """What a trial is paired on."""
        return self.task, self.initial_state

    def to_line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


_FIELDS = {f.name for f in fields(Record)}
_STATE_KEYS = ("initial_state", "trial", "seed")


def _parse(line: str, where: str) -> Record:
    """One line of ours or of another tool's result file."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BurnishError(f"{where} is not JSON ({error.msg})", "one JSON object per line") from None
    if not isinstance(row, dict):
        raise BurnishError(f"{where} holds {type(row).__name__}", "one JSON object per line")
    state_key = next((k for k in _STATE_KEYS if k in row), None)
    if "success" not in row or state_key is None:
        missing = "success" if "success" not in row else "initial_state, trial or seed"
        raise BurnishError(f"{where} lacks {missing}", 'a line such as {"task": "t", "seed": 3, "success": true}')
    success, state = row["success"], row[state_key]
    if success not in (0, 1, True, False):
        raise BurnishError(f"{where}: success is {success!r}", "true, false, 0 or 1")
    if isinstance(state, bool) or not isinstance(state, int):
        raise BurnishError(f"{where}: {state_key} is {state!r}", "an integer")
    known = {k: v for k, v in row.items() if k in _FIELDS}
    seed = row.get("seed", 0)
    known |= {
        "task": str(row.get("task", "")), "initial_state": state, "success": bool(success),
        "seed": seed if isinstance(seed, int) and state_key != "seed" else 0,
        "steps": int(row.get("steps", -1)), "latency_ms": tuple(row.get("latency_ms", ())),
    }  # fmt: skip
    return Record(**known)


def read_results(path: Path | str) -> list[Record]:
    """Read an evaluation folder or a JSONL file of ours or of another tool, in file order.

    `steps` is -1 where the file does not say. A last line cut off by a kill is left out.

    Raises:
        BurnishError: no such file, nothing in it, or a malformed line (named by number).
    """
    path = Path(path)
    file = path / EPISODES if path.is_dir() else path
    if not file.is_file():
        raise BurnishError(f"no results at {path}", f"an evaluation folder with {EPISODES}, or a JSONL file")
    lines = file.read_text(encoding="utf-8").split("\n")
    cut_off = lines.pop()
    records = [_parse(line, f"{file}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if cut_off.strip():
        try:
            records.append(_parse(cut_off, f"{file}:{len(lines) + 1}"))
        except BurnishError:
            if not records:
                raise
    if not records:
        raise BurnishError(f"{file} holds no episode", "one JSON object per line")
    return records


class Journal(AbstractContextManager):
    """The open `episodes.jsonl` of one evaluation: what is done, and where the next episode is appended.

    Args:
        folder: evaluation folder; made when missing.
        settings: JSON-able facts that every episode in the folder shares (weights, seed, limits).

    Raises:
        BurnishError: the folder was started with other settings, or another evaluation writes to it now.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.path = folder / EPISODES
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BurnishError(f"another evaluation is writing to {folder}", "a folder of its own") from None
        try:
            self._check(folder, settings)
            self._drop_cut_off_line()
            self.records = read_results(self.path) if self.path.stat().st_size else []
        except BurnishError:
            self._file.close()
            raise

    def _check(self, folder: Path, settings: dict[str, Any]) -> None:
        file = folder / SETTINGS
        if not file.exists():
            write_json(file, settings)
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(settings))
        different = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        if different:
            k = different[0]
            found = f"{folder} holds an evaluation with other {', '.join(different)}"
            found += f" ({k}: {before.get(k)} there, {now.get(k)} now)"
            raise BurnishError(found, "the same policy and settings, which continues it", "another --output")

    def _drop_cut_off_line(self) -> None:
        """A kill while writing leaves a line without its end; that episode is run again."""
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            self._file.truncate(end)
        self._file.seek(end)

    def append(self, record: Record) -> None:
        """Add an episode; on the disk when this returns."""
        with disk_errors(self.path):
            self._file.write(record.to_line().encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.records.append(record)

    def __exit__(self, *_: object) -> None:
        self._file.close()
