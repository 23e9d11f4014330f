"""Steps of a study that variants leave out: what is shared, what is run again, and whether what they do adds up."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from burnish.core.errors import BurnishError
from burnish.evaluate.evaluation import Evaluation
from burnish.evaluate.records import Record
from burnish.evaluate.stats import two_way
from burnish.experiments.plan import plan_study
from burnish.experiments.recompute import differing, renew
from burnish.experiments.results import render_table, write_result
from burnish.experiments.steps import chain, fill, read_steps, step_minutes, take
from burnish.experiments.study import load_study, run_study, variant_recipe
from burnish.experiments.variants import judge, measure_rows

STEPS = {
    "warm": {"run": ["make {before} {to} warm-{seed}"], "otherwise": ["make {before} {to} cold"]},
    "merge": {"run": ["half {before} {to}-half", "make {to}-half {to} merged"]},
    "fast": {"eval": {"sampler": "euler:1"}},
}
VARIANTS = {"full": {}, "no_warm": {"without": ["warm"]}, "no_merge": {"without": ["merge"]},
            "no_fast": {"without": ["fast"]}, "plain": {"without": ["warm", "merge", "fast"]}}  # fmt: skip


class Runner:
    """Stands for the commands: copies the policy, and says what was done to it."""

    def __init__(self, fails: str = ""):
        self.lines, self.fails = [], fails

    def __call__(self, line: str) -> int:
        self.lines.append(line)
        what, before, to, *done = shlex.split(line)
        if self.fails and self.fails in line:
            return 1
        target = Path(to) if what == "half" else Path(to) / "policy"
        shutil.copytree(before, target)
        with (target / "done.txt").open("a") as file:
            file.write(f"{' '.join(done) or what}\n")
        return 0


def test_a_folder_with_a_blank_is_one_word_of_a_command(tmp_path):
    step = {"run": ["make {before} {to} {out}/data --note='a b'"], "otherwise": []}
    (link,), policy = chain({"warm": step}, [], "my base", 0, tmp_path / "my study")
    out = tmp_path / "my study"
    assert shlex.split(link.lines[0]) == ["make", "my base", str(link.to), f"{out}/data", "--note=a b"]
    assert policy == str(out / "steps/0/warm/policy")


def evaluate(settings, policy, env, output, **changes):
    """Stands for an evaluation: the first state alone is solved, and where the sampler is fast none."""
    assert Path(policy).is_dir()
    output.mkdir(parents=True)
    records = [Record("lift", state, 0, state == 0 and not settings.sampler, 9) for state in range(4)]
    (output / "episodes.jsonl").write_text("".join(map(Record.to_line, records)))
    (output / "summary.json").write_text(json.dumps({"overall": {"n": len(records)}}))
    return Evaluation(output, {}, records)


def write(root, **changes):
    study = {"name": "chain", "recipe": "recipe.yaml", "seeds": [0], "reference": "full", "margin": 0.1,
             "steps": STEPS, "variants": VARIANTS} | changes  # fmt: skip
    recipe = {"name": "chain/shared", "policy": {"path": str(root / "base")}, "data": {"root": str(root / "none")},
              "eval": {"env": "tabletop:lift", "episodes": 1, "max_steps": 2, "workers": 1}}  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (root / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return root / "study.yaml"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A study that stopped at a step of its third variant, and went on."""
    root = tmp_path_factory.mktemp("steps")
    (root / "base").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("burnish.experiments.study.evaluate_as", evaluate)
        study, base = load_study(write(root))
        broken, runner = Runner("no_warm.merge merged"), Runner()
        with pytest.raises(BurnishError, match="command failed"):
            run_study(study, base, run_setup=broken)
        run_study(study, base, result=root / "chain.json", run_setup=runner)
    return root, study, base, broken, runner


def test_shared_steps_are_made_once_and_a_stopped_study_goes_on(ran):
    root, _, _, broken, runner = ran
    steps = root / "runs/chain/steps/0"
    names = ("warm", "warm.merge", "no_warm", "no_warm.merge")
    assert {folder.name for folder in steps.iterdir() if (folder / "policy").is_dir()} == set(names)
    assert (steps / "warm.merge/policy/done.txt").read_text() == "warm-0\nhalf\nmerged\n"
    assert (steps / "no_warm.merge/policy/done.txt").read_text() == "cold\nhalf\nmerged\n"
    assert len(broken.lines) == 6 and runner.lines == [broken.lines[-1]]  # two of three commands each, then the rest


def test_a_variant_is_the_policy_at_its_end_measured_as_it_says(ran):
    root, study, base, *_ = ran
    recipes = {name: variant_recipe(study, base, name, 0) for name in VARIANTS}
    ends = {name: recipe.policy.path.rpartition("/steps/0/")[2] for name, recipe in recipes.items()}
    assert ends == {"full": "warm.merge/policy", "no_warm": "no_warm.merge/policy", "no_merge": "warm/policy",
                    "no_fast": "warm.merge/policy", "plain": "no_warm/policy"}  # fmt: skip
    assert {name for name, recipe in recipes.items() if recipe.eval.sampler} == {"full", "no_warm", "no_merge"}
    content = json.loads((root / "chain.json").read_text())
    assert [row["label"] for row in content["rows"]] == list(VARIANTS)
    assert set(content["additive"]) == {"together", "sum", "more_together", "verdict"}
    assert content["metrics"]["runs"]["full-0"]["minutes"] >= 0 and not differing(content, renew(content))
    assert "All steps together change success by" in render_table(["chain"], root)
    assert any("each made by 3 commands" in line for line in plan_study(study, base))


def test_a_finished_study_repeats_nothing(ran, monkeypatch):
    root, study, base, *_ = ran
    monkeypatch.chdir(root)
    monkeypatch.setattr("burnish.experiments.study._train_and_measure", lambda *_: None)
    again = Runner()
    run_study(study, base, run_setup=again)
    assert again.lines == []


def test_a_step_that_other_commands_made_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "base").mkdir()
    after = [{"run": ["make {before} {to} merged"]}, {"run": ["make {before} {to} again"]}]

    def links(first):
        return chain(read_steps({"a": first, "b": after[0]}, {}, "x"), [], str(tmp_path / "base"), 0, tmp_path)[0]

    take(links(after[1]), {}, Runner())
    take(links(after[1]), {}, None)
    with pytest.raises(BurnishError, match="steps/0/a was made by other commands"):
        take(links(after[0]), {}, Runner())
    with pytest.raises(BurnishError, match=r"steps/0/a\.b was made by other commands"):  # its own are the same
        take(links(after[0])[1:], {}, Runner())


def test_places_are_filled_in_and_steps_without_commands_pass_the_policy_on(tmp_path):
    steps = read_steps(STEPS, {}, "here")
    links, end = chain(steps, ["warm", "merge"], "a base", 3, tmp_path)
    assert [link.lines for link in links] == [(f"make 'a base' {tmp_path}/steps/3/no_warm cold",)]
    assert end == f"{tmp_path}/steps/3/no_warm/policy" and step_minutes(links) == 0
    assert chain({}, [], "base", 0, tmp_path) == ([], "base")
    assert fill({"a": ["{seed}{out}", 1]}, 2, Path("o")) == {"a": ["2o", 1]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": {"a": {}}, "variants": {"full": {}}}, "step 'a' does nothing"),
        ({"steps": {"a": {"runs": []}}, "variants": {"full": {}}}, "unknown"),
        ({"steps": {"a": {"run": ["python -c 1"]}}, "variants": {"full": {}}}, "python -m workshop"),
        ({"steps": {"../a": {"run": ["x"]}}, "variants": {"full": {}}}, "a name in steps"),
        ({"steps": {"a" * 90: {"run": ["x"]}, "b" * 99: {"run": ["x"]}, "c" * 9: {"run": ["x"]}},
          "variants": {"full": {}}}, "at most 200"),
        ({"variants": {"full": {"without": ["wram"]}}}, "some of warm, merge, fast"),
        ({"variants": {"full": {"without": "warm"}}}, "some of warm"),
        ({"variants": {"full": {"train": {"lr": 1.0}}}}, "of a study with steps has train"),
        ({"steps": {}, "variants": {"full": {"without": ["a"]}}}, "a study with steps"),
        ({"gates": [{"check": "full >= 0", "of": "nobody"}]}, "names 'nobody'"),
    ],
)  # fmt: skip
def test_wrong_steps_are_refused(tmp_path, changes, message):
    with pytest.raises(BurnishError, match=message):
        load_study(write(tmp_path, **changes))


def table(rng, rate):
    return {seed: {i: float(rng.random() < rate) for i in range(60)} for seed in range(3)}


def said(**changes):
    without = {"full": [], "no_a": ["a"], "no_b": ["b"], "plain": ["b", "a"]}
    return {"endpoint": "success", "lower": [], "margin": 0.05, "reference": "full", "stopping": 3, "gates": [],
            "steps": ["a", "b"], "without": without} | changes  # fmt: skip


def test_what_steps_do_together_is_compared_with_the_sum_of_each(tmp_path):
    rng = np.random.default_rng(0)
    trials = {name: table(rng, rate) for name, rate in (("full", 0.9), ("no_a", 0.5), ("no_b", 0.5), ("plain", 0.4))}
    facts = {"recipe": "r", "command": "c", "commit": "0", "date": "d", "seeds": {}, "hardware": "h", "minutes": 1.0}
    path = write_result(tmp_path / "x.json", rows=measure_rows(trials), declared=said(), **facts)
    found = json.loads(path.read_text())["additive"]
    full, no_a, no_b, plain = (np.array([[run[i] for i in range(60)] for run in trials[name].values()])
                               for name in ("full", "no_a", "no_b", "plain"))  # fmt: skip
    expected = two_way(no_a + no_b - full - plain)
    assert found["more_together"] == pytest.approx([expected.mean, *expected.interval])
    assert found["together"][0] == pytest.approx((full - plain).mean()) and found["verdict"] == "not additive"
    assert found["together"][0] == pytest.approx(found["sum"][0] + found["more_together"][0])
    gates = [{"name": "g", "measure": "success", "check": "plain >= 0.9"}]
    path = write_result(tmp_path / "z.json", rows=measure_rows(trials), declared=said(gates=gates), **facts)
    assert json.loads(path.read_text())["additive"]["verdict"] == "void"
    alone = {name: trials[name] for name in ("full", "no_a", "plain")}
    path = write_result(tmp_path / "y.json", rows=measure_rows(alone), declared=said(), **facts)
    assert "additive" not in json.loads(path.read_text())


def test_a_gate_of_one_variant_voids_that_one_alone():
    rng = np.random.default_rng(1)
    rows = measure_rows({name: table(rng, rate) for name, rate in (("full", 0.9), ("no_a", 0.3), ("no_b", 0.3))})
    gates = judge(rows, said(gates=[{"name": "g", "measure": "success", "check": "full <= 0.1", "of": "no_a"}]))
    assert {row["label"]: row.get("verdict") for row in rows} == {"full": None, "no_a": "void", "no_b": "worse"}
    assert gates[0]["of"] == "no_a" and not gates[0]["passed"]
