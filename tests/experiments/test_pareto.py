"""`burnish report pareto`: which variants lie on the front, and the figure from a study's result."""

import json

import pytest

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.experiments.plots import front, read_variants, write_intervals


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


def test_intervals_of_a_study_as_png_and_svg(tmp_path):
    loss = {"label": "tuned", "eval": "loss", "n": 2, "mean": 0.3, "interval": None, "by_seed": [0.2, 0.4]}
    rows = [row("plain", 0.5, eval="main"), row("tuned", 0.8, eval="main", verdict="better", letters="b"), loss]
    facts = {"recipe": "r", "command": "c", "commit": "0", "date": "", "seeds": {}, "hardware": "", "minutes": 1.0}
    result = tmp_path / "core.json"
    result.write_text(json.dumps({"rows": rows, "metrics": {}, **facts}))
    assert main(["report", "intervals", str(result), "-o", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    command = ["report", "intervals", str(result), "-o", str(tmp_path / "p.svg"), "--measure"]
    assert main([*command, "loss"]) == 0 == main([*command, "success"])  # an earlier drawing is replaced
    assert "better" in (tmp_path / "p.svg").read_text() or "<svg" in (tmp_path / "p.svg").read_text()
    with pytest.raises(BurnishError, match="no measure 'nothing'; expected one of main, loss"):
        write_intervals(result, tmp_path / "q.png", "nothing")
