"""`python -m bench train` runs and gives its figures; the numbers themselves are for a quiet machine."""

import argparse
import math

import pytest

from bench import train as bench


def test_quick_run_gives_the_figures(monkeypatch):
    monkeypatch.setattr(bench, "BATCH", 2)
    monkeypatch.setattr(bench, "BLOCK", 1)
    outcome = bench.run(argparse.Namespace(quick=True))
    assert outcome["name"] == "train" and outcome["n"] == 4
    assert set(outcome["figures"]) == {"data_wait_share", "loop_overhead"}
    assert 0 <= outcome["figures"]["data_wait_share"] <= 1 and math.isfinite(outcome["figures"]["loop_overhead"])
    detail = outcome["detail"]
    assert detail["our_step_seconds"] / detail["bare_step_seconds"] == pytest.approx(
        1 + outcome["figures"]["loop_overhead"], rel=3
    )
