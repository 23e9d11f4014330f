"""What a server was asked and answered, written beside its work: one safetensors file for each call, up to a limit."""

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError, one_line
from burnish.core.files import new_file
from burnish.core.outputs import claim
from burnish.core.reading import regular_file
from burnish.policies.pretrained import foreign
from burnish.runtime.serve.metrics import Metrics
from burnish.runtime.serve.rows import Row

KIND = "recorded calls"
MOST_BEHIND = 32
"""Calls that may wait to be written; more are dropped and counted, so that a slow disk slows no robot."""
log = logging.getLogger("burnish")


class Recorder:
    """Writes calls into a folder.

    Args:
        folder: of its own; calls of earlier servers in it stay.
        most_mb: MiB in all; what comes after is not written.
        metrics: told what became of a call.

    Raises:
        BurnishError: the folder holds something else, or another server records there now.
    """

    def __init__(self, folder: Path, most_mb: int, metrics: Metrics):
        self._held = ExitStack()
        self._held.enter_context(claim(folder, KIND))
        earlier = list(folder.glob("call-*.safetensors"))
        self.folder, self.metrics = folder, metrics
        self.left = (most_mb << 20) - sum(file.stat().st_size for file in earlier)
        self.number = 1 + max((int(file.stem[5:]) for file in earlier if file.stem[5:].isdigit()), default=-1)
        self._thread, self._room = ThreadPoolExecutor(1, "record"), threading.Semaphore(MOST_BEHIND)

    def put(self, row: Row, actions: np.ndarray, about: dict[str, Any]) -> None:
        """Write a call, later and elsewhere."""
        size = sum(view.nbytes for view in row.images.values()) + row.state.nbytes + actions.nbytes
        if size > self.left or not self._room.acquire(blocking=False):
            self.metrics.recorded.labels("dropped").inc()
            return
        self.left -= size
        path = self.folder / f"call-{self.number:08d}.safetensors"
        self.number += 1
        self._thread.submit(self._write, path, row, actions, {**about, "task": row.task})

    def _write(self, path: Path, row: Row, actions: np.ndarray, about: dict[str, Any]) -> None:
        from safetensors.numpy import save_file

        tensors = {f"images.{key}": view for key, view in row.images.items()} | {"state": row.state, "actions": actions}
        tensors = {key: np.ascontiguousarray(one) for key, one in tensors.items()}
        try:
            with new_file(path) as file:
                save_file(tensors, file, {"call": json.dumps(about)})
            self.metrics.recorded.labels("written").inc()
        except Exception as error:  # noqa: BLE001 - safetensors has a kind of its own for a disk that fails
            log.warning("a call was not recorded: %s", one_line(error))
            self.metrics.recorded.labels("failed").inc()
        finally:
            self._room.release()

    def close(self) -> None:
        """Write what waits, and leave the folder to others."""
        self._thread.shutdown()
        self._held.close()


def recorded(folder: Path | str) -> Iterator[tuple[Row, np.ndarray, dict[str, Any]]]:
    """(row, actions [T, A], {session, call, seed, task}) of every call in a folder, in order.

    Raises:
        BurnishError: no call in the folder, or a file that no recorder wrote.
    """
    from safetensors import safe_open

    files = sorted(Path(folder).glob("call-*.safetensors"))
    if not files:
        raise BurnishError(f"no recorded calls in {folder}", "some", f"burnish policy serve POLICY --record {folder}")
    for path in files:
        with foreign(str(path), "a call that burnish recorded"), safe_open(regular_file(path), "np") as file:
            about = json.loads((file.metadata() or {})["call"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            images = {name[7:]: value for name, value in tensors.items() if name.startswith("images.")}
            yield Row(images, tensors["state"], about["task"]), tensors["actions"], about
