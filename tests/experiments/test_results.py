"""Result files and the tables made of them."""

import json
from pathlib import Path

import pytest

from burnish import BurnishError
from burnish.cli.main import main
from burnish.experiments.pages import update_pages
from burnish.experiments.results import fill, result_row, write_result

CHECKOUT = Path(__file__).parents[2]


def example(path: Path, **changes) -> Path:
    rows = [result_row("tuned", 83, 100, latency_ms=41.25), result_row("base", 0, 100)]
    fields = {
        "recipe": "recipes/tabletop/quickstart.yaml", "command": "make quickstart", "rows": rows, "commit": "ab" * 20,
        "date": "2026-11-21", "seeds": {"train": 0}, "hardware": "2 CPU cores", "minutes": 17.04,
    }  # fmt: skip
    return write_result(path, **fields | changes)


@pytest.fixture
def checkout(tmp_path) -> Path:
    example(tmp_path / "results/tabletop/quickstart.json")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# x\n\n<!-- results:tabletop/quickstart -->\nold\n<!-- /results -->\n\nend\n")
    (tmp_path / "docs/a.md").write_text("<!-- results:absent -->\n<!-- /results -->\n")
    return tmp_path


def test_rates_carry_wilson_intervals():
    row = result_row("x", 10, 20)
    # Wilson interval of 10 of 20 at 95 %, e.g. from Newcombe 1998's formula: 0.299 to 0.701.
    assert row["rate"] == 0.5
    assert row["interval"] == pytest.approx([0.2993, 0.7007], abs=1e-4)


def test_tables_are_filled_once_and_then_agree(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    assert main(["report", "results", "--check"]) == 2
    assert main(["report", "results"]) == 0
    assert main(["report", "results", "--check"]) == 0
    readme = (checkout / "README.md").read_text()
    assert "| tuned | 100 | 83.0 % | 74.5 to 89.1 % | 41.2 |" in readme
    assert "| base | 100 | 0.0 % | 0.0 to 3.7 % |  |" in readme
    assert "`make quickstart` · commit ababababab · 2 CPU cores · 17 minutes · 2026-11-21 · seeds train 0" in readme
    assert readme.startswith("# x\n") and readme.endswith("\nend\n") and "old" not in readme
    assert "Not measured yet" in (checkout / "docs/a.md").read_text()


def test_a_number_typed_by_hand_is_noticed(checkout, capsys):
    update_pages(checkout)
    page = checkout / "README.md"
    page.write_text(page.read_text().replace("83.0 %", "93.0 %"))
    assert main(["report", "results", "--check", "--root", str(checkout)]) == 2
    assert "README.md" in capsys.readouterr().err


def test_several_recipes_share_a_table(checkout):
    example(checkout / "results/b.json", rows=[result_row("tuned", 1, 2)])
    out = fill("<!-- results:tabletop/quickstart b -->\n<!-- /results -->", checkout / "results", "x")
    assert "| recipe |" in out and "| b | tuned | 2 | 50.0 % |" in out


def test_bench_table(checkout):
    bench = {"name": "train", "device": "2 CPU cores", "n": 5, "figures": {"data_wait_share": 0.031, "exact": True}}
    bench["detail"] = {"targets": {"data_wait_share": "at most 5 %"}}
    (checkout / "results/bench_train.json").write_text(json.dumps(bench))
    out = fill("<!-- results:bench_train -->\n<!-- /results -->", checkout / "results", "x")
    assert "| `data_wait_share` | 3.1 % | at most 5 % |" in out
    assert "| `exact` | yes |  |" in out and "`python -m bench train --json`" in out


def test_a_missed_target_is_not_rounded_into_a_met_one(checkout):
    bench = {"name": "train", "device": "x", "figures": {"ratio": 1.0537, "other": 1.0437}}
    bench["targets"] = {"ratio": "<= 1.05", "other": "<= 1.05"}
    (checkout / "results/bench_train.json").write_text(json.dumps(bench))
    out = fill("<!-- results:bench_train -->\n<!-- /results -->", checkout / "results", "x")
    assert "| `ratio` | 1.054 | <= 1.05 |" in out and "| `other` | 1.04 | <= 1.05 |" in out


def test_rates_among_the_metrics_become_rows(checkout):
    metrics = {"question_accuracy_base": {"loss": 0.4, "accuracy": {"n": 10, "successes": 9}}, "minutes": 3.0}
    example(checkout / "results/m.json", metrics=metrics)
    out = fill("<!-- results:m -->\n<!-- /results -->", checkout / "results", "x")
    assert "| question accuracy base | 10 | 90.0 % | 59.6 to 98.2 % |" in out and "minutes |" not in out


def test_means_of_what_the_runs_logged(checkout):
    runs = {"plain-0": {"loss": 0.5, "pinned": 1}, "plain-1": {"loss": 1.0}, "with-a-dash-0": {"loss": 2.0}}
    example(checkout / "results/study.json", metrics={"runs": runs})
    out = fill("<!-- results:study runs: loss pinned -->\n<!-- /results -->", checkout / "results", "x")
    assert "|  | seeds | loss | pinned |" in out and "`make quickstart`" in out
    assert "| plain | 2 | 0.75 | 1 |" in out and "| with-a-dash | 1 | 2 |  |" in out
    assert "Not measured yet" in fill("<!-- results:no runs: a -->\n<!-- /results -->", checkout / "results", "x")


def test_marker_that_is_not_closed(checkout):
    with pytest.raises(BurnishError, match="not closed"):
        fill("<!-- results:b -->\n| a |\n", checkout / "results", "page.md")


@pytest.mark.parametrize("change", [{"rate": 0.9}, {"interval": [0.9, 1.0]}, {"n": 0}])
def test_rows_that_contradict_themselves_are_refused(tmp_path, change):
    with pytest.raises(BurnishError, match="contradicts"):
        example(tmp_path / "r.json", rows=[result_row("tuned", 8, 10) | change])
    assert not list(tmp_path.iterdir())


def test_incomplete_result_is_named(checkout):
    (checkout / "results/tabletop/quickstart.json").write_text('{"recipe": "x"}')
    with pytest.raises(BurnishError, match=r"quickstart\.json lacks command"):
        update_pages(checkout)


def test_checkout_tables_agree_with_results():
    assert update_pages(CHECKOUT, check=True) == []
