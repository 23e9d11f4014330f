"""Result files and pages of others: what a table, a figure or a page is made of, and where it goes."""

import json
import os

import pytest

MARKS = "<!-- results:{} -->\n<!-- /results -->\n"
ROW = {"label": "a", "n": 10, "successes": 5, "rate": 0.5, "interval": [0.2, 0.8]}
RESULT = {"recipe": "r", "command": "c", "commit": "0", "date": "", "seeds": {}, "hardware": "", "minutes": 1.0,
          "rows": [ROW], "metrics": {}}  # fmt: skip
SAID = {"endpoint": "success", "lower": [], "margin": 0.05, "reference": "a", "stopping": 1, "gates": []}
STUDY = {**RESULT, "rows": [{**ROW, "by_seed": [0.5], "outcomes": {"0": "1010101010"}}], "declared": SAID, "gates": []}
RESULTS = {
    "cut": "{", "a list": [1], "null": None, "empty": {}, "no rows": {**RESULT, "rows": None},
    "rows a number": {**RESULT, "rows": 3}, "rows of lists": {**RESULT, "rows": [[1]]},
    "a row lacks": {**RESULT, "rows": [{"label": "a"}]}, "n of text": {**RESULT, "rows": [{**ROW, "n": "10"}]},
    "n 0": {**RESULT, "rows": [{**ROW, "n": 0}]}, "NaN": {**RESULT, "rows": [{**ROW, "rate": float("nan")}]},
    "an interval of one": {**RESULT, "rows": [{**ROW, "interval": [0.1]}]},
    "an interval of text": {**RESULT, "rows": [{**ROW, "interval": "ab"}]},
    "a rate that is not": {**RESULT, "rows": [{**ROW, "rate": 0.9}]},
    "by_seed a number": {**RESULT, "rows": [{**ROW, "by_seed": 3}]},
    "by_seed of text": {**RESULT, "rows": [{**ROW, "by_seed": ["x"]}]},
    "a difference of two": {**RESULT, "rows": [{**ROW, "minus_reference": [1, 2]}]},
    "a difference of text": {**RESULT, "rows": [{**ROW, "minus_reference": "abc"}]},
    "minutes of text": {**RESULT, "minutes": "long"}, "minutes a list": {**RESULT, "minutes": [1]},
    "metrics a list": {**RESULT, "metrics": [1]}, "metrics null": {**RESULT, "metrics": None},
    "accuracy of text": {**RESULT, "metrics": {"q": {"accuracy": {"n": "x", "successes": "y"}}}},
    "accuracy of 0": {**RESULT, "metrics": {"q": {"accuracy": {"n": 0, "successes": 0}}}},
    "accuracy above": {**RESULT, "metrics": {"q": {"accuracy": {"n": 3, "successes": 9}}}},
    "figures a list": {"figures": [1]}, "figures null": {"figures": None}, "figures text": {"figures": "abc"},
    "figures twice": '{"figures": {}, "figures": {}}', "targets a list": {"figures": {"a": 1}, "targets": [1]},
    "detail a list": {"figures": {"a": 1}, "detail": [1]}, "targets of a list": {"figures": {"a": 1}, "targets": "a"},
    "deep": '{"figures": ' + "[" * 500 + "]" * 500 + "}",
    "declared a list": {**STUDY, "declared": [1]}, "declared empty": {**STUDY, "declared": {}},
    "gates null": {**STUDY, "gates": None}, "a gate of text": {**STUDY, "gates": ["x"]},
    "a mean of text": {**STUDY, "rows": [{"label": "a", "n": 1, "mean": "x", "interval": None}]},
    "p of text": {**STUDY, "rows": [{**ROW, "adjusted": "x"}]},
    "margin of text": {**STUDY, "declared": {**SAID, "margin": "x"}},
    "half a character": '{"figures": {"\\ud800": 1}}',
}  # fmt: skip


def write(root, name, content):
    path = root / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("name", RESULTS)
def test_tables_of_results(name, tmp_path, refused, untouched):
    (tmp_path / "README.md").write_text(MARKS.format("x"))
    write(tmp_path, "x", RESULTS[name])
    check = untouched(tmp_path)
    refused(["report", "results", "--root", tmp_path])
    check()


OUTCOMES = {
    "a list": {"rows": [{**ROW, "outcomes": [1]}]}, "of lists": {"rows": [{**ROW, "outcomes": {"0": [1]}}]},
    "of words": {"rows": [{**STUDY["rows"][0], "outcomes": {"0": "yes"}}]},
    "empty": {"rows": [{**ROW, "outcomes": {}}]},
    "a mean of 400 digits": {"rows": [{"by_seed": [10**400]} | ROW | {"outcomes": {"0": "10" * 5}}]},
    "of two lengths": {"rows": [{**STUDY["rows"][0], "outcomes": {"0": "10", "1": "1"}}]},
    "declared a list": {"declared": [1]}, "declared empty": {"declared": {}},
    "a check that is none": {"declared": {**SAID, "gates": [{"check": 3}]}},
    "ranks": {"rows": [{**ROW, "outcomes": {"0": "x: y"}}]}, "counts": {"metrics": {"q": {"outcomes": "11"}}},
}  # fmt: skip


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes_that_are_none(name, tmp_path, refused, untouched):
    (tmp_path / "README.md").write_text("x")
    write(tmp_path, "x", STUDY | OUTCOMES[name])
    check = untouched(tmp_path)
    refused(["report", "results", "--root", tmp_path, "--recompute", "--check"])
    check()


RUNS = {
    "runs a list": {**RESULT, "metrics": {"runs": [1]}}, "a run a number": {**RESULT, "metrics": {"runs": {"a-0": 3}}},
    "a figure of text": {**RESULT, "metrics": {"runs": {"a-0": {"loss": "x"}}}},
    "a figure that is a list": {**RESULT, "metrics": {"runs": {"a-0": {"loss": [1]}}}},
    "metrics a list": {**RESULT, "metrics": [1]},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_tables_of_runs(name, tmp_path, refused):
    (tmp_path / "README.md").write_text(MARKS.format("x runs: loss"))
    write(tmp_path, "x", RUNS[name])
    refused(["report", "results", "--root", tmp_path])


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "~/x", "link"])
def test_a_page_names_no_file_outside(name, tmp_path, refused):
    (tmp_path / "secret.json").write_text(json.dumps(RESULT))
    write(tmp_path, "x", RESULT)
    (tmp_path / "results/link.json").symlink_to(tmp_path / "secret.json")
    (tmp_path / "README.md").write_text(MARKS.format(name))
    refused(["report", "results", "--root", tmp_path])


PAGES = {
    "a pipe": lambda path: os.mkfifo(path), "a folder": lambda path: path.mkdir(),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\xfa"), "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link away": lambda path: (path.parents[2] / "mine.md").write_text(MARKS.format("x"))
    and path.symlink_to(path.parents[2] / "mine.md"),
    "a mark that is open": lambda path: path.write_text("<!-- results:x -->\n"),
    "a link to itself": lambda path: path.symlink_to(path),
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_pages_that_are_none(name, tmp_path, refused):
    root = tmp_path / "checkout"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text("x")
    write(root, "x", RESULT)
    PAGES[name](root / "docs/page.md")
    refused(["report", "results", "--root", root])


def pareto(**changes):
    rows = [{**ROW, "eval": name, "by_seed": [0.5]} for name in ("main", "questions, exact")]
    return {**RESULT, "rows": rows, "metrics": {"runs": {"a-0": {"answer_loss": 1.0}}}} | changes


FIGURES = {
    "rows null": pareto(rows=None), "rows a number": pareto(rows=3), "rows of numbers": pareto(rows=[3]),
    "rows of text": pareto(rows="abc"), "a row without a label": pareto(rows=[{"eval": "main"}]),
    "a label that is a list": pareto(rows=[{**ROW, "label": [1]}]),
    "an eval that is a list": pareto(rows=[{**ROW, "eval": [1]}]),
    "metrics a list": pareto(metrics=[1]), "runs a list": pareto(metrics={"runs": [1]}),
    "a run a number": pareto(metrics={"runs": {"a-0": 3}}),
    "loss of text": pareto(metrics={"runs": {"a-0": {"answer_loss": "x"}}}),
    "no rate": pareto(rows=[{k: v for k, v in row.items() if k != "rate"} for row in pareto()["rows"]]),
    "rate of text": pareto(rows=[{**row, "rate": "x"} for row in pareto()["rows"]]),
    "interval null": pareto(rows=[{**row, "interval": 3} for row in pareto()["rows"]]),
    "no seeds": pareto(rows=[{k: v for k, v in row.items() if k != "by_seed"} for row in pareto()["rows"]]),
    "nothing": {}, "a list": [1], "cut": "{",
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_results(name, tmp_path, refused):
    write(tmp_path, "x", FIGURES[name])
    refused(["report", "pareto", tmp_path / "results/x.json", "-o", tmp_path / "p.png"])
    assert not (tmp_path / "p.png").exists()


def test_a_figure_of_a_whole_result(tmp_path, accepted):
    write(tmp_path, "x", pareto())
    accepted(["report", "pareto", tmp_path / "results/x.json", "-o", tmp_path / "p.png"])


NUMBERS = [1e308, -1e308, 5e-324, 0, -1, 10**18, True, None, "x", [1], float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("step", [0, -5, 10**18, 1e308])
@pytest.mark.parametrize("value", NUMBERS, ids=str)
def test_any_figure_is_drawn_or_left_out(value, step, tmp_path, accepted):
    rows = [{"step": step, "loss": value, "lr": value}, {"step": 1, "loss": 0.5}, {"step": 2, "loss": value, "lr": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accepted(["report", "page", tmp_path], "report.html")


@pytest.mark.parametrize("value", [10**6, 3.5, -1, "x", None, [1]], ids=str)
def test_minutes_and_latency(value, tmp_path, refused, accepted):
    good = value in (10**6, 3.5, -1, None)
    (tmp_path / "run.json").write_text(json.dumps({"name": "x", "stages": [{"name": "a", "minutes": value}]}))
    (accepted if good else refused)(["report", "page", tmp_path])


def test_the_page_of_a_study_is_whole_or_refused(tmp_path, monkeypatch, refused, accepted):
    monkeypatch.chdir(tmp_path)
    for name, content in RESULTS.items():
        write(tmp_path, name, content)
        refused(["report", "page", f"results/{name}.json"])
        assert not (tmp_path / f"{name}.html").exists()
    write(tmp_path, "whole", STUDY)
    accepted(["report", "page", "results/whole.json"], "whole.html")
