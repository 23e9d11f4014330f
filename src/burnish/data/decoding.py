"""Processes that decode frames when they are asked for: decoding and the training step share no interpreter."""

import threading
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import numpy as np

from burnish.core.workers import WorkerPool
from burnish.data.streamed import JoinedFrames, StreamedFrames


def decodes(array: Any) -> bool:
    """Whether indexing an array of frames decodes something."""
    if isinstance(array, JoinedFrames):
        return any(decodes(part) for part in array.parts)
    return isinstance(array, StreamedFrames)


class Decoders:
    """One process for each thread that asks; a process opens its videos itself and keeps them open.

    Args:
        arrays: camera to frames.
    """

    def __init__(self, arrays: Mapping[str, Any]):
        self.arrays, self._own, self._lock = dict(arrays), threading.local(), threading.Lock()
        self._pools: list[WorkerPool] = []

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The frames of these rows by camera; raises BurnishError where one is damaged or the process died."""
        pool = self._own.__dict__.get("pool")
        if pool is None:
            pool = self._own.pool = WorkerPool(_decode, self.arrays, count=1, name="the process that decodes frames")
            with self._lock:
                self._pools.append(pool)
        pool.send(0, rows, f"{rows.size} frames")
        return pool.receive()[0][2]

    def close(self) -> None:
        """End the processes; nobody may ask any more."""
        while self._pools:
            self._pools.pop().close()


def _decode(tasks: Iterable[np.ndarray], arrays: dict[str, Any]) -> Generator[dict[str, np.ndarray], None, None]:
    import torch

    torch.set_num_threads(1)
    for rows in tasks:
        yield {camera: array[rows] for camera, array in arrays.items()}
