"""LoRA and DoRA: deltas through products, against peft's own forward."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from weight_files import read_file, weights, write_file

from burnish.core.errors import BurnishError
from burnish.weights.adapters import Adapted
from burnish.weights.extract import extract
from burnish.weights.merge import merge
from burnish.weights.verify import verify


class Net(nn.Module):
    """Two linear layers under names as a policy has them."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(24, 40), nn.Linear(40, 12)

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)))


def save_base(net: Net, folder):
    write_file(folder / "model.safetensors", {n: ("F32", p.detach().numpy()) for n, p in net.named_parameters()})
    return folder


def adapted(base: Net, seed: int, folder, **settings):
    """A peft model with random factors on `base`, and its adapter folder."""
    import copy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=settings.pop("r", 4), lora_alpha=8, target_modules=["q_proj", "o_proj"], **settings)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, folder


def load(net_folder) -> Net:
    net = Net()
    net.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in read_file(net_folder / "model.safetensors").items()})
    return net.eval()


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    net = Net()
    return net, save_base(net, tmp_path / "base")


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}},
     {"modules_to_save": ["q_proj"]}],
    ids=["lora", "rslora", "dora", "patterns", "saved modules"],
)  # fmt: skip
def test_merged_is_the_unmerged_forward(base, tmp_path, settings):
    net, folder = base
    if "modules_to_save" in settings:
        settings = settings | {"exclude_modules": ["q_proj"]}
    model, adapter = adapted(net, 1, tmp_path / "adapter", **settings)
    delta = extract(folder, adapter, output=tmp_path / "delta")
    plain = not settings.get("use_dora") and "modules_to_save" not in settings
    assert {entry["form"] for entry in delta.tensors.values()} == {"lowrank" if plain else "dense"}
    merge(folder, [(delta.path, 1.0)], output=tmp_path / "out")
    x = torch.randn(16, 24)
    torch.testing.assert_close(load(tmp_path / "out")(x), model(x), rtol=1e-5, atol=1e-5)
    assert verify(tmp_path / "delta")["unequal"] == verify(tmp_path / "out")["unequal"] == 0


@pytest.mark.parametrize("form", ["lowrank", "dense"])
def test_difference_of_two_adapters(base, tmp_path, form, monkeypatch):
    """Equal to the difference of the merged weights, of rank at most 2r, whatever the form."""
    net, folder = base
    (one, a), (two, b) = adapted(net, 1, tmp_path / "a"), adapted(net, 2, tmp_path / "b", r=3)
    if form == "dense":
        monkeypatch.setattr(Adapted, "low_rank", False)
    delta = extract(folder, a, b, output=tmp_path / "delta")
    assert {entry["form"] for entry in delta.tensors.values()} == {form}
    merged = [{n: p.detach().double() for n, p in m.merge_and_unload().named_parameters()} for m in (one, two)]
    for name in ("q_proj.weight", "o_proj.weight"):
        whole = delta.whole(name)
        np.testing.assert_allclose(whole, (merged[0][name] - merged[1][name]).numpy(), atol=1e-6)
        assert np.linalg.matrix_rank(whole, tol=1e-5) <= 7
        assert delta.tensors[name]["norm"] == pytest.approx(np.linalg.norm(whole), rel=1e-6)
    if form == "lowrank":
        assert delta.tensors["q_proj.weight"]["rank"] == 7 and "q_proj.bias" not in delta.tensors
        assert (delta.path / "delta.safetensors").stat().st_size < 6000
    merge(folder, [(delta.path, 1.0)], output=tmp_path / "out")
    expected = dict(net.named_parameters())["q_proj.weight"].detach().double() + (
        merged[0]["q_proj.weight"] - merged[1]["q_proj.weight"]
    )
    np.testing.assert_allclose(weights(tmp_path / "out")["q_proj.weight"], expected.numpy(), atol=2e-6)


def test_the_gauge_does_not_matter_but_factors_do(base, tmp_path):
    """(B G^-1, G A) is the same update; a difference of A's alone is not even the same number."""
    net, folder = base
    _, a = adapted(net, 1, tmp_path / "a")
    _, b = adapted(net, 2, tmp_path / "b")
    turned = tmp_path / "turned"
    turned.mkdir()
    (turned / "adapter_config.json").write_text((a / "adapter_config.json").read_text())
    factors, rng = dict(read_file(a / "adapter_model.safetensors")), np.random.default_rng(0)
    for key in [k for k in factors if "lora_A" in k]:
        g = rng.normal(size=(4, 4)) + 3 * np.eye(4)
        up = key.replace("lora_A", "lora_B")
        factors[up] = (factors[up].astype(float) @ np.linalg.inv(g)).astype(np.float32)
        factors[key] = (g @ factors[key]).astype(np.float32)
    write_file(turned / "adapter_model.safetensors", {k: ("F32", v) for k, v in factors.items()})
    one = extract(folder, a, b, output=tmp_path / "one")
    two = extract(folder, turned, b, output=tmp_path / "two")
    for name in one.tensors:
        np.testing.assert_allclose(one.whole(name), two.whole(name), atol=1e-5)
        down = [d.updates(name)[0].down - d.updates(name)[1].down for d in (one, two)]
        assert np.abs(down[0] - down[1]).max() > 0.1


def test_adapter_against_a_full_checkpoint(base, tmp_path):
    net, folder = base
    model, adapter = adapted(net, 1, tmp_path / "adapter")
    other = Net()
    control = save_base(other, tmp_path / "control")
    delta = extract(folder, adapter, control, output=tmp_path / "delta")
    assert {e["form"] for e in delta.tensors.values()} == {"dense"}
    merged = {n: p.detach().double() for n, p in model.merge_and_unload().named_parameters()}
    for name, parameter in other.named_parameters():
        np.testing.assert_allclose(delta.whole(name), (merged[name] - parameter.detach().double()).numpy(), atol=1e-6)


def test_fan_in_fan_out(tmp_path):
    """GPT-2's Conv1D keeps its weight transposed."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(10, 6)).astype(np.float32)  # [in, out]
    up, down = rng.normal(size=(6, 2)).astype(np.float32), rng.normal(size=(2, 10)).astype(np.float32)
    write_file(tmp_path / "base/model.safetensors", {"h.0.c_attn.weight": ("F32", weight)})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": True}
    names = {"base_model.model.h.0.c_attn.lora_A.weight": ("F32", down),
             "base_model.model.h.0.c_attn.lora_B.weight": ("F32", up)}  # fmt: skip
    write_file(tmp_path / "adapter/adapter_model.safetensors", names)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    extract(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "delta")
    merge(tmp_path / "base", [(tmp_path / "delta", 1.0)], output=tmp_path / "out")
    np.testing.assert_allclose(weights(tmp_path / "out")["h.0.c_attn.weight"], weight + 2 * (up @ down).T, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"peft_type": "IA3"}, "IA3"), ({"layer_replication": [[0, 1]]}, "layer_replication"), ({"r": 5}, "rank 5"),
     ({"use_dora": True}, "use_dora")],
)  # fmt: skip
def test_adapters_that_are_refused(base, tmp_path, change, words):
    net, folder = base
    _, adapter = adapted(net, 1, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(BurnishError, match=words):
        extract(folder, adapter, output=tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_an_adapter_of_another_model(base, tmp_path):
    net, folder = base
    _, adapter = adapted(net, 1, tmp_path / "adapter")
    write_file(tmp_path / "other/model.safetensors", {"q_proj.weight": ("F32", np.zeros((40, 24), np.float32))})
    with pytest.raises(BurnishError, match="o_proj"):
        extract(tmp_path / "other", adapter, output=tmp_path / "delta")
