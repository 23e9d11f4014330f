"""Retrieval measured from end to end on a small data set, by the command."""

import json

import fake
import numpy as np
import pytest
from feature_fakes import make_vision

import bench
from bench import retrieve
from burnish.core.errors import BurnishError
from burnish.experiments.results import render_table
from workshop.__main__ import main
from workshop.retrieval import PUBLISHED, SAME, SENTENCE, SHUFFLED, folds


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Eight episodes of two tasks in two views."""
    return fake.make_dataset(tmp_path_factory.mktemp("retrieve") / "data", 8, 9, cameras=("front", "wrist"))


def test_measure_writes_a_whole_result_with_every_rank(seen, tmp_path, capsys):
    vision = make_vision(tmp_path / "vision")
    result, figure = tmp_path / "results/small.json", tmp_path / "neighbours.png"
    words = ["retrieval", seen, "--encoder", "pixels", f"folder:{vision}", "--seeds", 2,
             "--moments", 3, "--shifted", f"itself={seen}", "--result", result, "--figure", figure]  # fmt: skip
    assert main(list(map(str, words))) == 0, capsys.readouterr().err
    found = json.loads(result.read_text())
    rows = {(row["eval"], row["label"]): row for row in found["rows"]}
    name = f"folder:{vision}"
    labels = {"pixels", f"{name} raw", f"{name} head paper", f"{name} head default"}
    assert {label for split, label in rows if split == SAME} == labels
    assert {label for split, label in rows if split == SENTENCE} == {f"{name} head default"}
    same = rows[SAME, "pixels"]
    ranks = [int(r) for seed in same["outcomes"].values() for part in seed.split("; ") for r in part.split()[1:]]
    assert len(ranks) == same["n"] == 24 and sum(r == 1 for r in ranks) == same["successes"]
    asked = [part.split(":")[0] for seed in same["outcomes"].values() for part in seed.split("; ")]
    assert sorted(map(int, asked)) == list(range(8))  # every episode once
    assert 0 <= float(same["time_error"].split()[0]) <= 1 and rows[SHUFFLED, "pixels"]["chance_rate"] > 0
    again = rows["looks: itself", "pixels"]  # in one of two parts the very same frames are there
    assert again["n"] == 48 and again["rate"] >= 0.5
    assert rows[PUBLISHED, "pixels"]["n"] == 24 and figure.read_bytes()[:4] == b"\x89PNG"
    assert "looks: itself" in render_table(["small"], tmp_path / "results")
    with pytest.raises(BurnishError, match="parts"):
        list(folds(_few(), np.array(["a"]), 1))


def _few():
    from burnish.data.vectors import FRAME, Vectors

    return Vectors(np.zeros((1, 1, 2)), np.zeros(1, FRAME), {})


def test_the_bench_of_retrieval_runs(capsys):
    from types import SimpleNamespace

    figures = retrieve.run(SimpleNamespace(quick=True))["figures"]
    assert figures.keys() == bench.BENCHES["retrieve"].keys() and figures["recall_equals_brute_force"] is True
