"""Rows of a study's result: what counts as success, pairing, gates, verdicts, and all of it again from raw outcomes."""

import json
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.evaluate.records import Record
from burnish.evaluate.stats import wilson
from burnish.experiments.measures import read_measure, read_successes, run_figures, study_rows
from burnish.experiments.recompute import differing, recompute_results, renew
from burnish.experiments.results import _of_shares, outcome_row, render_table, result_row, write_result
from burnish.experiments.variants import START, difference, judge, measure_rows, read_gates

SAID = {
    "endpoint": "success",
    "lower": ["answer_loss"],
    "margin": 0.05,
    "reference": "a",
    "stopping": 2,
    "gates": [],
}
CHECKOUT = Path(__file__).parents[2]
FACTS = {"recipe": "r", "command": "c", "commit": "0" * 40, "date": "d", "seeds": {}, "hardware": "h", "minutes": 1.0}


def table(rng, rate, seeds=(0, 1), n=40):
    return {seed: {i: float(rng.random() < rate) for i in range(n)} for seed in seeds}


def judged(variants, shares=True, **changes):
    rows = measure_rows(variants, shares=shares, **({} if shares else {"eval": "answer_loss"}))
    gates = judge(rows, SAID | changes)
    return {row["label"]: row for row in rows}, gates


def test_success_is_at_what_the_policy_was_told(tmp_path):
    records = [
        Record("lift", 0, 7, True, 9),
        Record("lift", 1, 7, True, 9, variant="instruction_swap", other_success=False),
        Record("lift", 2, 7, False, 9, variant="instruction_swap", other_success=True),
    ]
    (tmp_path / "episodes.jsonl").write_text("".join(record.to_line() + "\n" for record in records))
    assert read_successes(tmp_path) == {("lift", 0): 1.0, ("lift", 1): 0.0, ("lift", 2): 1.0}


def test_differences_pair_seed_and_trial():
    variants = {"a": {0: {1: 1.0, 2: 0.0}, 1: {1: 1.0, 2: 1.0}}, "b": {1: {2: 0.0, 1: 1.0, 3: 1.0}}}
    rows, _ = judged(variants)
    a, b = rows["a"], rows["b"]
    assert (a["n"], a["rate"], a["by_seed"]) == (4, 0.75, [0.5, 1.0]) and "minus_reference" not in a
    # Seed 1 alone is shared, and of it the trials 1 and 2.
    assert b["minus_reference"][0] == pytest.approx(-0.5) and b["n"] == 2 and b["outcomes"] == {"1": "10"}
    low, high = b["minus_reference"][1:]
    assert -1 <= low <= -0.5 <= high <= 1
    with pytest.raises(BurnishError, match="share no trial"):
        measure_rows({"a": {0: {1: 1.0}, 1: {2: 1.0}}})


def test_equal_outcomes_still_have_an_interval():
    """No trial of 20 succeeded, yet 16 % could have gone unseen (Wilson)."""
    never, always = ({seed: dict.fromkeys(range(20), value) for seed in (0, 1)} for value in (0.0, 1.0))
    rows, _ = judged({"a": never, "b": always, "c": never})
    a, b, c = rows.values()
    assert a["interval"] == [0.0, pytest.approx(0.1611, abs=1e-4)]
    assert b["interval"] == [pytest.approx(0.8389, abs=1e-4), 1.0]
    assert c["minus_reference"] == [0.0, pytest.approx(-0.1611, abs=1e-4), pytest.approx(0.1611, abs=1e-4)]
    assert b["minus_reference"][0] == b["minus_reference"][2] == 1.0
    assert [b["verdict"], c["verdict"]] == ["better", "undecided"] and [r["letters"] for r in (a, b, c)] == [
        "a",
        "b",
        "a",
    ]


def test_a_logged_number_is_compared_over_seeds_by_students_test():
    a, b = np.random.default_rng(0).normal(size=(2, 5)).round(3)
    logged = {name: {seed: {0: x} for seed, x in enumerate(some)} for name, some in (("a", a), ("b", b))}
    rows, _ = judged(logged, shares=False, endpoint="answer_loss", margin=None, stopping=5)
    scipy = ttest_1samp(b - a, 0)
    assert rows["b"]["minus_reference"][1:] == pytest.approx([*scipy.confidence_interval()])
    assert rows["b"]["p"] == pytest.approx(scipy.pvalue) and rows["b"]["mean"] == pytest.approx(b.mean())


def test_a_small_loss_is_better_and_the_start_has_one_run():
    rng = np.random.default_rng(1)
    hard = {i: float(rng.exponential()) for i in range(30)}

    def run(shift, seed):
        return {i: x + shift + 0.001 * i * seed for i, x in hard.items()}

    tuned = {name: {seed: run(shift, seed) for seed in (0, 1)} for name, shift in (("a", 0.5), ("b", 0.1))}
    rows, _ = judged({"base": {START: hard}, **tuned}, shares=False, endpoint="answer_loss", margin=0.2)
    assert rows["b"]["verdict"] == "better" and rows["b"]["minus_reference"][0] == pytest.approx(-0.4, abs=1e-3)
    assert rows["a"]["minus_base"][0] == pytest.approx(0.50725, abs=1e-3) and "verdict" not in rows["base"]
    assert rows["base"]["interval"][0] < rows["base"]["mean"] and rows["base"]["by_seed"] == [rows["base"]["mean"]]


@pytest.mark.parametrize(
    "check, passed", [("a >= 0.4", True), ("a >= 0.9", False), ("b - a >= 0.3", True), ("c <= 1", False)]
)
def test_a_failed_gate_makes_every_verdict_void(check, passed):
    rng = np.random.default_rng(2)
    gates = [{"name": "can be seen", "measure": "success", "check": check}]
    rows, found = judged({"a": table(rng, 0.5), "b": table(rng, 0.95)}, gates=gates)
    assert [gate["passed"] for gate in found] == [passed]
    assert rows["b"]["verdict"] == ("better" if passed else "void")


def test_fewer_seeds_than_declared_are_void():
    rng = np.random.default_rng(3)
    rows, (gate,) = judged({"a": table(rng, 0.2), "b": table(rng, 0.9)}, stopping=5)
    assert rows["b"]["verdict"] == "void" and (gate["value"], gate["passed"]) == (2, False)


@pytest.mark.parametrize("seeds", [(0, 1, 2), (1, 2)])
def test_a_variant_with_other_seeds_than_the_rest_makes_every_verdict_void(seeds):
    rng = np.random.default_rng(3)
    variants = {"a": table(rng, 0.2, seeds), "b": table(rng, 0.9), "c": table(rng, 0.9)}
    rows, (gate,) = judged(variants)
    assert rows["b"]["verdict"] == "void" and gate["value"] != 2 and not any("letters" in row for row in rows.values())


def test_a_failed_gate_of_the_reference_is_about_every_comparison_and_no_letters_stand_for_what_is_void():
    rng = np.random.default_rng(6)
    variants = {"a": table(rng, 0.2), "b": table(rng, 0.9), "c": table(rng, 0.9), "d": table(rng, 0.9)}
    gate = {"name": "g", "measure": "success", "check": "a >= 0.99"}
    for of, void in (("a", "bcd"), ("", "bcd"), ("b", "b")):
        rows, _ = judged(variants, gates=[gate | {"of": of}])
        assert [name for name in "bcd" if rows[name]["verdict"] == "void"] == [*void]
        assert [name for name in "abcd" if "letters" in rows[name]] == ([] if void == "bcd" else [*"acd"])


def test_holm_counts_the_endpoint_apart_and_a_verdict_needs_it():
    rng, first = np.random.default_rng(4), {i: float(i < 20) for i in range(40)}
    both = {"a": first, "b": first | dict.fromkeys(range(20, 25), 1.0)}
    variants = {name: {seed: trials for seed in (0, 1)} for name, trials in both.items()}
    variants |= {f"v{i}": table(rng, 0.5) for i in range(8)}
    rows = measure_rows(variants, eval="main")
    rows += measure_rows({"a": table(rng, 0.1), "b": table(rng, 0.9)}, eval="camera")
    judge(rows, SAID)
    main_rows = {row["label"]: row for row in rows if row["eval"] == "main"}
    assert main_rows["b"]["adjusted"] == pytest.approx(9 * main_rows["b"]["p"])
    assert main_rows["b"]["p"] < 0.05 < main_rows["b"]["adjusted"] and main_rows["b"]["verdict"] == "undecided"
    camera = rows[-1]
    assert camera["adjusted"] == camera["p"] and camera["verdict"] == "better" and "letters" not in camera


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"check": "a > 1"}, "such as 'sft >= 0.4'"),
        ({"check": "x >= 1"}, "names 'x'"),
        ({"chek": "a >= 1"}, "unknown"),
        (3, "gate 1"),
    ],
)
def test_gates_that_cannot_be_read(entry, message):
    with pytest.raises(BurnishError, match=message):
        read_gates([entry], ["a", "b"], "study.yaml")


def test_measures_hold_numbers_or_flags(tmp_path):
    file = tmp_path / "m.json"
    kinds = [(0.5, [0.5], False), ([True, False], [1.0, 0.0], True), ([1, 2.5], [1.0, 2.5], False)]
    for values, numbers, shares in kinds:
        file.write_text(json.dumps({"values": values}))
        assert read_measure(file) == (dict(enumerate(numbers)), shares)
    for values in ([], ["x"], [None], [1, True], {"a": 1}):
        file.write_text(json.dumps({"values": values}))
        with pytest.raises(BurnishError, match="holds no measure"):
            read_measure(file)


def test_answers_to_other_questions_make_no_pair(tmp_path):
    runs = {name: {0: tmp_path / name} for name in "ab"}
    for limit, message in ((10, ""), (20, "share no trial")):
        for name in "ab":
            asked = {"root": "q", "limit": 10 if name == "a" else limit}
            found = {"correct": [True, False], "losses": [0.1, 0.3], "loss": 0.2}
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "retention.json").write_text(json.dumps({"asked": asked, "tuned": found}))
            main_eval = tmp_path / name / "eval/main"
            main_eval.mkdir(parents=True, exist_ok=True)
            (main_eval / "episodes.jsonl").write_text(Record("lift", 0, 0, True, 9).to_line())
        with pytest.raises(BurnishError, match=message) if message else nullcontext():
            rows = study_rows(runs, ["success"], [], [], None, True)
    assert {tuple(row["outcomes"].values()) for row in rows if row["eval"] == "answer_loss"} == {("0.1 0.3",)}


def test_a_run_that_was_measured_with_another_commit_names_both(checkout, tmp_path):
    run = tmp_path / "run"
    (run / "eval/main").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"commit": "made", "date": "d"}))
    (run / "eval/main/summary.json").write_text(json.dumps({"overall": {"n": 1}, "commits": ["made", "later"]}))
    found = run_figures(run)
    assert (found["commit"], found["measured_with"]) == ("made", ["later"])
    content = json.loads((checkout / "results/s.json").read_text()) | {"metrics": {"runs": {"a-0": found}}}
    (checkout / "results/s.json").write_text(json.dumps(content))
    assert "commit later, made ·" in render_table(["s"], checkout / "results")


@pytest.fixture
def checkout(tmp_path):
    rng = np.random.default_rng(5)
    rows = measure_rows({name: table(rng, 0.6) for name in "abc"}, eval="main")
    loss = {name: {seed: {i: float(rng.random()) for i in range(9)} for seed in (0, 1)} for name in "abc"}
    rows += measure_rows(loss, shares=False, eval="answer_loss")
    gates = [{"name": "headroom", "measure": "success", "check": "a <= 0.9"}]
    write_result(tmp_path / "results/s.json", rows=rows, declared=SAID | {"gates": gates}, **FACTS)
    counts = {"accuracy": wilson(2, 3).to_dict(), "outcomes": "110"}
    write_result(
        tmp_path / "results/r.json", rows=[outcome_row("x", {"0": [True, False]})], metrics={"q": counts}, **FACTS
    )
    (tmp_path / "README.md").write_text("<!-- results:s -->\n<!-- /results -->\n")
    return tmp_path


def test_every_figure_follows_from_the_outcomes(checkout):
    content = json.loads((checkout / "results/s.json").read_text())
    assert not differing(content, renew(content))
    changes = [
        (("rows", 1, "minus_reference"), [0, -1, 1]), (("rows", 5, "mean"), 0.4), (("rows", 0, "by_seed"), [0, 1]),
        (("gates", 0, "value"), 0.1), (("rows", 2, "verdict"), "better"), (("rows", 1, "adjusted"), 0.01),
    ]  # fmt: skip
    for path, value in changes:
        wrong = deepcopy(content)
        wrong[path[0]][path[1]][path[2]] = value
        assert path[2] in differing(wrong, renew(wrong))
        assert not differing(content, renew(wrong))


def test_command_recomputes_renews_and_tells_what_cannot_be(checkout, capsys):
    old = json.loads((checkout / "results/s.json").read_text())
    old["rows"] = [{k: v for k, v in row.items() if k != "outcomes"} for row in old["rows"]]
    (checkout / "results/old.json").write_text(json.dumps(old))
    command = ["report", "results", "--root", str(checkout), "--recompute"]
    assert (
        main(command) == 0
        and "2 the same" in (told := capsys.readouterr().out)
        and "again, without raw outcomes: old" in told
    )
    right = json.loads((checkout / "results/r.json").read_text())
    few = right | {"rows": [result_row("x", 1, 2)], "metrics": {"q": {"accuracy": wilson(2, 3).to_dict()}}}
    (checkout / "results/few.json").write_text(json.dumps(few))
    assert main([*command, "--check"]) == 0 and "alone, without raw outcomes: few" in capsys.readouterr().out
    few["metrics"]["q"]["accuracy"]["low"] = 0.0
    (checkout / "results/few.json").write_text(json.dumps(few))
    assert main([*command, "--check"]) == 2 and "accuracy.low" in capsys.readouterr().out
    (checkout / "results/few.json").unlink()
    wrong = deepcopy(right)
    wrong["rows"][0] |= {"successes": 2, "rate": 1.0, "interval": [0.9, 1.0]}
    (checkout / "results/r.json").write_text(json.dumps(wrong))
    assert main([*command, "--check"]) == 2 and "its outcomes say" in capsys.readouterr().out
    assert main(command) == 0 and "renewed r" in capsys.readouterr().out
    assert main([*command, "--check"]) == 0


def test_table_says_gates_margin_and_what_could_be_seen(checkout):
    page = render_table(["s"], checkout / "results")
    assert page.startswith("Endpoint success, compared with a, 2 seeds, margin 5 points: settled before the first run.")
    assert "- Gate passed: headroom (`a <= 0.9` in success:" in page
    assert "| minus reference | p (Holm) | detectable | verdict | letters |" in page
    assert "Withdrawn" not in page


def test_a_margin_has_the_unit_of_the_endpoint():
    rows = [{"label": "a", "eval": "main", "rate": 0.5}, {"label": "a", "eval": "answer_loss", "mean": 0.6}]
    for endpoint, share in (("success", True), ("answer_loss", False)):
        assert _of_shares({"declared": {"endpoint": endpoint}, "rows": rows}) is share


def test_a_pair_of_rows_is_compared_whatever_the_reference(checkout):
    rows = json.loads((checkout / "results/s.json").read_text())["rows"]
    one, other = difference(rows[1], rows[2]), difference(rows[2], rows[1])
    assert one.mean == -other.mean and one.low == pytest.approx(-other.high)
    assert difference(rows[1], rows[2] | {"outcomes": {"9": "1" * 40}}) is None


def test_committed_results_follow_from_their_outcomes():
    found = recompute_results(CHECKOUT / "results")
    assert found.changed == {} and {"tabletop/replay", "decode/modes"} <= {*found.same}


@pytest.mark.parametrize(("states", "word"), [(20, "undecided"), (100, "equivalent")])
def test_few_states_do_not_show_that_two_are_equivalent(states, word):
    same = {seed: {i: float(i % 2) for i in range(states)} for seed in (0, 1)}
    turned = {0: same[0], 1: same[1] | {0: 1.0, 1: 0.0}}
    row = judged({"a": same, "b": turned}, margin=0.15)[0]["b"]
    assert row["verdict"] == word and max(map(abs, row["minus_reference"])) < 0.15


def test_seeds_that_change_nothing_count_as_one():
    same = {seed: {i: float(i % 3 > 0) for i in range(60)} for seed in (0, 1)}
    rows, gates = judged({"a": same, "b": {seed: {i: float(i % 3 > 1) for i in range(60)} for seed in (0, 1)}})
    assert rows["b"]["verdict"] == "void" and (gates[-1]["check"], gates[-1]["value"]) == ("seeds = 2", 1)
    varied = {0: same[0], 1: same[1] | {0: 1.0}}
    assert judged({"a": same, "b": varied})[1] == []  # a frozen model answers alike whatever the seed
