"""Paired comparison: known tables, leftovers, identical runs, several seeds, refusals, the command."""

import json

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.evaluate.compare import compare
from burnish.evaluate.sequential import sequential
from burnish.evaluate.stats import mcnemar


def write(path, successes, task="t", first=0, **extra):
    lines = [
        json.dumps({"task": task, "seed": first + i, "success": bool(s), **extra}) for i, s in enumerate(successes)
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_known_table(tmp_path):
    a = write(tmp_path / "a.jsonl", [1] * 10 + [1] * 2 + [0] * 9 + [0] * 4)
    b = write(tmp_path / "b.jsonl", [1] * 10 + [0] * 2 + [1] * 9 + [0] * 4 + [1] * 3)
    found = compare(a, b)
    r = found.overall
    assert (r.n, r.only_a, r.only_b, r.rate_a.successes, r.rate_b.successes) == (25, 2, 9, 12, 19)
    assert r.difference == pytest.approx(7 / 25) and r.low < 7 / 25 < r.high
    assert r.p == pytest.approx(mcnemar(2, 9)) and r.p == pytest.approx(0.0654296875)
    assert [k[1] for k in found.unpaired[1]] == [25, 26, 27] and not found.unpaired[0]
    text = str(found)
    assert "left out, only in B: 3 (t 25, t 26, t 27)" in text and "+28.0 points" in text
    back = compare(b, a).overall
    assert (back.difference, back.p) == (-r.difference, r.p)


def test_few_pairs_are_said_to_be_few_however_many_differ(tmp_path):
    files = [write(tmp_path / str(k), [k] * 3) for k in (0, 1)]
    assert "3 of 3 pairs differ: too few to find any difference with 80 % power" in str(compare(*files))
    assert "0 of 3 pairs differ: too few" in str(compare(files[0], files[0]))


def test_tasks_and_pattern(tmp_path):
    def both(name, first, second):
        one, two = write(tmp_path / "1", first, "x"), write(tmp_path / "2", second, "y")
        (tmp_path / name).write_text(one.read_text() + two.read_text())
        return tmp_path / name

    a, b = both("a", [0, 0, 0, 1], [1, 1]), both("b", [1, 1, 1, 1], [1, 0])
    found = compare(a, b)
    assert [(t, r.only_a, r.only_b) for t, r in found.per_task.items()] == [("x", 0, 3), ("y", 1, 0)]
    assert "only A/B" in str(found)
    assert compare(a, b, task_regex="^y$").overall.n == 2
    with pytest.raises(BurnishError, match="matches 'z'"):
        compare(a, b, task_regex="z")
    with pytest.raises(BurnishError, match="regular expression"):
        compare(a, b, task_regex="(")


def test_identical_runs_are_flagged_by_steps_where_there_are_any(tmp_path):
    a = write(tmp_path / "a", [1, 1, 0], steps=5)
    same = write(tmp_path / "same", [1, 1, 0], steps=5)
    other = write(tmp_path / "other", [1, 1, 0], steps=6)
    silent = write(tmp_path / "silent", [1, 1, 0])
    assert any("identical" in w for w in compare(a, same).warnings)
    assert any("identical" in w for w in compare(a, silent).warnings)
    assert not any("identical" in w for w in compare(a, other).warnings)
    assert any("unseen" in w for w in compare(a, other).warnings)
    assert compare(a, other).overall.p == 1
    assert any("runs 1 and 2 of B" in w for w in compare(a, [other, other]).warnings)
    swaps = [write(tmp_path / f"swap{i}", [1, 0, i], variant="instruction_swap") for i in (0, 1)]
    assert any("a policy that listens has less" in w for w in compare(*swaps).warnings)
    mixed = tmp_path / "mixed"
    mixed.write_text(a.read_text() + write(tmp_path / "x", [1], first=3, weights="w").read_text())
    assert not any("several weights" in w for w in compare(a, mixed).warnings)
    mixed.write_text(mixed.read_text() + write(tmp_path / "x", [1], first=4, weights="v").read_text())
    assert "a run of B holds episodes of several weights" in compare(a, mixed).warnings


def test_several_runs_are_clusters_of_their_initial_state(tmp_path):
    rng = np.random.default_rng(0)
    outcomes = rng.random(60) < 0.5
    better = outcomes | (rng.random(60) < 0.25)
    a = [write(tmp_path / f"a{i}", outcomes) for i in range(4)]
    b = [write(tmp_path / f"b{i}", better) for i in range(4)]
    one, four = compare(a[0], b[0]).overall, compare(a, b).overall
    assert four.difference == pytest.approx(one.difference) and four.n == 60
    # Copies of a run add nothing: interval and p-value are those of the single one, by Student's test over states.
    student = ttest_1samp(better.astype(float) - outcomes, 0)
    assert (four.low, four.high) == pytest.approx(tuple(student.confidence_interval()))
    assert four.p == pytest.approx(student.pvalue) and four.test.startswith("two-way")
    three = compare(a[:3], b).overall  # not paired run by run: states are clusters
    assert (three.low, three.high, three.p) == pytest.approx((four.low, four.high, four.p))
    assert four.rate_a.n == 240 and four.rate_a.high - four.rate_a.low > 0.2


def test_seeds_in_one_file_are_runs_and_duplicates_are_refused(tmp_path):
    def lines(rows):
        return "".join(
            json.dumps({"task": "t", "initial_state": i, "seed": s, "success": v}) + "\n" for i, s, v in rows
        )

    (tmp_path / "two").write_text(lines([(0, 0, 1), (1, 0, 0), (0, 1, 1), (1, 1, 1)]))
    (tmp_path / "one").write_text(lines([(0, 7, 0), (1, 7, 0)]))
    found = compare(tmp_path / "one", tmp_path / "two")
    assert found.runs == (1, 2) and found.overall.difference == pytest.approx(0.75)
    (tmp_path / "twice").write_text(lines([(0, 0, 1), (0, 0, 1)]))
    with pytest.raises(BurnishError, match="initial state 0 more than once"):
        compare(tmp_path / "twice", tmp_path / "one")
    with pytest.raises(BurnishError, match="has a partner"):
        compare(write(tmp_path / "x", [1]), write(tmp_path / "y", [1], first=5))


def test_command(tmp_path, capsys):
    a, b = write(tmp_path / "a", [0, 1, 0, 0]), write(tmp_path / "b", [1, 1, 1, 0])
    assert main(["compare", str(a), str(b), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["overall"]["only_b"] == 2 and content["test"] == "exact McNemar test"
    assert main(["compare", str(a), str(b), "--sequential", "--margin", "0.1", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["sequential"]["n"] == 4 and content["verdict"] == "undecided" and content["margin"] == 0.1
    assert main(["compare", str(a), str(b), "--sequential", "--b", str(b)]) == 2
    assert "one run of each" in capsys.readouterr().err
    assert main(["compare", str(a), str(b), "--b", str(b)]) == 0
    assert "WARNING: runs 1 and 2 of B" in capsys.readouterr().out
    assert main(["compare", str(a), str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("runs", [1, 2])
def test_a_word_needs_enough_pairs(tmp_path, runs):
    def verdict(first, second):
        sides = [[write(tmp_path / f"{name}{i}", some) for i in range(runs)] for name, some in
                 (("a", first), ("b", second))]  # fmt: skip
        return compare(*sides, margin=0.05)

    few = verdict([0, 0, 0], [1, 1, 1])
    assert few.verdict == "undecided" and few.overall.low < 0.5 < few.overall.high == 1
    assert verdict([0] * 9, [1] * 9).verdict == "better"
    same = verdict([1] * 5, [1] * 5)
    assert same.verdict == "undecided" and same.overall.high == -same.overall.low > 0.3
    assert same.overall.rate_a.low < 0.7 and same.overall.rate_a.high == 1
    assert verdict([1] * 90, [1] * 90).verdict == "equivalent"
    nearly = verdict([1] * 60, [1] * 59 + [0])  # 60 that never differ would not show it, so these do not
    assert nearly.overall.low > -0.051 and nearly.verdict == "undecided"


def test_episodes_are_looked_at_in_an_order_that_knows_no_outcome(tmp_path):
    """The journal of an evaluation has those first that ended first, which solved ones do."""
    rng = np.random.default_rng(0)
    for name in "ab":
        rows = [{"task": "t", "initial_state": i, "success": bool(s)} for i, s in enumerate(rng.random(60) < 0.5)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text("{}")
        lines = (json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: not row["success"]))
        (tmp_path / name / "episodes.jsonl").write_text("".join(lines))
    found = compare(tmp_path / "a", tmp_path / "b", sequential=True)
    assert found.sequential.decided is None and sum("has not ended" in word for word in found.warnings) == 2
    assert compare(tmp_path / "a/episodes.jsonl", tmp_path / "b", sequential=True).sequential == found.sequential
    files = [(tmp_path / name / "episodes.jsonl").rename(tmp_path / f"{name}.jsonl") for name in "ab"]
    assert compare(*files, sequential=True).sequential != found.sequential  # lines that somebody wrote count in order


def test_a_trial_that_is_made_up_for_comes_last(tmp_path):
    """So that a later look goes on from the earlier one."""
    rng = np.random.default_rng(1)
    a, b = (rng.random((2, 30)) < 0.5).astype(int)
    write(tmp_path / "a", a)
    late = [(i, s) for i, s in enumerate(b) if i != 3]
    rows = [json.dumps({"task": "t", "seed": i, "success": int(s)}) + "\n" for i, s in [*late, (3, b[3])]]
    (tmp_path / "b").write_text("".join(rows))
    order = [*(i for i, _ in late), 3]
    found = compare(tmp_path / "a", tmp_path / "b", sequential=True).sequential
    assert found == sequential((b - a)[order].astype(float)) != sequential((b - a).astype(float))
