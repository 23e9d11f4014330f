"""Gradient edits against closed forms in numpy float64 (U5 of the specification, and the properties I1 to I7)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.methods.gradients import Layout, group_of
from burnish.methods.isolate.project import Direction, edit

SHAPES = {
    "vlm.layers.0.q.weight": (5, 7), "vlm.layers.0.norm.weight": (7,), "vlm.layers.1.q.weight": (5, 7),
    "vlm.layers.10.q.weight": (3, 3), "vlm.embed.weight": (4, 2), "tower.layers.0.w.weight": (6,),
}  # fmt: skip
LAYERS = {
    "vlm.layers.0": ["vlm.layers.0.q.weight", "vlm.layers.0.norm.weight"], "vlm.layers.1": ["vlm.layers.1.q.weight"],
    "vlm.layers.10": ["vlm.layers.10.q.weight"], "other": ["vlm.embed.weight"],
    "tower.layers.0": ["tower.layers.0.w.weight"],
}  # fmt: skip


def random(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def vector(tensors, names):
    return np.concatenate([tensors[n].numpy().astype(np.float64).ravel() for n in names])


def run_edit(g, o, granularity="layer", **options):
    """The layout, the edited tensors by name (g itself is left alone) and the figures."""
    layout = Layout({n: t.shape for n, t in g.items()}, granularity)
    edited = {name: tensor.clone() for name, tensor in g.items()}
    direction = Direction(layout.parts({name: tensor.clone() for name, tensor in o.items()}), layout)
    return layout, edited, edit(layout.parts(edited), direction, layout, **options)[1]


def one_layer(g, o, **options):
    """The same for one layer of float64 numbers, as float64."""
    name = "layers.0.w"
    tensors = [{name: torch.tensor(x, dtype=torch.float32)} for x in (g, o)]
    return run_edit(*tensors, **options)[1][name].double().numpy()


def test_groups_follow_the_names():
    assert list(Layout(SHAPES, "layer").groups) == list(LAYERS)
    assert Layout(SHAPES, "global").groups == ["all"] and len(Layout(SHAPES, "tensor").groups) == len(SHAPES)
    assert group_of("policy.vlm.text_model.layers.3.q_proj.lora_A.default.weight", "layer") == (
        group_of("policy.vlm.text_model.layers.3.q_proj.lora_B.default.weight", "layer")
    )


def test_parts_share_memory_and_missing_ones_are_zero():
    layout, tensors = Layout(SHAPES, "layer"), random(0)
    gone = tensors.pop("vlm.layers.1.q.weight")
    parts = layout.parts(tensors)
    assert torch.equal(parts[list(SHAPES).index("vlm.layers.1.q.weight")], torch.zeros(gone.numel()))
    for part in parts:
        part.fill_(2.0)
    assert all((tensor == 2.0).all() for tensor in tensors.values())


@given(st.integers(0, 10**6), st.sampled_from(["tensor", "layer", "global"]), st.floats(-6, 6))
@settings(max_examples=60, deadline=None)
def test_conflict_rule_is_gram_schmidt_in_each_group(seed, granularity, exponent):
    """U5 a-f and I6: untouched without conflict, else orthogonal; the norm falls by cos^2; o's scale does not count."""
    g, o = random(seed), random(seed + 1, 10.0**exponent)
    groups = {"layer": LAYERS, "tensor": {n: [n] for n in SHAPES}, "global": {"all": list(SHAPES)}}[granularity]
    layout, edited, figures = run_edit(g, o, granularity)
    again = run_edit(edited, o, granularity)[1]
    total_before = total_removed = 0.0
    for number, group in enumerate(layout.groups):
        a, b, c = vector(g, groups[group]), vector(o, groups[group]), vector(edited, groups[group])
        d, norms = a @ b, np.linalg.norm(a) * np.linalg.norm(b)
        total_before += a @ a
        if d >= 0:
            assert all(torch.equal(edited[n], g[n]) for n in groups[group])
        else:
            expected = a - d / (b @ b) * b
            np.testing.assert_allclose(c, expected, atol=2e-6 * np.linalg.norm(a))
            assert abs(c @ b) <= 2e-6 * norms
            np.testing.assert_allclose(c @ c, (a @ a) * (1 - (d / norms) ** 2), rtol=1e-5)
            assert c @ a >= -1e-6 * (a @ a)
            np.testing.assert_allclose(vector(again, groups[group]), c, atol=2e-6 * np.linalg.norm(a))
            np.testing.assert_allclose(float(figures.removed[number]), (d / norms) ** 2, rtol=1e-4, atol=1e-9)
            total_removed += d**2 / (b @ b)
        np.testing.assert_allclose(float(figures.cosine[number]), d / norms, atol=1e-5)
    np.testing.assert_allclose(float(figures.removed_overall), total_removed / total_before, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["conflict", "always"])
def test_large_tensors_are_cut(monkeypatch, kind):
    g, o = random(8), random(9)
    edited = run_edit(g, o, rule=kind)[1]
    monkeypatch.setattr("burnish.methods.gradients.PART_CPU", 4)
    parts = Layout(SHAPES, "layer").parts(g)
    assert max(map(len, parts)) == 4 and sum(map(len, parts)) == sum(t.numel() for t in g.values())
    cut = run_edit(g, o, rule=kind)[1]
    assert all(torch.allclose(cut[n], edited[n], atol=1e-6) for n in SHAPES)


def test_always_and_soft():
    g, o = random(3), random(4)
    always, soft, conflict = (run_edit(g, o, rule=rule, strength=0.25)[1] for rule in ("always", "soft", "conflict"))
    for names in LAYERS.values():
        a, b = vector(g, names), vector(o, names)
        np.testing.assert_allclose(vector(always, names), a - (a @ b) / (b @ b) * b, atol=1e-5)
        np.testing.assert_allclose(vector(soft, names), 0.75 * a + 0.25 * vector(conflict, names), atol=1e-5)


def test_an_epsilon_would_leave_a_residual():
    """U5 g: with eps beside the square, <g', o> is exactly d eps / (n2 + eps); small directions lose all protection."""
    a, b = np.array([-3.0, 1.0, 0.5]), 1e-5 * np.array([1.0, 0.2, 0.4])
    d, n2, eps = a @ b, b @ b, 1e-8
    with_eps = a - d / (n2 + eps) * b
    assert with_eps @ b == pytest.approx(d * eps / (n2 + eps), rel=1e-9) and with_eps @ b < 0.9 * d
    assert abs(one_layer(a, b) @ b) < 1e-6 * abs(d)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), None])
def test_an_absent_or_broken_direction_is_skipped(bad):
    """U5 h: the layer keeps its gradient's bits, the others are edited as ever."""
    g, o = random(5), random(6)
    clean = run_edit(g, o)[1]
    if bad is None:
        o.pop("vlm.layers.1.q.weight")
    else:
        o["vlm.layers.1.q.weight"].fill_(bad) if bad == 0 else o["vlm.layers.1.q.weight"][0].fill_(bad)
    edited = run_edit(g, o)[1]
    assert torch.equal(edited["vlm.layers.1.q.weight"], g["vlm.layers.1.q.weight"])
    assert all(torch.equal(edited[n], clean[n]) for n in SHAPES if n != "vlm.layers.1.q.weight")


# Properties of the method, on a quadratic protected loss.


def quadratic(seed, size=6):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    hessian, point = root @ root.T, rng.normal(size=size)
    return (lambda x: 0.5 * x @ hessian @ x), hessian @ point, point, rng


def test_i1_i2_first_order_neutral_under_sgd():
    loss, o, point, rng = quadratic(0)
    g = -o + 0.5 * np.linalg.norm(o) * rng.normal(size=6)
    edited = one_layer(g, o)
    change = [loss(point - lr * edited) - loss(point) for lr in (1e-2, 5e-3)]
    naive = loss(point - 1e-4 * g) - loss(point)
    assert change[0] / change[1] == pytest.approx(4, rel=1e-3)
    assert naive == pytest.approx(-1e-4 * (g @ o), rel=1e-2) and naive > 0


def test_i3_layers_that_are_harmless_are_harmless_together():
    for seed in range(30):
        g, o = random(seed), random(seed + 100)
        each = run_edit(g, o, "layer")[1]
        together = run_edit(g, o, "global")[1]
        whole = vector(o, SHAPES)
        assert vector(each, SHAPES) @ whole >= -1e-5 * np.linalg.norm(whole) * np.linalg.norm(vector(g, SHAPES))
        # The global projection keeps more of the gradient.
        assert np.linalg.norm(vector(together, SHAPES)) >= np.linalg.norm(vector(each, SHAPES)) - 1e-5


def test_i4_ratchet():
    """Random task gradients: conflict-only lowers the protected loss steadily, always does not, naive does not."""
    rng = np.random.default_rng(1)
    gains = {"conflict": 0.0, "always": 0.0, "naive": 0.0}
    expected = 0.0
    for _ in range(400):
        g, o = rng.normal(size=8), rng.normal(size=8)
        expected += max(g @ o, 0.0)
        gains["conflict"] += one_layer(g, o) @ o
        gains["always"] += one_layer(g, o, rule="always") @ o
        gains["naive"] += g @ o
    assert gains["conflict"] == pytest.approx(expected, rel=1e-5)  # exactly the sum over d > 0
    assert abs(gains["always"]) < 1e-3 and abs(gains["naive"]) < 0.3 * gains["conflict"]


def test_i5_adam_breaks_it_and_the_preconditioned_projection_mends_it():
    """o = (1, 1), g' = (1, -1), D = (1, 10): the step harms by 9; projected in the metric D it does not."""
    o, edited, metric = np.array([1.0, 1.0]), np.array([1.0, -1.0]), np.array([1.0, 10.0])
    assert -(o @ (metric * edited)) == 9.0
    g, o, metric = torch.tensor([-3.0, 1.0, 0.5]), torch.tensor([1.0, 0.2, 0.4]), torch.tensor([1.0, 10.0, 0.1])
    name = "layers.0.w"
    _, found, figures = run_edit({name: g}, {name: o}, metric=lambda: [metric])
    assert abs(float((o * metric * found[name]).sum())) < 1e-5
    torch.testing.assert_close(found[name], g - (o * metric * g).sum() / (o * metric * o).sum() * o)
    removed = 1 - found[name].square().sum() / g.square().sum()
    assert float(figures.removed) == pytest.approx(float(removed), abs=1e-5)


def test_i7_one_direction_leaves_the_others_unprotected():
    rng = np.random.default_rng(3)
    directions = rng.normal(size=(4, 40))
    g = -directions.sum(0) + 0.3 * rng.normal(size=40)
    assert (directions @ one_layer(g, directions.mean(0)) < -1e-3).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: host waits cannot be seen")
def test_no_host_wait_on_a_gpu():
    g, o = ({n: t.cuda() for n, t in random(seed).items()} for seed in (1, 2))
    layout = Layout(SHAPES, "layer", "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        edit(layout.parts(g), Direction(layout.parts(o), layout), layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
