"""Computing teacher features block by block, in processes on the CPU, in this process on a GPU."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

import numpy as np
import torch

from burnish.core.errors import BurnishError
from burnish.core.files import disk_errors
from burnish.data.feature_cache import FillJob, Pooled, load_statistics, to_device
from burnish.data.views import RowViews
from burnish.teachers.base import make_teacher

Block = tuple[np.ndarray, np.ndarray | None]
"""Rows and their observed states."""


class Filler:
    """Holds teacher, views and open files; `fill` computes one block and writes it where it belongs."""

    def __init__(self, job: FillJob, device: str):
        self.job, self.device = job, device
        self.statistics = load_statistics(job.folder, job.key.layers)
        self.teacher = Pooled(make_teacher(job.spec, tuple(job.key.grid)).to(device), job.key)
        self.views = RowViews(job.source)
        paths = {t: job.folder / f"layer-{t}.npy" for t in job.key.layers}
        self.starts = {t: np.load(p, mmap_mode="r", allow_pickle=False).offset for t, p in paths.items()}
        self.handles = {t: os.open(p, os.O_RDWR) for t, p in paths.items()}

    def fill(self, rows: np.ndarray, states: np.ndarray | None) -> None:
        found = self.teacher(to_device(self.views(rows, states), self.device))
        for t, features in found.items():
            stored = self.statistics[t].encode(features.cpu()).contiguous().numpy()
            if stored.dtype == np.float16 and not np.isfinite(stored).all():
                raise BurnishError(f"features of teacher layer {t} exceed half precision", "values below 65504",
                                   "cache_format: pca")  # fmt: skip
            data = stored.tobytes()
            place = self.starts[t] + int(rows[0]) * (len(data) // len(rows))
            # A memory map on a full disk dies of SIGBUS; a positioned write raises an error that can be told.
            with disk_errors(self.job.folder):
                if os.pwrite(self.handles[t], data, place) != len(data):
                    raise OSError(28, "no space left")

    def close(self) -> None:
        self.views.close()
        for handle in self.handles.values():
            os.close(handle)


def run_blocks(job: FillJob, blocks: Sequence[Block], workers: int, device: str) -> Iterator[np.ndarray]:
    """Compute and write every block; yields the rows of each as it is finished."""
    cores = len(os.sched_getaffinity(0)) if workers < 1 else workers
    count = min(cores, max(1, len(blocks) // 4))
    if torch.device(device).type != "cpu" or count < 2:
        filler = Filler(job, device)
        try:
            for rows, states in blocks:
                filler.fill(rows, states)
                yield rows
        finally:
            filler.close()
        return
    context = multiprocessing.get_context("spawn")  # a rendering context does not survive a fork
    pool = [_Process(context, job) for _ in range(count)]
    waiting = list(blocks)[::-1]
    try:
        while waiting or any(p.busy for p in pool):
            for process in pool:
                if waiting and not process.busy:
                    process.start(waiting.pop())
            ready = wait([p.connection for p in pool if p.busy])
            for process in pool:
                if process.connection in ready:
                    yield process.finish()
    finally:
        for process in pool:
            process.stop()


class _Process:
    def __init__(self, context, job: FillJob):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_filling_process, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()
        self.block: Block | None = None

    @property
    def busy(self) -> bool:
        return self.block is not None

    def start(self, block: Block) -> None:
        self.block = block
        self.connection.send(block)

    def finish(self) -> np.ndarray:
        try:
            error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise BurnishError(
                f"a process that computes teacher features died (exit {self.process.exitcode})",
                fix="run the same command again to continue",
            ) from None
        if error:
            raise BurnishError(error)
        rows, self.block = self.block[0], None
        return rows

    def stop(self) -> None:
        self.connection.close()
        if self.busy:
            self.process.terminate()
        self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _filling_process(connection: Connection, job: FillJob) -> None:
    """Body of a process: receives blocks, answers "" or an error, ends when its parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    filler = None
    try:
        while True:
            rows, states = connection.recv()
            try:
                filler = filler or Filler(job, "cpu")
                filler.fill(rows, states)
                connection.send("")
            except BurnishError as error:
                connection.send(str(error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        if filler is not None:
            filler.close()
