import math

import fake
import pytest
import torch
from fake import FakePolicy
from torch import nn

from burnish.core.config import PeftConfig, TrainConfig
from burnish.core.errors import BurnishError
from burnish.train import optim


def test_learning_rate_in_closed_form():
    config = TrainConfig(steps=110, warmup_steps=10, lr=2.0, min_lr_ratio=0.1)
    assert [optim.learning_rate(s, config) for s in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert optim.learning_rate(10, config) == pytest.approx(2.0)
    assert optim.learning_rate(60, config) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert optim.learning_rate(35, config) == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))
    assert optim.learning_rate(10**6, config) == pytest.approx(0.2)


def trained(policy):
    return {n for n, p in policy.named_parameters() if p.requires_grad}


def test_patterns_choose_parameters():
    policy = FakePolicy()
    optim.choose_trained(policy, freeze=[r"bias$"], train_only=["^head", "words"])
    assert trained(policy) == {"head.weight", "words.weight"}


@pytest.mark.parametrize(
    ("freeze", "only", "words"),
    [
        (["vision"], [], "train.freeze: 'vision' matches no parameter"),
        ([], ["hed.weight"], "train.train_only: 'hed.weight'.*'head.weight'"),
        (["("], [], "no regular expression"),
    ],
)
def test_patterns_that_cannot_be_meant(freeze, only, words):
    with pytest.raises(BurnishError, match=words):
        optim.choose_trained(FakePolicy(), freeze, only)


class Freezes(fake.Objective):
    """Trains nothing, as a method does that freezes the backbone of a policy which is all backbone."""

    def choose_trained(self, recipe, policy):
        policy.requires_grad_(False)


@pytest.mark.parametrize(("freeze", "more", "remedy"), [
    ("[.]", [], "train.freeze"), ("[]", [Freezes()], "another method"),
])  # fmt: skip
def test_a_run_that_would_train_nothing_is_refused(tmp_path, freeze, more, remedy):
    made = fake.recipe(tmp_path, tmp_path / "run", f"--train.freeze={freeze}")
    with pytest.raises(BurnishError, match=f"nothing is left to train.*{remedy}"):
        optim.prepare(FakePolicy(), made, more)


def test_average_in_closed_form():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = optim.Average({"p": p}, decay=0.75)
    expected = p.detach().clone()
    for step in range(1, 40):
        p.data += 1
        average.update(step)
        decay = min(0.75, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * p.detach()
    live = p.detach().clone()
    with average.swapped():
        torch.testing.assert_close(p.detach(), expected)
    assert torch.equal(p.detach(), live)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_merge_into_ordinary_weights_and_come_apart_bit_for_bit(method):
    policy = FakePolicy().eval()
    names = set(policy.state_dict())
    base = {k: v.clone() for k, v in policy.state_dict().items()}
    optim.add_adapters(policy, PeftConfig(method=method, rank=2, alpha=4, target_modules=r"head|backbone\.0"))
    assert trained(policy) and all("lora" in n for n in trained(policy))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    x = torch.randn(4, 33)
    before, out = {k: v.clone() for k, v in policy.state_dict().items()}, policy.head(x)
    with optim.merged(policy):
        assert set(policy.state_dict()) == names
        assert not torch.equal(policy.head.weight, base["head.weight"])
        assert torch.equal(policy.words.weight, base["words.weight"])
        torch.testing.assert_close(policy.head(x), out)
    after = policy.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(policy.head(x), out)


def test_the_start_of_adapters_follows_from_the_seed_alone():
    def start(seed, ambient):
        policy = FakePolicy()
        torch.manual_seed(ambient)
        expected = torch.rand(3, generator=torch.Generator().manual_seed(ambient))
        optim.add_adapters(policy, PeftConfig(method="lora", rank=2, target_modules="head"), seed)
        assert torch.equal(torch.rand(3), expected)
        return policy.head.lora_A["default"].weight

    assert torch.equal(start(0, 1), start(0, 2)) and not torch.equal(start(0, 1), start(1, 1))


def test_adapter_pattern_without_a_match():
    with pytest.raises(BurnishError, match="'q_proj' matches no linear layer"):
        optim.add_adapters(FakePolicy(), PeftConfig(method="lora", target_modules="q_proj"))


def test_optimiser_state_survives_a_round_trip():
    def make():
        policy = FakePolicy()
        named = dict(policy.named_parameters())
        return named, optim.adamw(named, TrainConfig(lr=0.1))

    def step(named, adam, seed):
        draws = torch.Generator().manual_seed(seed)
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=draws)
        adam.step()

    named, adam = make()
    step(named, adam, 0)
    others, other = make()
    for n in others:
        others[n].data.copy_(named[n].data)
    optim.load_optimizer_tensors(other, others, optim.optimizer_tensors(adam, named))
    step(named, adam, 1)
    step(others, other, 1)
    assert all(torch.equal(named[n], others[n]) for n in named)


def test_weight_decay_spares_biases_and_norms():
    named = dict(FakePolicy().named_parameters())
    groups = optim.adamw(named, TrainConfig(weight_decay=0.3)).param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert all(p.ndim == 2 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])
