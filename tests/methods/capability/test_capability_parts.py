"""A policy's matrices in blocks of rows: values, gradients and products against dense autograd."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from burnish.methods.capability import parts
from burnish.methods.capability.parts import PENALTIES, Product, Vector, Whole
from burnish.train.optim import add_adapters
from burnish.weights.delta import Delta
from burnish.weights.extract import extract

SHAPES = {"w.weight": (9, 6), "b.bias": (9,), "conv.weight": (4, 3, 2, 2), "scale": ()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(parts, "part_size", lambda _: 12)


@pytest.fixture(params=["F64", "F32", "BF16", "lowrank"])
def vector(request, tmp_path):
    """A delta of the shapes above in one of the stored forms, and its numbers in float64."""
    rng, form = np.random.default_rng(0), request.param
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    tuned = {name: value + rng.normal(size=value.shape).astype(np.float32) for name, value in base.items()}
    for name, values in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file({k: np.asarray(v) for k, v in values.items()}, tmp_path / name / "model.safetensors")
    source = tmp_path / "tuned"
    if form == "lowrank":
        source = tmp_path / "lora"
        source.mkdir()
        factors = {"a.w.lora_A.weight": rng.normal(size=(2, 6)), "a.w.lora_B.weight": rng.normal(size=(9, 2))}
        factors = {f"base_model.model.{n.removeprefix('a.')}": v.astype(np.float32) for n, v in factors.items()}
        save_file(factors, source / "adapter_model.safetensors")
        (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    dtype = {"F64": "fp64", "F32": "fp32", "BF16": "bf16", "lowrank": "auto"}[form]
    delta = extract(tmp_path / "base", source, output=tmp_path / "delta", dtype=dtype)
    return Vector(delta, delta.tensors, torch.device("cpu")), delta


def dense(kind, gamma, moved):
    """Value of a penalty by plain operations."""
    g, d = gamma.double(), moved.double()
    if kind == "l1":
        return (g * d).abs().sum()
    if kind == "ewc":
        return (g.abs() * d**2).sum()
    if kind == "projection":
        return (g * d).sum() ** 2 / (g * g).sum()
    if kind == "cosine":
        return (g * d).sum().abs() / (g.norm() * d.norm())
    return (d * d).sum()


def collect(part, kind, parameters):
    """(value, gradients by name) that the pieces add up to."""
    grads, value = {name: torch.zeros_like(p) for name, p in parameters.items()}, 0.0
    for piece in part.pieces(kind):
        rows = grads[piece.name]
        (rows if rows.ndim else rows.view(1))[piece.first : piece.last] += piece.pull
        value += float(piece.value)
    return value, grads


@pytest.mark.parametrize("kind", PENALTIES)
def test_whole_parameters(vector, kind):
    vector, delta = vector
    draws = torch.Generator().manual_seed(0)
    for name, entry in delta.tensors.items():
        parameter = nn.Parameter(torch.randn(entry["shape"], generator=draws))
        part = Whole(name, parameter, vector, name)
        assert float(part.products()[2]) == 0
        start = parameter.detach().clone()
        with torch.no_grad():
            parameter += torch.randn(parameter.shape, generator=draws)
        gamma = torch.from_numpy(delta.whole(name))
        expected = dense(kind, gamma, parameter - start)
        expected.backward()
        value, grads = collect(part, kind, {name: parameter})
        assert value == pytest.approx(float(expected), rel=1e-4), name
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-5)
        assert part.products()[0].item() == pytest.approx(
            float((gamma * (parameter - start)).sum()), rel=1e-3, abs=1e-4
        )


def test_gradients_without_their_part_along_the_vector(vector):
    """A plain SGD step leaves the inner product as it is."""
    vector, delta = vector
    for name, entry in delta.tensors.items():
        grad = torch.randn(entry["shape"], generator=torch.Generator().manual_seed(1))
        gamma, before = torch.from_numpy(delta.whole(name)), grad.clone()
        Whole(name, nn.Parameter(torch.zeros(entry["shape"])), vector, name).project_out(grad)
        assert float((gamma * grad).sum()) == pytest.approx(0, abs=1e-4)
        along = (gamma * before).sum() / (gamma * gamma).sum()
        torch.testing.assert_close(grad, (before - gamma * along).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_adapters(vector, kind, method):
    """LoRA and DoRA through the whole product; r x r products where that is all it takes."""
    vector, _ = vector
    net = nn.Sequential(nn.Linear(6, 9))
    add_adapters(net, SimpleNamespace(method=method, rank=3, alpha=6, target_modules="0"))
    layer, draws = net[0], torch.Generator().manual_seed(0)
    part = Product("0", layer, vector, "w.weight")
    assert float(part.products()[2]) == pytest.approx(0, abs=1e-10)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p += 0.3 * torch.randn(p.shape, generator=draws)
    frozen = layer.get_base_layer().weight.detach()
    product = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    if method == "dora":
        norm = (frozen + product).detach().norm(dim=1, keepdim=True)
        product = layer.lora_magnitude_vector["default"].weight.view(-1, 1) / norm * (frozen + product) - frozen
    gamma = torch.from_numpy(vector.delta.whole("w.weight"))
    expected = dense(kind, gamma, product)
    expected.backward()
    value, grads = collect(part, kind, trained)
    assert value == pytest.approx(float(expected), rel=1e-4)
    for name, p in trained.items():
        torch.testing.assert_close(grads[name], p.grad, rtol=2e-4, atol=1e-5)
    along, square, moved = part.products().tolist()
    assert along == pytest.approx(float((gamma * product).sum()), rel=1e-4, abs=1e-4)
    assert square == pytest.approx(float((gamma * gamma).sum()), rel=1e-3)
    assert moved == pytest.approx(float((product * product).sum()), rel=1e-4)


def test_lora_never_builds_the_product(vector, monkeypatch):
    """For scalar products a factor of r x r is enough, and a low-rank vector is not multiplied out either."""
    vector, delta = vector
    net = nn.Sequential(nn.Linear(6, 9))
    add_adapters(net, SimpleNamespace(method="lora", rank=3, alpha=6, target_modules="0"))
    part = Product("0", net[0], vector, "w.weight")
    monkeypatch.setattr(Product, "_blocks", lambda self: pytest.fail("multiplied out"))
    if delta.tensors["w.weight"]["form"] == "lowrank":
        monkeypatch.setattr(Vector, "rows", lambda *_: pytest.fail("multiplied out"))
    for kind in ("projection", "cosine", "l2"):
        assert len(list(part.pieces(kind))) == 2


def test_a_damaged_vector_is_noticed(vector):
    path = vector[1].path / "delta.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    from burnish.core.errors import BurnishError

    with pytest.raises(BurnishError, match="damaged"):
        delta = Delta(path.parent)
        Vector(delta, delta.tensors, torch.device("cpu"))


@pytest.mark.parametrize("kind", PENALTIES)
def test_nothing_large_is_made_on_the_way(tmp_path, kind, monkeypatch):
    """Beside the start, which is kept, a penalty takes no more than blocks."""
    from torch.profiler import ProfilerActivity, profile

    monkeypatch.setattr(parts, "part_size", lambda _: 1 << 14)
    shape = (512, 1024)
    for name, value in (("base", 0.0), ("tuned", 0.5)):
        (tmp_path / name).mkdir()
        save_file({"w.weight": np.full(shape, value, np.float32)}, tmp_path / name / "model.safetensors")
    delta = extract(tmp_path / "base", tmp_path / "tuned", output=tmp_path / "delta")
    part = Whole(
        "w.weight", nn.Parameter(torch.zeros(shape)), Vector(delta, delta.tensors, torch.device("cpu")), "w.weight"
    )
    with torch.no_grad():
        part.parameter += torch.randn(shape, generator=torch.Generator().manual_seed(0))
    grad = torch.zeros(shape)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for piece in part.pieces(kind):
            grad[piece.first : piece.last].add_(piece.pull)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [
        e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e.get("name") == "[memory]"
    ]
    sizes = np.cumsum([e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])])
    assert 0 < sizes.max() < 0.25 * grad.numel() * 4 and float(grad.abs().sum()) > 0
