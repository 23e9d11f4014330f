"""LoRA and DoRA: identities, the closed form against peft's own, and what half precision does to a magnitude."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from burnish.core.config import PeftConfig
from burnish.core.errors import BurnishError
from burnish.methods.reference import check_adapters, check_precision, without_adapters
from burnish.train.dora import ClosedFormDora, row_norms, use_closed_form
from burnish.train.optim import add_adapters, merged


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 6, bias=False)).double()


def adapted(method, seed=0, disturbed=True):
    model = net(seed)
    add_adapters(model, PeftConfig(method=method, rank=3, alpha=6, target_modules="[02]"))
    if disturbed:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora" in name:
                    p.add_(0.2 * torch.randn_like(p))
    return model.double()


@pytest.fixture
def x():
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_row_norms_are_those_of_the_whole_product():
    g = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((7, 11), (3, 11), (7, 3)))
    torch.testing.assert_close(row_norms(w, a, b, 1.7), (w + 1.7 * b @ a).norm(dim=1))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_fresh_adapters_are_the_base(method, x):
    torch.testing.assert_close(adapted(method, disturbed=False)(x), net()(x), atol=1e-7, rtol=0)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged_equals_unmerged_and_back(method, x):
    model = adapted(method)
    before = model(x)
    with merged(model):
        torch.testing.assert_close(model(x), before, atol=1e-10, rtol=0)
        assert "0.weight" in model.state_dict()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_without_adapters_is_the_base_bit_for_bit(method, x):
    model = adapted(method)
    before = model(x)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with without_adapters(model):
        assert torch.equal(model(x), net()(x))
    assert torch.equal(model(x), before)
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}


def test_rows_of_the_merged_weight_have_the_magnitude_as_length():
    model = adapted("dora")
    magnitude = model[0].lora_magnitude_vector["default"].weight.detach().clone()
    with merged(model):
        torch.testing.assert_close(model[0].weight.norm(dim=1), magnitude.abs())


def test_closed_form_equals_peft_forward_and_gradients(x):
    ours = adapted("dora")
    assert isinstance(ours[0].lora_magnitude_vector["default"], ClosedFormDora)
    peers = net()
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], use_dora=True), peers)
    peers.double()
    lost = set_peft_model_state_dict(peers, get_peft_model_state_dict(ours, adapter_name="default"))
    assert not lost.unexpected_keys
    outputs, gradients = [], []
    for model in (ours, peers):
        given = x.clone().requires_grad_(True)
        outputs.append(model(given))
        outputs[-1].square().sum().backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append({**named, "x": given.grad})
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-6)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 7
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-6, rtol=1e-6, msg=name)


def test_closed_form_notices_a_changed_base_weight(x):
    model, fresh = adapted("dora"), adapted("dora")
    model(x)
    for m in (model, fresh):
        with torch.no_grad():
            m[0].base_layer.weight.mul_(1.5)
    torch.testing.assert_close(model(x), fresh(x))


def test_copies_and_a_second_call_change_nothing(x):
    model = adapted("dora")
    assert use_closed_form(model) == 0
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize(("dtype", "moves"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_half_precision_magnitude_cannot_move_at_the_published_rate(dtype, moves):
    """Row norms of a real VLM are near 1; AdamW at 5e-5 changes them by less than half a bf16 digit."""
    magnitude = nn.Parameter(torch.linspace(0.3, 1.5, 256).to(dtype))
    before = magnitude.detach().clone()
    optimizer = torch.optim.AdamW([magnitude], lr=5e-5, betas=(0.9, 0.95), weight_decay=1e-4)
    for _ in range(100):
        magnitude.grad = torch.full_like(magnitude, 0.02)
        optimizer.step()
    assert bool((magnitude != before).any()) is moves


def test_half_precision_is_refused():
    model = adapted("dora")
    model[0].lora_magnitude_vector["default"].weight.data = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(BurnishError, match="1 trained parameters are in half precision, such as 0.lora_magnitude"):
        check_precision(model)


def test_adapter_off_needs_adapters_alone():
    with pytest.raises(BurnishError, match="the policy has no adapters"):
        check_adapters(net())
    model = adapted("lora")
    check_adapters(model)
    model[2].base_layer.weight.requires_grad_(True)
    with pytest.raises(BurnishError, match="1 parameters outside the adapters are trained, such as 2.base_layer"):
        check_adapters(model)
