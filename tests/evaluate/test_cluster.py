"""Ray as the engine: the same results as by processes, whoever dies; and one line for whatever is missing.

The nodes of the cluster are two, on this machine. The tests go from the first to the last: it loses a node.
"""

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import cluster_fakes as workers
import evaluation_fakes as fakes
import pytest
import yaml

from burnish.core.cluster import choose_engine
from burnish.core.errors import BurnishError
from burnish.core.workers import Engine, WorkerPool
from burnish.data.demos import make_demos
from burnish.evaluate.rollout import evaluate, evaluate_expert
from burnish.experiments import study as studies

pytest.importorskip("ray")
fakes.register()
QUIET = {"progress": False, "video": False, "make": fakes.make_env}


def bare(records):
    return sorted((replace(r, latency_ms=()) for r in records), key=lambda r: r.key)


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("dask", None, "engine 'dask'; expected processes, ray, ray:auto or ray:HOST:PORT"),
        ("ray:", None, "engine 'ray:'"),
        ("ray://head:10001", None, "engine 'ray://head:10001'"),
        ("ray:a b:1", None, "engine 'ray:a b:1'"),
        ("processes", 0.5, "--num-gpus 0.5 with the engine processes"),
        ("ray", 1.5, "1.5 GPUs for each worker; expected 0 to 1"),
        ("ray", -1, "-1 GPUs"),
    ],
)
def test_engines_that_cannot_be(name, gpus, message):
    with pytest.raises(BurnishError, match=message):
        choose_engine(name, gpus)


def test_ray_is_optional(monkeypatch):
    monkeypatch.setattr("burnish.core.cluster.find_spec", lambda name: None)
    assert type(choose_engine("processes")) is Engine
    with pytest.raises(BurnishError, match=r"without Ray; .*pip install 'burnish\[scale\]'"):
        choose_engine("ray")


def test_an_address_where_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(BurnishError, match=f"no Ray cluster at {address} .*refused.*ray start --head"):
        choose_engine(f"ray:{address}").__enter__()
    with pytest.raises(BurnishError, match="no Ray cluster at 127.0.0.1:99999"):
        choose_engine("ray:127.0.0.1:99999").__enter__()


@pytest.fixture(scope="module")
def nodes():
    import ray
    from ray.cluster_utils import Cluster

    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    here = {"num_cpus": 1, "include_log_monitor": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={**here, "include_dashboard": False})
        cluster.second = cluster.add_node(**here)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def test_a_pool_of_actors_is_a_pool(nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with choose_engine("ray") as engine:
        assert engine.count() == 2
        with WorkerPool(workers.powers, 3, count=2, engine=engine) as pool:
            assert dict(pool.run(range(20))) == {n: n**3 for n in range(20)}
            assert dict(pool.run(["folder"])) == {"folder": str(tmp_path)}
            with pytest.raises(BurnishError, match="^no such task; expected a number$"):
                list(pool.run(["refuse"]))
        with (
            WorkerPool(workers.powers, 3, count=1, engine=engine, name="squarer") as pool,
            pytest.raises(RuntimeError, match="held fail: ValueError: cannot do fail") as error,
        ):
            list(pool.run(["fail"]))
        assert "in powers" in error.value.__notes__[0]
        with pytest.raises(BurnishError, match="3 workers of 1 CPU .* with 2 CPUs .*--workers 2"):
            engine.count(3)
    with (
        pytest.raises(BurnishError, match="1 workers of 1 CPU and 1 GPUs in .* 0 GPUs on 2 nodes"),
        choose_engine("ray", 1) as engine,
    ):
        engine.count()


def test_a_dead_worker_is_replaced_and_its_tasks_are_done_again_but_not_for_ever(nodes, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("burnish.core.workers.MOST_DEATHS", 2)
    for name in "ab":
        (tmp_path / name).touch()
    tasks = [str(tmp_path / name) for name in "abc"]
    with choose_engine("ray") as engine:
        with WorkerPool(workers.powers, 3, count=1, engine=engine, name="squarer") as pool:
            assert [result for _, result in pool.run(tasks)] == ["a is done", "b is done", "c is done"]
        assert caplog.text.count("(ActorDiedError) while it held") == 2
        with (
            WorkerPool(workers.dies, count=1, engine=engine, fix="less") as pool,
            pytest.raises(BurnishError, match="process 0 ended .* while it held 7; try: less"),
        ):
            list(pool.run([7]))


def test_episodes_are_the_same_and_those_of_a_killed_simulator_are_run_again(nodes, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    plain = {"episodes": 8, "first_state": 10, "batch_size": 4, **QUIET}
    expected = evaluate(fakes.make_policy(), "line", output=tmp_path / "plain", workers=1, **plain)
    Path("die-once").touch()
    found = evaluate(fakes.make_policy(), "line", output=tmp_path / "ray", workers=2, engine="ray", **plain)
    assert not Path("die-once").exists() and caplog.text.count("a new one takes its place") == 1
    assert bare(found.records) == bare(expected.records)
    lines = (tmp_path / "ray/episodes.jsonl").read_text().splitlines()
    assert len(lines) == len({(row["task"], row["initial_state"]) for row in map(json.loads, lines)}) == 16
    arguments = {"episodes": 3, "engine": "ray", **QUIET}
    expert = evaluate_expert("line:mixed", output=tmp_path / "expert", **arguments)
    assert expert.overall.rate == 1 and expert.left_out == {"line:dull": "no scripted expert for line:dull"}


def test_demonstrations_are_the_same_to_the_byte(nodes, tmp_path):
    arguments = {"image_size": 16, "workers": 2, "progress": False}
    for name, engine in (("plain", "processes"), ("ray", "ray")):
        make_demos("tabletop:reach", 3, tmp_path / name / "reach", engine=engine, **arguments)
    one, other = ({p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
                  for root in (tmp_path / "plain", tmp_path / "ray"))  # fmt: skip
    assert one == other and len(one) > 5


def test_runs_of_a_study_are_tasks(nodes, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"data": {"root": "there"}, "train": {"steps": 7}, "eval": {"env": "tabletop:lift"}})
    )
    study = {"name": "two", "recipe": "recipe.yaml", "seeds": [0, 1], "variants": {"plain": {}, "other": {}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    written = []
    monkeypatch.setattr(studies, "finish_runs", workers.finish_runs)
    monkeypatch.setattr(studies, "_write", lambda study, base, runs, facts, minutes, path: written.append(
        ([f"{run.variant}-{run.seed}" for run in runs], minutes)))  # fmt: skip
    config, base = studies.load_study("study.yaml")
    folder = studies.run_study(config, base, result=tmp_path / "two.json", engine="ray")
    names = ["plain-0", "other-0", "plain-1", "other-1"]
    assert written == [(names[: n + 1], 1.5 * (n + 1)) for n in range(4)], "in the order of the study file"
    assert {(folder / name / "given").read_text() for name in names} == {f"7 two {torch.get_num_threads()}"}


def test_a_lost_node_is_one_line(nodes):
    with choose_engine("ray") as engine, WorkerPool(workers.sleeps, count=2, engine=engine, name="sleeper") as pool:
        for number in range(2):
            pool.send(number, 60)
        nodes.remove_node(nodes.second)
        with pytest.raises(BurnishError, match="2 workers .* in a Ray cluster with 1 CPUs .*on 1 nodes.*--workers 1"):
            pool.receive()


def test_a_cluster_of_its_own_ends_with_its_command(nodes):
    import subprocess

    script = (
        "from burnish.core.cluster import choose_engine\nfrom burnish.core.workers import WorkerPool\n"
        "from cluster_fakes import powers\n"
        "with choose_engine('ray') as engine, WorkerPool(powers, 2, count=engine.count(1), engine=engine) as pool:\n"
        "    import ray\n"
        "    print(sorted(pool.run([3, 4])), [node['NodeManagerAddress'] for node in ray.nodes()])\n"
        "assert not ray.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "[(3, 9), (4, 16)] ['127.0.0.1']\n" and done.returncode == 0, done.stderr
