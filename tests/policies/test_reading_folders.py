"""What a policy folder may be: sharded, of LeRobot's other layouts, renamed, linked; and how it is written."""

import json
import logging
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from safetensors.torch import load_file, save_file

from burnish.core.errors import BurnishError
from burnish.core.provenance import weights_hash
from burnish.policies import load_policy
from burnish.policies.load import resolve
from workshop.tiny import default_statistics, make_tiny

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"


@pytest.fixture
def copied(tiny_smolvla, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_smolvla, tmp_path / "policy"))


def acted(policy, batch):
    return policy.act(batch, policy.draw(3, torch.Generator().manual_seed(0))).actions


def remedy(error: pytest.ExceptionInfo) -> str:
    return str(error.value).split("; try: ")[1]


def cameras(*names, edge=32):
    return {
        **{f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, edge, edge)) for name in names},
        "observation.state": PolicyFeature(FeatureType.STATE, (7,)), "action": PolicyFeature(FeatureType.ACTION, (7,)),
    }  # fmt: skip


def test_shards_are_the_same_policy(copied, tiny_smolvla, batch):
    state = load_file(copied / "model.safetensors")
    names = sorted(state)
    index = {}
    for number, own in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in own}, copied / file)
        index |= dict.fromkeys(own, file)
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert acted(load_policy(copied), batch).equal(acted(load_policy(tiny_smolvla), batch))


def test_statistics_among_the_weights_are_used(copied, tiny_smolvla, batch, caplog):
    """LeRobot's layout before it had processors."""
    stored = load_file(next(copied.glob("policy_preprocessor_step_*")))
    state = load_file(copied / "model.safetensors")
    for figure in ("mean", "std"):
        state[f"normalize_inputs.buffer_observation_state.{figure}"] = stored[f"observation.state.{figure}"]
        for module in ("normalize_targets", "unnormalize_outputs"):
            state[f"{module}.buffer_action.{figure}"] = stored[f"action.{figure}"].clone()
    save_file(state, copied / "model.safetensors")
    for file in copied.glob("policy_p*"):
        file.unlink()
    assert acted(load_policy(copied), batch).equal(acted(load_policy(tiny_smolvla), batch))
    assert "earlier layout" in caplog.text
    other = default_statistics(7, 7)
    other["action"]["mean"] = other["action"]["mean"] + 100
    moved = load_policy(copied, dataset_stats=other)
    assert (acted(moved, batch) - acted(load_policy(tiny_smolvla), batch)).mean() > 50
    state["unnormalize_outputs.buffer_action.mean"] = torch.full((7,), torch.inf)  # as it was before training
    save_file(state, copied / "model.safetensors")
    with pytest.raises(BurnishError, match="mean and std of action in .*model.safetensors are not all finite"):
        load_policy(copied)


def rename(folder: Path, names: dict) -> None:
    content = json.loads((folder / PRE).read_text())
    content["steps"][0]["config"]["rename_map"] = names
    (folder / PRE).write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["smolvla", "pi0", "burnish_discrete"])
def test_new_cameras_end_an_old_rename_map(kind, tmp_path):
    """As lerobot-train --rename_map stores it: the map would take a camera that is now declared away."""
    folder = make_tiny(kind, tmp_path / "policy", cameras=("camera1",))
    rename(folder, {"observation.images.front": "observation.images.camera1"})
    assert load_policy(folder).cameras == ("camera1",)
    policy = load_policy(folder, features=cameras("front", "wrist"), dataset_stats=default_statistics(7, 7))
    batch = {
        "observation.images.front": torch.rand(1, 3, 32, 32), "observation.images.wrist": torch.rand(1, 3, 32, 32),
        "observation.state": torch.randn(1, 7), "action": torch.randn(1, 8, 7), "task": ["open"],
    }  # fmt: skip
    draws = policy.draw(1, torch.Generator().manual_seed(0))
    for name in policy.cameras:
        black = {**batch, f"observation.images.{name}": torch.zeros(1, 3, 32, 32)}
        assert not policy.loss(batch, draws).total.equal(policy.loss(black, draws).total), name
    policy.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / PRE).read_text())["steps"][0]["config"]["rename_map"] == {}


def test_links_of_the_hub_cache_are_followed(tiny_smolvla, tmp_path, batch):
    """models--owner--name/snapshots/<commit> holds links to ../../blobs."""
    home = tmp_path / "models--owner--name"
    (home / "blobs").mkdir(parents=True)
    folder = Path(shutil.copytree(tiny_smolvla, home / "snapshots/0123"))
    for number, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        shutil.move(file, home / f"blobs/{number}")
        up = "../" * (len(file.relative_to(home).parts) - 1)
        file.symlink_to(f"{up}blobs/{number}")
    assert acted(load_policy(folder), batch).equal(acted(load_policy(tiny_smolvla), batch))
    assert len(weights_hash(folder)) == 16


def test_a_folder_without_its_vlm_says_what_to_copy(copied, tiny_smolvla, batch):
    """As lerobot-train leaves it: the path of the files in config.json, and not the files."""
    shutil.move(copied / "vlm", copied.parent / "some vlm")
    for name in ("config.json", PRE):
        text = (copied / name).read_text().replace(str(tiny_smolvla / "vlm"), str(copied.parent / "some vlm"))
        (copied / name).write_text(text)
    with pytest.raises(BurnishError, match="no vlm/ in .*nothing outside the folder is read") as error:
        load_policy(copied)
    subprocess.run(shlex.split(remedy(error)), check=True)
    assert acted(load_policy(copied), batch).equal(acted(load_policy(tiny_smolvla), batch))


def test_the_next_lerobot_stores_the_tokenizer_beside(tiny_pi0, tmp_path, batch):
    """Its pipelines name a folder of their own as an artifact."""
    folder = Path(shutil.copytree(tiny_pi0, tmp_path / "policy"))
    shutil.move(folder / "tokenizer", folder / "words")
    content = json.loads((folder / PRE).read_text())
    entry = next(step for step in content["steps"] if step["registry_name"] == "tokenizer_processor")
    entry |= {"artifacts": {"tokenizer_name": "words"}}
    entry["config"]["tokenizer_name"] = "words"
    (folder / PRE).write_text(json.dumps(content))
    assert acted(load_policy(folder), batch).equal(acted(load_policy(tiny_pi0), batch))
    shutil.rmtree(folder / "words")
    with pytest.raises(BurnishError, match="no words/ in"):
        load_policy(folder)


def test_constant_statistics_are_told(copied, caplog):
    file = next(copied.glob("policy_preprocessor_step_*"))
    state = load_file(file)
    state["observation.state.std"][2] = 0
    save_file(state, file)
    with caplog.at_level(logging.WARNING, "burnish"):
        load_policy(copied)
    assert "mean and std of observation.state do not spread in dimension 2" in caplog.text


def test_missing_quantiles_name_the_data_set(tiny_pi05, tmp_path, monkeypatch):
    stats = {key: {"mean": value["mean"], "std": value["std"]} for key, value in default_statistics(7, 7).items()}
    with pytest.raises(
        BurnishError, match=r"no statistic 'q01' of observation.state in .*data/meta/stats.json"
    ) as error:
        load_policy(tiny_pi05, dataset_stats=stats, stats_source=f"{tmp_path}/data/meta/stats.json")
    words = shlex.split(remedy(error))
    assert words[:3] == ["python", "-m", "lerobot.scripts.augment_dataset_quantile_stats"]
    assert words[words.index("--root") + 1] == f"{tmp_path}/data"
    monkeypatch.setattr(sys, "argv", [words[2], "--help"])
    with pytest.raises(SystemExit, match="^[01]$"):
        runpy.run_module(words[2], run_name="__main__")


def test_an_adapter_says_how_it_becomes_a_policy(tiny_smolvla, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for base, said in (("some base", "burnish weights merge 'some base' --tuned"), ("owner/base", "hf download owner"),
                       (None, "burnish weights merge BASE --tuned")):  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(BurnishError, match="is a peft adapter without its base") as error:
            load_policy(folder)
        assert said in remedy(error)
        shutil.copy(tiny_smolvla / "config.json", folder)


def test_a_base_by_the_last_word_of_its_name_says_how_it_is_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BurnishError, match="no policy at smolvla_base") as error:
        resolve("smolvla_base")
    assert remedy(error) == "hf download lerobot/smolvla_base --local-dir smolvla_base"
    with pytest.raises(BurnishError, match="no policy at mine") as error:
        resolve("mine")
    assert "; try: " not in str(error.value)


@pytest.mark.parametrize("below", ["policy", "checkpoints/000100/pretrained_model", "pretrained_model"])
def test_a_folder_above_names_the_policy_below(below, tmp_path, copied):
    shutil.copytree(copied, tmp_path / "run" / below)
    with pytest.raises(BurnishError, match="it has no config.json") as error:
        resolve(tmp_path / "run")
    assert remedy(error) == str(tmp_path / "run" / below)


def test_home_is_expanded(copied, monkeypatch):
    monkeypatch.setenv("HOME", str(copied.parent))
    assert resolve("~/policy") == copied


def test_files_are_readable_like_their_neighbours(policy, tmp_path):
    policy.save(tmp_path / "saved")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "saved").glob("*.*")}
    assert len(set(modes.values())) == 1, modes


def test_what_is_given_is_written_and_never_the_live_weights(policy, tmp_path, monkeypatch):
    """LeRobot's later writers take the live weights whatever they are given."""
    doubled = {name: 2 * value for name, value in policy.policy.state_dict().items()}
    monkeypatch.setattr(type(policy.policy), "save_pretrained", None)
    monkeypatch.setattr(type(policy.policy), "_save_pretrained", None)
    policy.save(tmp_path / "saved", state_dict=doubled)
    stored = load_file(tmp_path / "saved/model.safetensors")
    assert all(value.equal(doubled[name]) for name, value in stored.items())
    name = next(iter(doubled))
    doubled[name] = doubled[name] * torch.nan
    with pytest.raises(BurnishError, match="hold NaN or infinity"):
        policy.save(tmp_path / "broken", state_dict=doubled)


@pytest.mark.parametrize("kind", ["tiny_smolvla", "tiny_pi0", "tiny_pi05"])
def test_compile_model_is_kept_for_lerobot_and_not_followed(kind, request, tmp_path, monkeypatch, caplog, batch):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text()) | {"compile_model": True, "compile_mode": "max-autotune"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    policy = load_policy(folder)
    assert sum("compile_model" in record.message for record in caplog.records if record.name == "burnish") == 1
    torch.testing.assert_close(acted(policy, batch), acted(load_policy(request.getfixturevalue(kind)), batch))
    policy.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["compile_model"] is True


@pytest.mark.parametrize("field", ["resize_imgs_with_padding", "optimizer_betas"])
def test_a_tuple_that_is_null_is_named_in_words(field, copied):
    config = json.loads((copied / "config.json").read_text()) | {field: None}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(BurnishError, match=f"must not be None for conversion to a tuple.*{field}"):
        load_policy(copied)
