"""`burnish report pareto`: which variants lie on the front, and the figure from a study's result."""

import json

import pytest

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.experiments.pareto import front, read_variants


def row(label, rate, **more):
    n = 200
    low, high = max(0, rate - 0.1), min(1, rate + 0.1)
    return {"label": label, "n": n, "successes": round(rate * n), "rate": rate, "interval": [low, high],
            "by_seed": [rate, rate], **more}  # fmt: skip


def test_front():
    points = {"a": (0.1, 0.9), "b": (0.5, 0.5), "c": (0.4, 0.4), "d": (0.9, 0.1), "twin": (0.5, 0.5)}
    assert front(points) == ["a", "b", "twin", "d"]


def test_figure_from_a_result(tmp_path, capsys):
    rows = [row("naive", 0.8, eval="main"), row("kept", 0.6, eval="main"), row("naive", 0.3, eval="questions, exact"),
            row("kept", 0.5, eval="questions, exact"), row("lost", 0.5, eval="main")]  # fmt: skip
    runs = {
        f"{name}-{seed}": {"answer_loss": loss} for name, loss in (("naive", 0.9), ("kept", 0.6)) for seed in (0, 1)
    }
    result = tmp_path / "core.json"
    result.write_text(json.dumps({"rows": rows, "metrics": {"runs": runs}}))
    found = read_variants(result)
    assert list(found) == ["naive", "kept"] and found["kept"]["loss"]["rate"] == pytest.approx(0.6)
    assert main(["report", "pareto", str(result), "-o", str(tmp_path / "out" / "p.png")]) == 0
    assert (tmp_path / "out" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["p.png"]
    result.write_text("{}")
    with pytest.raises(BurnishError, match="no variant"):
        read_variants(result)
