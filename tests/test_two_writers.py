"""Two processes and one output: one works, the other says so and touches nothing."""

import json
import os
import signal
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import fake
import pytest
import yaml

from burnish.cli.main import main
from burnish.core import outputs
from burnish.core.recipe import recipe_to_dict
from burnish.train import loop

sys.path += [str(Path(__file__).parent / name) for name in ("evaluate", "weights")]


class Stop(Exception):
    """Ends the first process after the second was refused, where its work takes long."""


def other_process(words: list[str], said: Path) -> tuple[int, str]:
    """Exit status and last line of the same command elsewhere: in a fork that has forgotten what this process holds."""
    child = os.fork()
    if not child:
        signal.alarm(60)
        with open(said, "w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            outputs._held.clear()
            status = 99
            try:
                status = main([str(word) for word in words])
            finally:
                file.flush()
                os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, said.read_text().strip().split("\n")[-1]


@pytest.fixture
def raced(tmp_path, monkeypatch):
    """`raced(words, where, name)`: runs a command; as it calls `where.name` first, the same one starts elsewhere."""
    said, refused = tmp_path / "said.txt", []

    def race(words: list[str], where: object, name: str, *, stop: bool = False) -> int:
        plain = getattr(where, name)

        def midst(*given, **named):
            if not refused:
                refused.append(other_process(words, said))
            if stop:
                raise Stop
            return plain(*given, **named)

        monkeypatch.setattr(where, name, midst)
        status = main([str(word) for word in [*words, "--debug"]])
        ((other, line),) = refused
        assert other == 2 and "another process is writing" in line, line
        return status

    return race


@pytest.fixture
def recipe_file(dataset, tmp_path, monkeypatch):
    fake.register(monkeypatch.setattr)
    path = tmp_path / "recipe.yaml"
    values = recipe_to_dict(fake.recipe(dataset, tmp_path / "run"))
    values["eval"]["instruction_swap"] = False
    path.write_text(yaml.safe_dump(values))
    return path


def test_train(recipe_file, tmp_path, raced):
    assert raced(["train", "--config", recipe_file, "--quiet"], loop, "train_step") == 0
    assert main(["train", "--config", str(recipe_file), f"--output={tmp_path / 'alone'}", "--quiet"]) == 0
    fake.assert_same_weights(tmp_path / "run", tmp_path / "alone")
    assert fake.figures(tmp_path / "run/metrics.jsonl") == fake.figures(tmp_path / "alone/metrics.jsonl")


def test_a_run_keeps_its_folder_from_its_first_stage_to_its_last(recipe_file, tmp_path, raced):
    from burnish.experiments import pipeline

    assert raced(["run", recipe_file], pipeline, "_measure") == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["stages"][-1]["name"] == "report"


def test_study(recipe_file, dataset, tmp_path, monkeypatch, raced):
    from burnish.experiments import study

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "evaluate_as", lambda *given, **named: SimpleNamespace(overall="0 of 0"))
    content = {
        "name": "two",
        "recipe": "recipe.yaml",
        "seeds": [0, 1],
        "variants": {"plain": {"eval": {"env": "tabletop:reach"}}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    assert raced(["run", "study.yaml"], study, "_train_and_measure") == 0
    assert sorted(path.parent.name for path in (tmp_path / "runs/two").glob("*/policy")) == ["plain-0", "plain-1"]
    with outputs.claim(tmp_path / "runs/two/plain-0", "training run"):  # here is at seed 0, another may take seed 1
        assert other_process(["run", "study.yaml", "--seeds", "1"], tmp_path / "said.txt")[0] == 0
        assert other_process(["run", "study.yaml", "--seeds", "0"], tmp_path / "said.txt")[0] == 2


@pytest.mark.parametrize(
    ("words", "where", "name"),
    [
        (["data", "demos", "tabletop:reach", 1], "burnish.data.demos", "_record_all"),
        (["data", "questions", "tabletop:reach", 2], "burnish.data.questions", "_ask_about_all"),
    ],
)
def test_what_is_made_for_a_new_folder(words, where, name, tmp_path, raced):
    module = __import__(where, fromlist=["_"])
    assert raced([*words, tmp_path / "made"], module, name, stop=True) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said.txt"]


def test_pairs(tmp_path, monkeypatch, raced):
    import pair_fakes

    from burnish.evaluate import pairs

    pair_fakes.register()
    monkeypatch.setattr(pairs, "policy_and_hash", lambda policy, device: (pair_fakes.make_policy(), "hash"))
    monkeypatch.setattr(pairs, "SimulatorPool", FakePool)
    words = ["data", "pairs", "p", "walk:far", "--root", tmp_path / "made", "--states", 2]
    assert raced(words, pairs, "_collect_task", stop=True) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said.txt"]


class FakePool:
    unable: typing.ClassVar = {}

    def __init__(self, *_): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def describe(self, tasks, *_):
        return [SimpleNamespace(task_id=t, num_initial_states=None, cameras=("front",), max_steps=5) for t in tasks]


def test_evaluation(tmp_path, monkeypatch, raced):
    from burnish.evaluate import rollout

    monkeypatch.setattr(rollout, "SimulatorPool", FakePool)
    words = ["eval", "expert", "tabletop:reach", "--episodes", 1, "--workers", 1, "--output", tmp_path / "out"]
    assert raced(words, rollout._Job, "fill", stop=True) == 3
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".burnish.json", "episodes.jsonl", "settings.json"]


def test_merge(tmp_path, raced):
    from weight_files import FolderMaker

    from burnish.weights import merge

    make = FolderMaker(tmp_path)
    base, tuned = make("base", 0), make("tuned", 1, of="base")
    words = ["weights", "merge", base, "--tuned", f"{tuned}=1.0", "-o", tmp_path / "out"]
    assert raced(words, merge, "write_tensors") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "said.txt", "tuned"]


def test_a_setup_of_two_studies_is_done_by_one_of_them(tmp_path):
    """What a study's commands make lies in its folder, which is shared; each output there is claimed by itself."""
    outputs.share(tmp_path / "study", "study")
    outputs.share(tmp_path / "study", "study")
    with outputs.claim(tmp_path / "study/weights-0", "training run"):
        outputs.share(tmp_path / "study", "study")
