"""A part of `python -m bench scale`: evaluation, demonstrations and a study by processes and by Ray on two nodes.

The nodes are two of `ray.cluster_utils.Cluster` on this machine. Equal means: the same outcome and length of every
episode, the same bytes of the data set, the same bytes of the weights of every run.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WAYS = {"one process": ("processes", 1), "two processes": ("processes", 2), "ray, two nodes": ("ray", 2)}


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and detail; `args.quick` makes everything smaller."""
    from workshop.tiny import make_tiny

    detail: dict[str, Any] = {"seconds": {}}
    with TemporaryDirectory() as name, two_nodes():
        root = Path(name)
        policy = make_tiny("smolvla", root / "base", cameras=("front",), state_dim=4, action_dim=4, image_size=32)
        found: dict[str, dict[str, Any]] = {}
        for way, (engine, workers) in WAYS.items():
            folder = root / way
            folder.mkdir()
            start = time.perf_counter()
            with chdir(folder):
                found[way] = {
                    "evaluation": _evaluation(policy, engine, workers, 4 if args.quick else 20),
                    "demonstrations": _demonstrations(engine, workers, 3 if args.quick else 20),
                    "study": _study(policy, engine, workers, 1 if args.quick else 2),
                }
            detail["seconds"][way] = time.perf_counter() - start
    first = found["one process"]
    for part in first:
        detail[f"{part}_equal"] = all(one[part] == first[part] for one in found.values())
    detail |= {"episodes": len(first["evaluation"]), "files": len(first["demonstrations"]), "runs": len(first["study"])}
    return {"ray_outcomes_equal": all(detail[f"{part}_equal"] for part in first)}, detail


@contextmanager
def two_nodes() -> Iterator[None]:
    """A Ray cluster of two nodes with one CPU each, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def _evaluation(policy: Path, engine: str, workers: int, episodes: int) -> list[Any]:
    from burnish.evaluate.rollout import evaluate

    found = evaluate(policy, "tabletop:reach", episodes=episodes, output="eval", workers=workers, batch_size=4,
                     max_steps=24, video=False, engine=engine, progress=False)  # fmt: skip
    return [replace(record, latency_ms=()) for record in found.records]


def _demonstrations(engine: str, workers: int, episodes: int) -> dict[str, bytes]:
    from burnish.data.demos import make_demos

    make_demos("tabletop:reach", episodes, "demos", image_size=32, workers=workers, engine=engine, progress=False)
    return {str(path): path.read_bytes() for path in sorted(Path("demos").rglob("*")) if path.is_file()}


def _study(policy: Path, engine: str, workers: int, seeds: int) -> dict[str, Any]:
    from burnish.core.recipe import recipe_from_dict
    from burnish.evaluate.results import read_results
    from burnish.experiments.study import StudyConfig, run_study

    base = recipe_from_dict({
        "name": "scale/base", "demos": {"env": "tabletop:reach", "episodes": 3, "image_size": 32, "workers": 1},
        "policy": {"path": str(policy)}, "train": {"steps": 3, "batch_size": 2, "log_every": 1},
        "eval": {"episodes": 2, "max_steps": 8, "workers": 1},
    }, "bench")  # fmt: skip
    variants = {"plain": {}, "faster": {"train": {"lr": 1e-3}}}
    study = StudyConfig("scale/study", "bench", list(range(seeds)), "plain", [], variants)
    folder = run_study(study, base, engine=engine, workers=workers)
    found = {}
    for run in sorted(path.parent for path in folder.glob("*/policy")):
        outcomes = [(r.key, r.success, r.steps) for r in read_results(run / "eval/main")]
        found[run.name] = (run / "policy/model.safetensors").read_bytes(), outcomes
    return found
