"""A retrieval head trained on cached features, and exact search among 100,000 vectors on one core.

The peer of the search is the plain way: all scores of a query, sorted. Times are CPU seconds of one thread, so that a
busy machine does not change them.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, VIEWS, HEAD_FRAMES = 1152, 3, 6000
"""SigLIP's features, three cameras, and as many frames as CrossVLA trains on."""
FRAMES, QUERIES, BEST = 100_000, 100, 10


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Features are drawn at random: neither time depends on what they show.

    Figures:
        head_minutes: training the default head on 6,000 frames of three views with 1,152 features each.
        index_100k_seconds: 100,000 frames of one view through that head into an index folder.
        query_ms: median of the ten nearest of one vector among them, on one core.
        speedup_over_sort: against all scores, sorted, on one core.
        memory_over_vectors: what opening the index and asking takes at most, over the bytes of its vectors.
        recall_equals_brute_force: no vector is nearer than those found, by scores in float64.
    """
    import torch

    from burnish.core.provenance import machine
    from burnish.data.search import build
    from burnish.methods.retrieve.options import make_config
    from burnish.methods.retrieve.train import train_head

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    frames, epochs = (2000, 0.2) if args.quick else (FRAMES, make_config("default", {}).epochs)
    begin = time.process_time()
    some = _features(HEAD_FRAMES if not args.quick else 400, VIEWS, episodes=60)
    head, losses = train_head(some, make_config("default", {"epochs": epochs}), progress=sys.stderr.isatty())
    head_minutes = (time.process_time() - begin) / 60
    many = _features(frames, 1, episodes=frames // 100)
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as folder:
        begin = time.process_time()
        build(many, head, "bench").save(Path(folder) / "index")
        seconds = time.process_time() - begin
        one_core = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from bench.retrieve import ask; ask(sys.argv[1])", f"{folder}/index"],
            env={**os.environ, **one_core}, check=True, capture_output=True, text=True,
        )  # fmt: skip
    torch.set_num_threads(threads)
    asked = json.loads(done.stdout)
    info = machine()
    return {
        "name": "retrieve", "device": info.pop("device"), "versions": info, "n": QUERIES,
        "figures": {"head_minutes": head_minutes, "index_100k_seconds": seconds * FRAMES / frames, **asked["figures"]},
        "detail": {
            "threads": 1, "clock": "CPU seconds of the process", "frames": frames, "losses": losses, **asked["detail"],
        },
    }  # fmt: skip


def _features(count: int, views: int, episodes: int):
    """Vectors of random features."""
    from burnish.data.vectors import FRAME, Vectors

    rng = np.random.default_rng(0)
    values = np.empty((count, views, WIDTH), np.float16)
    for first in range(0, count, 4096):
        values[first : first + 4096] = rng.standard_normal(values[first : first + 4096].shape, np.float32)
    rows, length = np.arange(count), count // episodes
    columns = [rows, rows // length, rows % length, rows // length % 10, np.full(count, length)]
    about = {"encoder": {"kind": "random"}, "spec": "random", "head": "", "data": "", "root": "", "every": 1,
             "cameras": [f"view{v}" for v in range(views)],
             "instructions": {str(t): f"task {t}" for t in range(10)}}  # fmt: skip
    return Vectors(values, np.rec.fromarrays(columns, dtype=FRAME), about)


def ask(folder: str) -> None:
    """In a process of its own, with one thread: print the figures of the search as JSON."""
    from burnish.data.search import Index

    rng = np.random.default_rng(1)
    np.ones((8, 8), np.float32) @ np.ones((8, 8), np.float32)  # BLAS takes its buffers
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is counted from here on
    before = _kilobytes("VmRSS")
    index = Index.open(Path(folder))
    queries = rng.standard_normal((QUERIES, index.keys.shape[1])).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    found, ours, sorts = [], [], []
    for query in queries:
        begin = time.process_time()
        found.append(index.ask(query[None], index.vectors.about, BEST)[1][0])
        ours.append(time.process_time() - begin)
    peak = (_kilobytes("VmHWM") - before) * 1024
    for query in queries[:20]:
        begin = time.process_time()
        np.argsort(-(index.keys @ query), kind="stable")[:BEST]
        sorts.append(time.process_time() - begin)
    exact = True
    for query, places in zip(queries, found, strict=True):
        scores = index.keys.astype(np.float64) @ query.astype(np.float64)
        exact &= bool(scores[places].min() >= np.partition(scores, -BEST)[-BEST] - 1e-6)
    print(json.dumps({
        "figures": {
            "query_ms": 1e3 * statistics.median(ours),
            "speedup_over_sort": statistics.median(sorts) / statistics.median(ours),
            "memory_over_vectors": peak / index.keys.nbytes, "recall_equals_brute_force": exact,
        },
        "detail": {"vectors": list(index.keys.shape), "vector_bytes": index.keys.nbytes, "peak_bytes": peak},
    }))  # fmt: skip


def _kilobytes(name: str) -> int:
    """A figure of this process's memory, the mapped pages of files included."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
