"""`burnish pareto`: which arms lie on the front, and the picture from a study's result."""

import json

import pytest

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.experiments.pareto import front, read_arms


def row(label, rate, **more):
    n = 200
    low, high = max(0, rate - 0.1), min(1, rate + 0.1)
    return {"label": label, "n": n, "successes": round(rate * n), "rate": rate, "interval": [low, high],
            "by_seed": [rate, rate], **more}  # fmt: skip


def test_front():
    points = {"a": (0.1, 0.9), "b": (0.5, 0.5), "c": (0.4, 0.4), "d": (0.9, 0.1), "twin": (0.5, 0.5)}
    assert front(points) == ["a", "b", "twin", "d"]


def test_picture_from_a_result(tmp_path, capsys):
    rows = [row("naive", 0.8, eval="main"), row("kept", 0.6, eval="main"), row("naive", 0.3, eval="questions, exact"),
            row("kept", 0.5, eval="questions, exact"), row("lost", 0.5, eval="main")]  # fmt: skip
    runs = {f"{arm}-{seed}": {"answer_loss": loss} for arm, loss in (("naive", 0.9), ("kept", 0.6)) for seed in (0, 1)}
    result = tmp_path / "core.json"
    result.write_text(json.dumps({"rows": rows, "metrics": {"runs": runs}}))
    arms = read_arms(result)
    assert list(arms) == ["naive", "kept"] and arms["kept"]["loss"]["rate"] == pytest.approx(0.6)
    assert main(["pareto", str(result), "-o", str(tmp_path / "out" / "p.png")]) == 0
    assert (tmp_path / "out" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["p.png"]
    result.write_text("{}")
    with pytest.raises(BurnishError, match="no arm"):
        read_arms(result)
