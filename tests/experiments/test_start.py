"""From a data set to a recipe that runs: what is proposed, what is refused; `doctor`; what --dry-run tells."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import dataset_fakes as fakes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.core.recipe import load_recipe
from burnish.core.types import Window
from burnish.experiments import doctor
from burnish.experiments import start as starting
from burnish.experiments.start import hold_out, propose
from burnish.train.cost import GB, empty_batch, predicting
from burnish.train.setup import dataset_features

TINY = ["--policy.overrides={chunk_size: 8, n_action_steps: 4, dim_model: 32, n_heads: 2, dim_feedforward: 64,"
        " n_encoder_layers: 1, n_decoder_layers: 1, use_vae: false}"]  # fmt: skip


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A data set of each version, and one with openpi's names."""
    folder = tmp_path_factory.mktemp("start")
    fakes.openpi(fakes.write_v3(folder / "openpi", pictures=True))
    return {"v3": fakes.write_v3(folder / "v3"), "v2": fakes.write_v21(folder / "v2"), "openpi": folder / "openpi"}


@pytest.fixture(autouse=True)
def predicted(monkeypatch):
    """Recipes whose cost was asked for; what is predicted is half a GB a sample. The real one has tests of its own."""
    asked = []
    fake = SimpleNamespace(cost=lambda size: SimpleNamespace(peak=size * GB / 2), work=lambda size: 1e9)
    monkeypatch.setattr(starting, "predicting", lambda recipe, gpu: asked.append(recipe) or nullcontext(fake))
    return asked


def started(root, folder, capsys, *more):
    """What `burnish start --json` says of a data set, and the recipe that it wrote."""
    assert main(["start", str(root), "-o", str(folder / "r.yaml"), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out), load_recipe(folder / "r.yaml")


@pytest.mark.parametrize("kind", ["v3", "v2", "openpi"])
def test_a_data_set_becomes_a_recipe(kind, roots, tmp_path, capsys):
    told, recipe = started(roots[kind], tmp_path, capsys, "--quick")
    assert recipe.name == "r" and recipe.policy.type == "act" and len(recipe.data.held_out) == 1
    assert recipe.train.steps == 1000 and recipe.train.batch_size * recipe.train.grad_accumulation == 8
    assert bool(recipe.data.columns) == (kind == "openpi") and "action" in dataset_features(recipe)[0]
    assert told["bytes"] < told["room"] and told["minutes"] > 0
    assert told["commands"][0] == f"burnish run {tmp_path / 'r.yaml'} --train.steps=20 --output=runs/r-try"
    assert starting.propose(roots[kind], quick=True).values["name"] == kind


def test_nobodys_file_is_written_over(roots, tmp_path, capsys):
    started(roots["v3"], tmp_path, capsys)
    file = tmp_path / "r.yaml"
    changed = file.read_text().replace("# memory", "# mine: memory")  # as when more memory is free by then
    file.write_text(changed)
    started(roots["v3"], tmp_path, capsys)
    assert file.read_text() == changed
    again = file.read_text().replace("steps: 1000", "steps: 1001")
    file.write_text(again)
    assert main(["start", str(roots["v3"]), "-o", str(file)]) == 2
    assert f"try: --output {tmp_path / 'r-2.yaml'}" in capsys.readouterr().err and file.read_text() == again
    assert main(["start", str(roots["v3"]), "-o", str(roots["v3"] / "r.yaml")]) == 2
    assert "would lie in a data set" in capsys.readouterr().err


def test_damaged_episodes_are_left_out(roots, tmp_path, capsys):
    root = shutil.copytree(roots["v2"], tmp_path / "data")
    (root / fakes.VIDEO2).unlink()
    told, recipe = started(root, tmp_path, capsys)
    assert told["left_out"] == [1] and {*recipe.data.episodes, *recipe.data.held_out} == {0, 2}
    assert any(one["kind"] == "error" for one in told["problems"])


def test_a_policy_folder_is_tuned_as_lerobot_would(roots, tiny_smolvla, tmp_path, capsys):
    told, recipe = started(roots["v3"], tmp_path, capsys, "--policy", str(tiny_smolvla), "--gpu", "24")
    assert recipe.policy.path == str(tiny_smolvla) and recipe.train.precision == "bf16" and told["minutes"] is None
    assert recipe.train.max_grad_norm == 10 and recipe.train.batch_size == 32
    assert main(["start", str(roots["v3"]), "--policy", str(tmp_path / "none")]) == 2
    assert "no policy at" in capsys.readouterr().err


def test_a_type_is_trained_from_scratch_or_fetched(roots, tmp_path, capsys):
    _, recipe = started(roots["v3"], tmp_path, capsys, "--policy", "diffusion")
    assert (recipe.policy.type, recipe.policy.path, recipe.policy.overrides) == ("diffusion", "", {})
    (tmp_path / "act").mkdir()
    (tmp_path / "act" / "config.json").write_text('{"type": "act"}')
    remarks = starting.propose(roots["v3"], str(tmp_path / "act"), quick=True).remarks
    assert any(one.startswith("act reads no instruction, and there are") for one in remarks)
    assert main(["start", str(roots["v3"]), "--policy", "pi05"]) == 2
    assert "try: hf download lerobot/pi05_base --local-dir pi05_base" in capsys.readouterr().err


def test_an_earlier_version_is_said_once(roots, tmp_path, capsys):
    assert main(["start", str(roots["v2"]), "-o", str(tmp_path / "r.yaml")]) == 0
    said = capsys.readouterr()
    assert said.out.count("v2.1: burnish reads it as it is") == 1 and "v2.1" not in said.err


def test_what_does_not_fit_is_made_smaller_or_refused(roots, tiny_smolvla, monkeypatch, predicted):
    def with_room(size):
        monkeypatch.setattr(starting, "memory", lambda gpu: (size, False))
        return propose(roots["v3"], str(tiny_smolvla), quick=True)

    train = with_room(1.5 * GB).values["train"]
    assert (train["batch_size"], train["grad_accumulation"]) == (2, 4) and "memory" not in train
    with pytest.raises(BurnishError, match=r"0.5 GB.*--gpu 8"):
        with_room(0.25 * GB)
    assert [one.train.peft.method for one in predicted[1:]] == ["none", "none", "lora"]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_held_out_episodes_are_of_every_instruction(sizes):
    tasks = np.repeat(np.arange(len(sizes)), sizes)
    rows = SimpleNamespace(keys={"task_index": tasks}, span=lambda episode: (episode, episode + 1))
    chosen = hold_out(SimpleNamespace(rows=rows), list(range(len(tasks))))
    assert len(chosen) == min(20, max(2 if len(tasks) > 4 else 1, round(len(tasks) / 10)), len(tasks) - 1)
    shares = np.bincount(tasks[chosen], minlength=len(sizes))
    assert (np.abs(shares - len(chosen) * np.array(sizes) / len(tasks)) < 1.5).all()  # Sainte-Lague may leave the quota
    assert hold_out(SimpleNamespace(rows=rows), list(range(len(tasks)))) == chosen


def test_the_work_of_a_step_grows_with_its_batch(tiny_smolvla, dataset, caplog):
    caplog.set_level("INFO", "burnish")
    recipe = load_recipe(None, [f"--policy.path={tiny_smolvla}", f"--data.root={dataset}"])
    with predicting(recipe) as prediction:
        one, two = (prediction.work(size) for size in (1, 2))
    assert 0 < one < two <= 2 * one and "predicting what a step takes" in caplog.text  # of a large policy, for a minute


def test_a_policy_that_sees_several_moments_is_predicted_with_all_of_them():
    """A diffusion policy sees two; it was refused."""
    views = {"observation.images.front": SimpleNamespace(shape=(3, 48, 64))}
    policy = SimpleNamespace(window=Window((-1, 0)), config=SimpleNamespace(image_features=views), camera_keys=[*views],
                             state_dim=6, action_dim=6, chunk_size=16)  # fmt: skip
    batch = empty_batch(policy, 3)
    assert batch["observation.images.front"].shape == (3, 2, 3, 48, 64) and batch["action"].shape == (3, 16, 6)
    assert batch["observation.state"].shape == (3, 2, 6)


def test_from_start_to_the_page_without_an_edit(roots, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["start", str(roots["v2"]), "--quick"]) == 0
    assert "v2.yaml is written" in capsys.readouterr().out
    words = ["run", "v2.yaml", "--train.steps=2", "--train.batch_size=2", "--output=runs/try", *TINY]
    assert main([*words, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "2 steps" in plan and "offline on 1 held-out" in plan and not (tmp_path / "runs").exists()
    assert main(words) == 0
    assert "action error" in capsys.readouterr().out
    assert "Held-out episodes" in (tmp_path / "runs/try/report.html").read_text()
    offline = ["eval", "runs/try/policy", "--data", str(roots["v2"]), "--output", "again", "--no-video", "--json"]
    assert main(offline) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "again/summary.json").read_text())
    again = said["offline"]
    assert again["episodes"] == 1  # those that the recipe beside the policy held out
    assert (
        again["figures"]
        == json.loads((tmp_path / "runs/try/eval/offline/summary.json").read_text())["offline"]["figures"]
    )


def test_a_dry_study_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("burnish.experiments.plan._training", lambda recipe: ("so much", 2.0, 1e9))
    assert main(["run", "isolate/answers", "--dry-run", "--seeds", "0,1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    variants = sum("2 runs, 0 of them trained, each so much" in line for line in lines)
    assert variants > 2 and f"about {4 * variants} min of training to do, {2 * variants}.0 GB" in lines[-1]
    assert not list(tmp_path.iterdir())


def test_doctor_names_a_remedy_for_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_renders", lambda kind: kind == "osmesa")
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["numpy>=1", "nosuchpackage>=3", "other>=1; extra == 'libero'"]
    )
    monkeypatch.setattr("burnish.policies.lerobot.known_types", lambda: ["act"])
    assert main(["doctor", "--json"]) == 1
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["numpy"]["ok"] and found["python"]["ok"] and found["video"]["ok"]
    assert found["nosuchpackage"]["fix"] == "pip install 'nosuchpackage>=3'"
    assert found["[libero]"]["ok"] is None and found["rendering"]["fix"] == "export MUJOCO_GL=osmesa"
    assert found["lerobot's own"]["ok"] is False and "disk" in found and any(what.startswith("gpu") for what in found)
    assert main(["doctor"]) == 1
    for said, place in (
        ('{"url": "file:///a%20b/checkout", "dir_info": {"editable": true}}', "-e '/a b/checkout'"),
        ('{"url": "file:///dist/burnish-1-py3-none-any.whl", "archive_info": {}}', "/dist/burnish-1-py3-none-any.whl"),
        (None, "burnish"),
    ):
        monkeypatch.setattr(doctor, "distribution", lambda name, said=said: SimpleNamespace(read_text=lambda _: said))
        assert doctor._again() == f"pip install --force-reinstall --no-deps {place}"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("will fail") and all(line.startswith(("ok", "-", "FAILED")) for line in lines[:-1])
