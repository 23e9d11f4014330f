"""Where finished demonstrations wait until the data set is put together: one whole file for each attempt.

<root>.partial/request.json                      what was asked for; another request on this folder is refused
<root>.partial/<task>/spec.json                  frame rate and names of the task's states and actions
<root>.partial/<task>/000012.solved.safetensors  a demonstration
<root>.partial/<task>/000013.failed.safetensors  an attempt that did not solve the task (facts only)
"""

import json
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from burnish.core.errors import BurnishError
from burnish.core.files import make_folder, new_file, write_json
from burnish.core.outputs import claim
from burnish.core.reading import read_object

KIND = "unfinished recordings"
"""What the marker of the folder says."""
_NAME = re.compile(r"(\d+)\.(solved|failed)\.safetensors")


def task_folder_name(task_id: str) -> str:
    """A file name for a task id: "libero:spatial/3" gives "libero_spatial_3"."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", task_id)


@dataclass
class Recording:
    """One attempt of the expert.

    Args:
        facts: task_id, instruction, initial_state, success, length.
        arrays: "state" [T, D] and "action" [T, A] float32; for each camera "video.<camera>" (an mp4 as bytes) and
            "histogram.<camera>" [3, 256] int64; "ground_truth" (JSON lines as bytes); where asked for
            "depth.<camera>" [T, H, W] float16 metres and "segmentation.<camera>" [T, H, W] int16.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class StoredRecording:
    """A recording on disk; arrays are read one by one, when they are needed."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="numpy") as file:
                self.facts: dict[str, Any] = json.loads(file.metadata()["facts"])
                self.names = list(file.keys())
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise BurnishError(f"{path} is damaged", "a recording of burnish data demos", f"rm '{path}'") from None

    def __getitem__(self, name: str) -> np.ndarray:
        with safe_open(self.path, framework="numpy") as file:
            return file.get_tensor(name)


def write_recording(path: Path, recording: Recording) -> None:
    """Write the file atomically: a kill leaves no file of that name, a full disk raises one clear BurnishError."""
    arrays = {name: np.ascontiguousarray(array) for name, array in recording.arrays.items()}
    with new_file(path) as file:
        file.write_bytes(save(arrays, metadata={"facts": json.dumps(recording.facts)}))


class Spool:
    """The folder `<root>.partial` of one request."""

    def __init__(self, root: Path, request: dict[str, Any]):
        self.folder = partial_folder(root)
        self._held, self._is_open = ExitStack(), True
        self._held.enter_context(claim(self.folder, KIND, lambda folder: (folder / "request.json").is_file()))
        try:
            path = self.folder / "request.json"
            if not path.exists():
                write_json(path, request)
            check_same_request(_read(path), request, self.folder)
            for stale in self.folder.glob("*/.*"):
                stale.unlink()
        except BaseException:
            self._held.close()
            raise

    def task_folder(self, task_id: str) -> Path:
        folder = self.folder / task_folder_name(task_id)
        make_folder(folder)
        return folder

    def attempts(self, task_id: str) -> dict[int, Path]:
        """The finished attempts of a task by number."""
        paths = self.task_folder(task_id).iterdir()
        return {int(match[1]): path for path in paths if (match := _NAME.fullmatch(path.name))}

    def spec(self, task_id: str) -> dict[str, Any]:
        return _read(self.task_folder(task_id) / "spec.json")

    def close(self) -> None:
        """Let go of the folder; it stays where an attempt has come to its end, and the same request continues."""
        if not any(self.folder.glob("*/*.safetensors")):
            self.remove()
        self._held.close()

    def remove(self) -> None:
        """Delete the spool; the data set is complete."""
        if self._is_open:  # else another process may have begun there
            shutil.rmtree(self.folder, ignore_errors=True)
        self._is_open = False
        self._held.close()


def partial_folder(root: Path) -> Path:
    """Where what is made for `root` lies until it is whole."""
    return root.with_name(root.name + ".partial")


def _read(path: Path) -> dict[str, Any]:
    """A file of ours; where it is damaged the recordings beside it are of no use."""
    try:
        return read_object(path)
    except BurnishError as error:
        folder = next(one for one in path.parents if one.name.endswith(".partial"))
        raise BurnishError(str(error), fix=f"rm -r '{folder}'") from None


def recording_path(folder: Path, number: int, success: bool) -> Path:
    return folder / f"{number:06d}.{'solved' if success else 'failed'}.safetensors"


def check_same_request(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise BurnishError naming the settings in which a folder's request differs from the present one."""
    keys = [key for key in wanted if found.get(key) != wanted[key]]
    if keys:
        there = ", ".join(f"{key} {found.get(key)}" for key in keys)
        asked = ", ".join(f"{key} {wanted[key]}" for key in keys)
        raise BurnishError(f"{folder} was made with {there}", f"the same settings as asked for now ({asked})",
                           f"another --root, or rm -r '{folder}'")  # fmt: skip
