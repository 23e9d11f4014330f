"""A run on a tiny policy, and one step of it taken apart."""

from contextlib import contextmanager

import fake
import pytest
import torch

from burnish.train import loop
from burnish.train.run import Run
from burnish.train.setup import own_accelerate_state
from burnish.train.step import Streams, gradients


def recipe(root, policy, output, objective="", *more):
    """Four steps of a tiny policy; `objective` is the inside of the entry of `isolate`."""
    method = [f"--objectives=[{{name: isolate, anchor_samples: 12, {objective}}}]"] if objective else []
    return fake.recipe(
        root, output, f"--policy.path={policy}", "--train.steps=4", "--train.save_every=2", "--train.batch_size=3",
        "--train.log_every=1", "--train.lr=1e-3", "--data.augment=false", *method, *more,
    )  # fmt: skip


class Dissected:
    """The gradients of a run's first step, before and after the edit.

    Attributes:
        raw: what backward left.
        edited: after `edit_gradients`, before clipping.
        protected: the protected gradient that the objective took, summed over micro-batches.
    """

    def __init__(self, recipe):
        with own_accelerate_state():
            self.run = run = Run(recipe, progress=False)
            streams = Streams(run)
            try:
                run.generator.manual_seed(0)
                run.shared_generator.manual_seed(0)
                for micro in range(recipe.train.grad_accumulation):
                    run.number = run.number_of(micro)
                    batch, language = streams.next()
                    with run.accelerator.accumulate(run.wrapped):
                        self.total, self.terms = run.forward(batch, language)
                        run.accelerator.backward(self.total)
            finally:
                streams.close()
            self.raw = {name: g.clone() for name, g in gradients(run.trained).items()}
            grads = gradients(run.trained)
            self.method = run.objectives.get("isolate")
            self.protected = {}
            if self.method is not None:
                if self.method._sum:
                    pairs = zip(self.method._backbone, self.method._sum, strict=True)
                    self.protected = {n: g.clone() for n, g in pairs if g is not None}
                self.figures = self.method.edit_gradients(run, batch, grads)
            self.edited = {name: g.clone() for name, g in grads.items()}


@contextmanager
def cut_at(monkeypatch, step):
    """Inside, training is interrupted before this step."""
    original = loop.train_step

    def dying(run, *args, **named):
        if run.step == step:
            raise KeyboardInterrupt
        return original(run, *args, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", dying)
        yield


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
