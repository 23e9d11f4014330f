"""Sharded training on two gloo ranks: equal to one process, whole or absent on disk, resumed by other rank counts."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from ranks import two_ranks
from torch import nn

from bench.scale_shard import CUT, STEPS, difference, moved, prepare, recipe, rows, train_cases
from burnish.core.errors import BurnishError
from burnish.methods.objective import Objective
from burnish.train import checkpoint, loop, sharded_state
from burnish.train.run import Run
from burnish.train.setup import make_accelerator, own_accelerate_state
from burnish.train.sharded import Shards, check_launch

NAMES = ("plain", "together", "adapters_together", "distill_adapters_off", "isolate_self_penalty_bf16")
"""Every method; `python -m bench scale --part shard` has each by itself and in all its forms."""


def rank_main(rank, folder):
    train_cases(folder, "sharded", STEPS, NAMES)
    train_cases(folder, "from_one", STEPS, ["plain"])
    write = sharded_state.write

    def killed(place, state):
        write(place, state)
        if ".000004.new" in str(place):
            os._exit(0)

    sharded_state.write = killed
    train_cases(folder, "killed", STEPS, ["plain"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every case by one process and by two ranks, runs cut or killed in the middle, and one begun by one process."""
    folder = prepare(tmp_path_factory.mktemp("sharded"), ("smolvla", "burnish_discrete"))
    train_cases(folder, "one", STEPS, NAMES)
    train_cases(folder, "from_one", CUT, ["plain"])
    two_ranks(rank_main, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process(made, name):
    found = difference(made / "sharded" / name, made / "one" / name)
    assert max(found.values()) <= 1e-6, found
    other = "together" if name == "plain" else "plain"
    assert moved(made / "one" / name, made / "one" / other) > 1e-6  # and the case is another than plain training


def test_a_checkpoint_of_one_process_goes_on_in_two(made):
    assert max(difference(made / "from_one/plain", made / "sharded/plain").values()) <= 1e-6
    assert rows(made / "from_one") == rows(made / "sharded") == rows(made / "one")


@pytest.mark.parametrize("name", ["plain", "adapters_together"])  # with a moving average; with adapters to merge
def test_one_process_exports_the_same_bytes(made, name, tmp_path):
    for place in ("policy", "adapter"):
        if (made / "sharded" / name / place).is_dir():
            shutil.copytree(made / "sharded" / name / place, tmp_path / place)
    shutil.copytree(made / "sharded" / name, made / "again" / name, symlinks=True)
    for file in (made / "again" / name).glob("*/*.safetensors"):
        file.unlink()
    (made / "again" / name / "train.json").unlink()
    train_cases(made, "again", STEPS, [name])
    compared = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in compared)
    for path in compared:
        if path.suffix == ".safetensors":
            assert (tmp_path / path).read_bytes() == (made / "again" / name / path).read_bytes(), path
        else:
            assert (made / "again" / name / path).is_file(), path


def test_a_kill_while_two_ranks_write_leaves_the_checkpoint_before_which_goes_on_in_one(made):
    run = made / "killed/plain"
    assert (run / "checkpoints/.000004.new/burnish/state").is_dir()
    assert checkpoint.latest(run).name == "000002" and not (run / "policy").exists()
    assert rows(made / "killed") == rows(made / "sharded") and len(rows(made / "sharded")) == 2 * STEPS
    train_cases(made, "killed", STEPS, ["plain"])
    assert max(difference(run, made / "sharded/plain").values()) <= 1e-6
    again = [row for row in rows(made / "sharded") if row[0] >= CUT]  # step, number and frames
    assert rows(made / "killed") == sorted(rows(made / "sharded") + again)
    assert not list((run / "checkpoints").glob(".0*"))


def test_no_pickle_is_written_and_a_lost_part_is_noticed(made, tmp_path):
    folder = checkpoint.latest(made / "sharded/plain")
    files = list((folder / "burnish").rglob("*"))
    assert {path.suffix for path in files if path.is_file()} == {".safetensors", ".json"}
    shutil.copytree(folder, tmp_path / "c")
    next((tmp_path / "c/burnish/state").glob("shard-00002-*")).unlink()
    with own_accelerate_state():
        run = Run(recipe(made, "unused", "plain", 1), progress=False)
        with pytest.raises(BurnishError, match="state"):
            checkpoint.load(run, tmp_path / "c")


class Whole(Objective):
    needs_full_gradients = True


def test_what_cannot_be_sharded_is_refused(made, monkeypatch):
    run = SimpleNamespace(sharded=True, objectives={"whole": Whole()})
    with pytest.raises(BurnishError, match="'whole' needs whole gradients.*shard=false"):
        Run._refuse_whole_gradients(run)
    root = nn.Linear(2, 2)
    root.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(BurnishError, match=r"'scale' is a single number.*freeze='\[scale\]'"):
        Shards(root, [], None)
    state = SimpleNamespace(distributed_type="FSDP", state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2)))
    check_launch(state, True)
    with pytest.raises(BurnishError, match="train.shard is false.*shard=true"):
        check_launch(state, False)
    state.state.fsdp_plugin.fsdp_version = 1
    with pytest.raises(BurnishError, match="version 1"):
        check_launch(state, True)
    config = recipe(made, "unused", "plain", 1)
    config.train.precision = "fp16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BurnishError, match="train.shard with train.precision fp16"):
        make_accelerator(config, made)


def test_other_passes_are_refused_where_the_step_would_be_another(made):
    one = recipe(made, "one", "plain", 1)
    one.train.grad_accumulation = 4
    with pytest.raises(BurnishError, match="grad_accumulation 2 -> 4"):
        loop.train(one, progress=False)
