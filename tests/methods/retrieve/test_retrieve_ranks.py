"""Two gloo ranks: the losses see the frames of both, and training keeps them equal."""

import json

import fake
import pytest
import torch
import torch.nn.functional as F
from ranks import train_and_keep, two_ranks
from seeing import Seeing

import burnish.policies
from burnish.methods.retrieve.head import Head, Moments, all_ranks
from burnish.methods.retrieve.options import make_config


def draw(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def whole_loss(head, rows, gather, rank):
    """All terms of a head on rows of one batch."""
    x = draw(8, 2, 6)[rows]
    y = draw(8, 2, 6, seed=1)[rows]
    when = Moments(torch.tensor([0, 0, 1, 1, 0, 0, 2, 2]), torch.tensor([0, 4, 0, 30, 9, 40, 3, 5]))
    some = Moments(*(part[rows] for part in when))
    which, left = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])[rows], torch.arange(8)[rows]
    terms = head.losses(head(x), head(y), some, some, left, which, ["one thing", "another"], gather, rank)
    return sum(terms.values())


def make_head():
    return Head(6, make_config("default", {"hidden": 5, "width": 4}), torch.Generator().manual_seed(0))


def rank_main(rank, root, output):
    burnish.policies.load_policy = lambda *args, **more: Seeing()
    entry = "--objectives=[{name: retrieve, hidden: 8, width: 4, weight: 1.0, window: 2, far: 4}]"
    weights = train_and_keep(fake.recipe(root, output / "run", entry, "--train.steps=4"))[1]
    head = make_head()
    loss = whole_loss(head, torch.arange(4) + 4 * rank, all_ranks, rank)
    loss.backward()
    found = {"loss": float(loss), "grads": {n: p.grad.flatten().tolist() for n, p in head.named_parameters()},
             "weights": weights}  # fmt: skip
    (output / f"{rank}.json").write_text(json.dumps(found))


def test_two_ranks_average_to_the_loss_and_the_gradient_of_one_and_train_as_one(dataset, tmp_path):
    two_ranks(rank_main, dataset, tmp_path)
    halves = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    head = make_head()
    loss = whole_loss(head, torch.arange(8), lambda rows: rows, 0)
    loss.backward()
    assert sum(half["loss"] for half in halves) / 2 == pytest.approx(float(loss), rel=1e-5)
    for name, parameter in head.named_parameters():
        mean = torch.tensor([half["grads"][name] for half in halves]).mean(0)
        torch.testing.assert_close(mean, parameter.grad.flatten(), rtol=1e-4, atol=1e-6)
    assert halves[0]["weights"] == halves[1]["weights"]
    assert any(name.startswith("objectives.retrieve.head") for name in halves[0]["weights"])
