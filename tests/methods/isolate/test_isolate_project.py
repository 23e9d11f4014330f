"""Gradient edits against closed forms in numpy float64 (U5 of the specification, and the properties I1 to I7)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.methods.isolate.layout import Layout, group_of
from burnish.methods.isolate.project import Direction, Rule, edit, edit_several, nearest_harmless, orthonormal

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


def run_edit(g, o, granularity="layer", rule=Rule(), metric=None):
    layout = Layout(SHAPES, granularity)
    flat = layout.flatten(g)
    figures = edit(flat, Direction(layout.flatten(o), layout), layout, rule, metric)
    return layout, layout.views(flat), figures


def test_groups_follow_the_names():
    assert list(Layout(SHAPES, "layer").groups) == list(LAYERS)
    assert Layout(SHAPES, "global").groups == ["all"] and len(Layout(SHAPES, "tensor").groups) == len(SHAPES)
    assert group_of("policy.vlm.text_model.layers.3.q_proj.lora_A.default.weight", "layer") == (
        group_of("policy.vlm.text_model.layers.3.q_proj.lora_B.default.weight", "layer")
    )


def test_flatten_and_views_are_inverse_and_missing_ones_are_zero():
    layout, tensors = Layout(SHAPES, "layer"), random(0)
    gone = tensors.pop("vlm.layers.1.q.weight")
    views = layout.views(layout.flatten(tensors))
    assert torch.equal(views["vlm.layers.1.q.weight"], torch.zeros_like(gone))
    assert all(torch.equal(views[n], t) for n, t in tensors.items())


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
            np.testing.assert_allclose(float(figures.shed[number]), (d / norms) ** 2, rtol=1e-4, atol=1e-9)
            total_removed += d**2 / (b @ b)
        np.testing.assert_allclose(float(figures.cosine[number]), d / norms, atol=1e-5)
    np.testing.assert_allclose(float(figures.shed_overall), total_removed / total_before, rtol=1e-4, atol=1e-9)


@given(st.integers(0, 10**6), st.sampled_from(["tensor", "layer", "global"]), st.sampled_from(["conflict", "always"]))
@settings(max_examples=40, deadline=None)
def test_pieces_are_edited_where_they_lie_and_as_a_buffer_is(seed, granularity, kind):
    g, o = random(seed), random(seed + 1)
    missing = list(SHAPES)[seed % len(SHAPES)]
    del o[missing]
    layout, expected, figures = run_edit(g, o, granularity, Rule(kind))
    inside = {name: tensor.clone() for name, tensor in g.items()}
    direction = Direction(layout.pieces(o), layout)
    found = edit(layout.pieces(inside), direction, layout, Rule(kind))
    for name in SHAPES:
        np.testing.assert_allclose(inside[name].numpy(), expected[name].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.shed.numpy(), figures.shed.numpy(), atol=1e-6)
    assert torch.equal(direction.flat, layout.flatten(o))


def test_pieces_of_large_tensors_are_cut(monkeypatch):
    monkeypatch.setattr("burnish.methods.isolate.layout._CPU_CHUNK", 4)
    g, o = random(8), random(9)
    edited = run_edit(g, o)[1]
    layout = Layout(SHAPES, "layer")
    pieces = layout.pieces(g)
    assert max(map(len, pieces)) == 4 and sum(map(len, pieces)) == layout.size
    edit(pieces, Direction(layout.pieces(o), layout), layout)
    assert all(torch.allclose(g[n], edited[n], atol=1e-6) for n in SHAPES)


def test_always_and_soft():
    g, o = random(3), random(4)
    always, soft, conflict = (run_edit(g, o, rule=r)[1] for r in (Rule("always"), Rule("soft", 0.25), Rule()))
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
    layout = Layout({"layers.0.w": (3,)}, "layer")
    flat = torch.tensor(a, dtype=torch.float32)
    edit(flat, Direction(torch.tensor(b, dtype=torch.float32), layout), layout)
    assert abs(flat.double().numpy() @ b) < 1e-6 * abs(d)


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


def project64(g, o, always=False):
    layout = Layout({"layers.0.w": g.shape}, "layer")
    flat = torch.tensor(g, dtype=torch.float32)
    rule = Rule("always" if always else "conflict")
    edit(flat, Direction(torch.tensor(o, dtype=torch.float32), layout), layout, rule)
    return flat.double().numpy()


def test_i1_i2_first_order_neutral_under_sgd():
    loss, o, point, rng = quadratic(0)
    g = -o + 0.5 * np.linalg.norm(o) * rng.normal(size=6)
    edited = project64(g, o)
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
        gains["conflict"] += project64(g, o) @ o
        gains["always"] += project64(g, o, always=True) @ o
        gains["naive"] += g @ o
    assert gains["conflict"] == pytest.approx(expected, rel=1e-5)  # exactly the sum over d > 0
    assert abs(gains["always"]) < 1e-3 and abs(gains["naive"]) < 0.3 * gains["conflict"]


def test_i5_adam_breaks_it_and_the_preconditioned_projection_mends_it():
    """o = (1, 1), g' = (1, -1), D = (1, 10): the step harms by 9; projected in the metric D it does not."""
    o, edited, metric = np.array([1.0, 1.0]), np.array([1.0, -1.0]), np.array([1.0, 10.0])
    assert -(o @ (metric * edited)) == 9.0
    layout = Layout({"layers.0.w": (3,)}, "layer")
    g, o, metric = torch.tensor([-3.0, 1.0, 0.5]), torch.tensor([1.0, 0.2, 0.4]), torch.tensor([1.0, 10.0, 0.1])
    before = g.clone()
    figures = edit(g, Direction(o.clone(), layout), layout, metric=metric)
    assert abs(float((o * metric * g).sum())) < 1e-5
    closed = before - (o * metric * before).sum() / (o * metric * o).sum() * o
    torch.testing.assert_close(g, closed)
    assert float(figures.shed) == pytest.approx(float(1 - g.square().sum() / before.square().sum()), abs=1e-5)


def test_i7_one_direction_leaves_the_others_unprotected_and_several_protect_all():
    rng = np.random.default_rng(3)
    directions = rng.normal(size=(4, 40))
    g = -directions.sum(0) + 0.3 * rng.normal(size=40)
    layout = Layout({"layers.0.w": (40,)}, "layer")
    one = project64(g, directions.mean(0))
    assert (directions @ one < -1e-3).any()
    stacked = torch.stack([
        Direction(torch.tensor(d, dtype=torch.float32), layout).unit(layout) for d in directions
    ])  # fmt: skip
    flat = torch.tensor(g, dtype=torch.float32)
    edit_several(flat, *orthonormal(stacked, layout), layout)
    assert (directions @ flat.double().numpy() >= -1e-4).all()


@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_several_directions_against_scipy(seed, count, dependent):
    """The nearest harmless gradient from scipy's non-negative least squares; "always" from numpy's least squares."""
    from scipy.optimize import nnls

    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(count, 12)).astype(np.float32)
    if dependent and count > 1:
        directions[-1] = directions[0]
    g = rng.normal(size=12).astype(np.float32)
    layout = Layout({"layers.0.w": (12,)}, "layer")
    units = torch.stack([Direction(torch.tensor(d), layout).unit(layout) for d in directions])
    basis, factor = orthonormal(units, layout)
    flat = torch.tensor(g)
    figures = edit_several(flat, basis, factor, layout)
    exact = np.linalg.lstsq(directions.T.astype(np.float64), g, rcond=None)[0]
    # min |g + D^T x - g|^2 with D (g + D^T x) >= 0 has the dual min |D^T x + g| over x >= 0.
    x, _ = nnls(directions.T.astype(np.float64), -g.astype(np.float64))
    np.testing.assert_allclose(flat.numpy(), g + directions.T @ x, atol=2e-4)
    removed = 1 - (flat.square().sum() / torch.tensor(g).square().sum()).item()
    assert float(figures.shed) == pytest.approx(removed, abs=1e-4)
    whole = torch.tensor(g)
    edit_several(whole, basis, factor, layout, Rule("always"))
    np.testing.assert_allclose(whole.numpy(), g - directions.T @ exact, atol=2e-4)


def test_one_of_several_is_the_paper_rule():
    g, o = random(8), random(9)
    layout = Layout(SHAPES, "layer")
    flat = layout.flatten(g)
    units = Direction(layout.flatten(o), layout).unit(layout)[None]
    edit_several(flat, *orthonormal(units, layout), layout)
    torch.testing.assert_close(flat, layout.flatten(run_edit(g, o)[1]), atol=1e-5, rtol=1e-5)


def test_nearest_harmless_is_the_point_itself_without_conflict():
    inside = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(nearest_harmless(inside, torch.eye(2, dtype=torch.float64)[None]), inside)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: host waits cannot be seen")
def test_no_host_wait_on_a_gpu():
    g, o = ({n: t.cuda() for n, t in random(seed).items()} for seed in (1, 2))
    layout = Layout(SHAPES, "layer", "cuda")
    units = torch.stack([Direction(layout.flatten(x), layout).unit(layout) for x in (g, o)])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        edit(layout.flatten(g), Direction(layout.flatten(o), layout), layout)
        edit_several(layout.flatten(g), *orthonormal(units, layout), layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
