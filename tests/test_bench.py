"""The table of a bench: no digits are cut off and none are made up."""

from types import SimpleNamespace

import pytest

import bench


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.7042101556e-05, "1.704e-05"), (2.384185791015625e-07, "2.384e-07"), (0.37, "0.37"), (7.0834, "7.083"),
        (12345.678, "1.235e+04"), (3, "3"), (True, "True"), ("n/a", "n/a"),
    ],
)  # fmt: skip
def test_floats_have_four_digits_that_count(value, text):
    assert bench.show(value) == text


def test_the_table_shows_figures_beside_their_targets(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    outcome = {"figures": {"edit_error": 1.7042101556e-05, "step_ratio_paper": 1.5, "other": 2}}
    monkeypatch.setattr("bench.import_module", lambda name: SimpleNamespace(run=lambda args: outcome))
    assert bench.main(SimpleNamespace(name="isolate", output="", json=False, device="cpu")) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["edit_error", "1.704e-05", "<=", "2e-6"]
    assert lines[1:] == [["step_ratio_paper", "1.5", "<=", "1.8"], ["other", "2"]]
