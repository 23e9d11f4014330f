"""SIGKILL at random instants. BURNISH_KILLS=20 runs the long version (the default keeps the suite short)."""

import multiprocessing
import os
import signal
import time

import fake
import numpy as np
from safetensors.torch import load_file

from burnish.train import checkpoint

KILLS = int(os.environ.get("BURNISH_KILLS", "3"))


def child(root, questions, output, frames):
    import torch

    torch.set_num_threads(1)
    fake.register()
    from burnish.train.loop import train

    train(options(root, questions, output, frames), progress=False)


def options(root, questions, output, frames):
    more = ["--train.steps=60", "--train.save_every=3", f"--data.cache_dir={frames}", "--train.max_minutes=0"]
    return fake.recipe(root, output, *fake.everything(questions), *more)


def assert_whole(output):
    """Whatever carries its final name can be read to the end."""
    for folder in sorted(output.glob("checkpoints/[0-9]*")):
        meta = checkpoint.read_meta(folder)
        assert meta["step"] == int(folder.name)
        assert all(load_file(path) for path in folder.rglob("*.safetensors"))
    if (output / "policy").exists():
        load_file(output / "policy/model.safetensors")


def test_killed_training_goes_on_as_if_nothing_had_happened(dataset, questions, tmp_path):
    # The server imports the heavy libraries once; every child is a fork of it, as fresh as a new process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fake", "burnish.train.loop", "lerobot.datasets", "accelerate", "safetensors.torch"]
    )

    def start(name):
        process = context.Process(target=child, args=(dataset, questions, tmp_path / name, tmp_path / f"frames_{name}"))
        process.start()
        return process

    begin = time.monotonic()
    process = start("whole")
    process.join()
    first = time.monotonic() - begin
    assert process.exitcode == 0
    rng = np.random.default_rng()
    seed = int(rng.integers(1 << 31))
    print(f"seed {seed}")  # shown when the test fails
    rng, killed, ended = np.random.default_rng(seed), 0, 0
    while killed < KILLS:
        process = start("cut")
        process.join(timeout=rng.uniform(0.1, 0.4) * first)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        else:  # it came to its end: the next one starts over
            assert process.exitcode == 0
            compare(tmp_path)
            ended += 1
            first *= 0.8  # the machine was busier when the time was taken
            os.rename(tmp_path / "cut", tmp_path / f"ended{ended}")
        assert_whole(tmp_path / "cut")
    process = start("cut")
    process.join()
    assert process.exitcode == 0
    compare(tmp_path)


def compare(tmp_path):
    fake.assert_same_weights(tmp_path / "whole/policy", tmp_path / "cut/policy")
    assert fake.figures(tmp_path / "whole/metrics.jsonl") == fake.figures(tmp_path / "cut/metrics.jsonl")
    kept = sorted(p.name for p in (tmp_path / "cut/checkpoints").iterdir() if not p.name.startswith("."))
    assert kept == ["000060", "last"]
