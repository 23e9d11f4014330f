"""What a killed training left, and then was damaged: the next call names it, and nothing is waited for."""

import json
import os
import shutil

import fake
import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def words(dataset, tmp_path, monkeypatch):
    fake.register(monkeypatch.setattr)
    return ["train", f"--data.root={dataset}", "--policy.path=fake", "--train.steps=4", "--train.save_every=2",
            "--train.batch_size=2", "--quiet", f"--data.cache_dir={tmp_path / 'frames'}"]  # fmt: skip


@pytest.fixture(scope="module")
def killed(dataset, tmp_path_factory):
    """A run that was killed after its last checkpoint. Do not write into it."""
    from burnish.train.loop import train

    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        fake.register(patch.setattr)
        more = ["--train.steps=4", "--train.save_every=2", "--train.batch_size=2", "--train.log_every=10",
                "--train.warmup_steps=100", "--train.lr=0.0001"]  # fmt: skip
        train(fake.recipe(dataset, folder / "run", *more, f"--data.cache_dir={folder / 'frames'}"), progress=False)
    (folder / "run/train.json").unlink()
    shutil.rmtree(folder / "run/policy")
    return folder / "run"


STEP = "checkpoints/000004/burnish"


def meta(**changes):
    def edit(run):
        path = run / STEP / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def state(name, change):
    def edit(run):
        tensors = load_file(run / STEP / name)
        change(tensors)
        save_file(tensors, run / STEP / name)

    return edit


def put(name, make):
    def edit(run):
        path = run / name
        path.unlink(missing_ok=True)
        make(path)

    return edit


CASES = {
    "meta cut": put(f"{STEP}/meta.json", lambda path: path.write_text("{")),
    "meta a list": put(f"{STEP}/meta.json", lambda path: path.write_text("[]")),
    "meta gone": put(f"{STEP}/meta.json", lambda path: None),
    "meta a pipe": put(f"{STEP}/meta.json", os.mkfifo),
    "format 9": meta(format=9), "step -3": meta(step=-3), "step of text": meta(step="4"),
    "minutes NaN": meta(minutes=float("nan")), "minutes -1": meta(minutes=-1), "minutes of text": meta(minutes="1"),
    "sums of text": meta(window={"sums": {"loss": "x"}, "counts": {"loss": 1}}),
    "counts of text": meta(window={"sums": {"loss": 1.0}, "counts": {"loss": "1"}}),
    "lists of figures": meta(window={"sums": [1], "counts": [1]}), "no figures": meta(window={}),
    "names of numbers": meta(optimizer=[1, 2]), "names of objects": meta(optimizer=[{}]),
    "names of lists": meta(optimizer=[[1]]), "a recipe of numbers": meta(recipe={"train": 3}),
    "a recipe with more": meta(recipe={"nothing": 3}), "another data set": meta(data_hash="x"),
    "another policy": meta(parent_hash="x"), "another format of hashes": meta(data_hash=3),
    "NaN": state("weights.safetensors", lambda t: [v.fill_(torch.nan) for v in t.values() if v.is_floating_point()]),
    "a tensor more": state("weights.safetensors", lambda t: t.update(x=torch.zeros(1))),
    "a tensor less": state("weights.safetensors", lambda t: t.pop(min(t))),
    "another shape": state("weights.safetensors", lambda t: t.update({min(t): torch.zeros(1, 2, 3)})),
    "an optimiser of others": state("optimizer.safetensors", lambda t: t.update({"x/exp_avg": torch.zeros(1)})),
    "a state that was deleted": lambda run: shutil.rmtree(run / STEP),
    "weights gone": put(f"{STEP}/weights.safetensors", lambda path: None),
    "weights cut": put(f"{STEP}/weights.safetensors", lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0{}")),
    "weights a pickle": put(f"{STEP}/weights.safetensors", lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n.")),
    "weights a pipe": put(f"{STEP}/weights.safetensors", os.mkfifo),
    "weights a folder": put(f"{STEP}/weights.safetensors", lambda path: path.mkdir()),
    "optimiser a pipe": put(f"{STEP}/optimizer.safetensors", os.mkfifo),
    "figures are none": put("metrics.jsonl", lambda path: path.write_text("x\n{}\n")),
    "figures without a step": put("metrics.jsonl", lambda path: path.write_text('{"a": 1}\n')),
    "figures a folder": put("metrics.jsonl", lambda path: path.mkdir()),
    "the recipe a folder": put("recipe.yaml", lambda path: path.mkdir()),
    "curves a folder": put("curves.png", lambda path: path.mkdir()),
    "another folder among the checkpoints": lambda run: (run / "checkpoints/999999").mkdir(),
    "the marker cut": put(".burnish.json", lambda path: path.write_text("{")),
    "the marker of another": put(".burnish.json", lambda path: path.write_text('{"kind": "evaluation"}')),
    "the marker a pipe": put(".burnish.json", os.mkfifo),
    "the marker a folder": put(".burnish.json", lambda path: path.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_damaged_is_named(name, killed, words, tmp_path, refused, curves):
    run = shutil.copytree(killed, tmp_path / "run", symlinks=True)
    CASES[name](run)
    refused([*words, f"--output={run}"])
    assert not (run / "policy").exists() or name == "curves a folder"
    assert (run / "checkpoints/000004/model.safetensors").exists()


def test_what_is_whole_goes_on(killed, words, tmp_path, accepted):
    run = shutil.copytree(killed, tmp_path / "run", symlinks=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "lo')  # a kill while the first row was written
    accepted([*words, f"--output={run}"], "steps: 4")
