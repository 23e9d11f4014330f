"""The simulations behind docs/evaluate.md, in miniature: they run, and their tables are made of what they write."""

import json

import numpy as np

from burnish.experiments.results import render_table
from workshop.__main__ import main
from workshop.coverage import differences
from workshop.sequential import draw, looked


def test_simulations_write_what_the_page_shows(tmp_path):
    for name, size in (
        ("coverage", ["--tables", "12", "--states", "20"]),
        ("sequential", ["--runs", "10", "--trials", "30"]),
    ):
        assert main([name, *size, "--output", str(tmp_path / f"{name}.json")]) == 0
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert content["commit"] is not None and content["n"] in (12, 10)
        assert f"python -m workshop {name}" in render_table([name], tmp_path)


def test_the_simulated_variants_are_equal_and_spread_as_they_say():
    rng = np.random.default_rng(0)
    means = np.array([differences(rng, 5, 400, 0.06, 0.1).mean(1) for _ in range(200)])
    assert abs(means.mean()) < 0.005
    # Both sides have seeds of their own: sqrt(2) of 6 points, beside the noise of 400 states.
    quiet = np.array([differences(rng, 5, 400, 0.0, 0.1).mean(1) for _ in range(200)])
    assert 0.07 < np.sqrt(means.var() - quiet.var()) < 0.1


def test_looking_often_at_a_test_made_for_one_look_finds_what_is_not_there():
    trials = draw(np.random.default_rng(0), 60, 150, 0.5, 0.5)
    assert np.mean([looked(row) for row in trials]) > 0.1
