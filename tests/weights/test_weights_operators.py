"""Operators against plain numpy on whole tensors; rounding against exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_files import weights

from burnish.core.seeding import derive_seed
from burnish.weights.extract import extract
from burnish.weights.merge import merge
from burnish.weights.operators import OPERATORS, kth_largest
from burnish.weights.rounding import narrow, narrowed, widen, widened
from burnish.weights.verify import verify


@pytest.fixture
def two(family, tmp_path):
    """Base folder, its values, and two deltas with theirs."""
    base, tuned, other = family
    deltas = [extract(base, path, output=tmp_path / f"d{k}") for k, path in enumerate((tuned, other))]
    values = [{name: d.whole(name) for name in d.tensors} for d in deltas]
    return base, [d.path for d in deltas], values


def merged(base, parts, tmp_path, **how):
    merge(base, parts, output=tmp_path / "out", **how)
    return weights(tmp_path / "out")


def check(got, expected, names):
    for name in names:
        np.testing.assert_allclose(got[name], expected(name).astype(np.float32), rtol=2e-7, atol=1e-12, err_msg=name)


def test_task_and_linear(make, two, tmp_path):
    base, paths, (a, b) = two
    start = make.values["base"]
    got = merged(base, [(paths[0], 1.1), (paths[1], -0.5)], tmp_path)
    for name in a:
        np.testing.assert_array_equal(got[name], (start[name] + 1.1 * a[name] + -0.5 * b[name]).astype(np.float32))
    merge(base, [(paths[0], 3.0), (paths[1], 1.0)], output=tmp_path / "lin", operator="linear")
    models = [start[n].astype(float) + a[n] for n in a], [start[n].astype(float) + b[n] for n in a]
    average = {n: 0.75 * x + 0.25 * y for n, x, y in zip(a, *models, strict=True)}
    check(weights(tmp_path / "lin"), lambda n: average[n], a)


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_slerp(make, two, tmp_path, t):
    base, paths, (a, _) = two
    got = merged(base, [(paths[0], t)], tmp_path, operator="slerp")

    def expected(name):
        p = make.values["base"][name].astype(float)
        q = p + a[name]
        if p.size == 0:
            return p
        cosine = (p * q).sum() / np.linalg.norm(p) / np.linalg.norm(q)
        if abs(cosine) >= 0.9995:
            return p + t * (q - p)
        omega = np.arccos(cosine)
        return np.sin((1 - t) * omega) / np.sin(omega) * p + np.sin(t * omega) / np.sin(omega) * q

    check(got, expected, a)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties(make, two, tmp_path, normalize):
    base, paths, deltas = two
    used = (1.0, 0.5)
    got = merged(base, list(zip(paths, used, strict=True)), tmp_path, operator="ties",
                 options={"density": "0.3", "normalize": str(normalize), "scale": "0.8"})  # fmt: skip

    def expected(name):
        trimmed = []
        for d in deltas:
            flat = np.abs(d[name]).astype(np.float32).ravel()
            if not flat.size:
                return make.values["base"][name]
            limit = np.sort(flat)[::-1][max(1, round(0.3 * flat.size)) - 1]
            trimmed.append(np.where(np.abs(d[name]).astype(np.float32) >= limit, d[name], 0))
        sign = np.sign(used[0] * trimmed[0] + used[1] * trimmed[1])
        total, share = 0.0, 0.0
        for w, d in zip(used, trimmed, strict=True):
            agrees = (np.sign(d) == sign) & (d != 0)
            total, share = total + w * d * agrees, share + w * agrees
        if normalize:
            total = np.divide(total, share, out=np.zeros_like(total), where=share > 0)
        return make.values["base"][name] + 0.8 * total

    check(got, expected, deltas[0])


def test_dare(make, two, tmp_path):
    """Each element is either untouched or moved by the rescaled delta; share and draw are what they should be."""
    base, paths, (a, _) = two
    got = merged(base, [(paths[0], 1.0)], tmp_path, operator="dare", options={"drop": "0.6", "seed": "5"})
    moved = total = 0
    for name, delta in a.items():
        start = make.values["base"][name]
        draws = np.concatenate([
            np.random.default_rng(derive_seed(5, name, 0, at)).random(min(1 << 15, delta.size - at))
            for at in range(0, delta.size, 1 << 15)
        ] or [np.empty(0)]).reshape(delta.shape)  # fmt: skip
        expected = np.where(draws >= 0.6, start + delta / 0.4, start).astype(np.float32)
        np.testing.assert_allclose(got[name], expected, rtol=2e-7, atol=1e-12)
        moved, total = moved + (got[name] != start).sum(), total + delta.size
    assert abs(moved / total - 0.4) < 0.01


HALF = """
import numpy as np
from burnish.weights.operators import Block, operator

@operator("{name}")
def {name}(block: Block, *, share: float = 0.5) -> np.ndarray:
    return block.base + share * sum(block.deltas)
"""


def test_an_operator_is_one_file_of_the_room(make, two, tmp_path, monkeypatch):
    import burnish.weights

    (tmp_path / "more").mkdir()
    (tmp_path / "more/halving.py").write_text(HALF.format(name="halving"))
    monkeypatch.setattr(OPERATORS, "_entries", dict(OPERATORS._entries))
    monkeypatch.setattr(burnish.weights, "__path__", [*burnish.weights.__path__, str(tmp_path / "more")])
    base, paths, (a, b) = two
    got = merged(base, [(p, 1.0) for p in paths], tmp_path, operator="halving", options={"share": 0.25})
    check(got, lambda name: make.values["base"][name] + 0.25 * (a[name] + b[name]), a)
    assert verify(tmp_path / "out")["unequal"] == 0


def test_an_operator_of_another_package(make, two, tmp_path, monkeypatch):
    from importlib.metadata import EntryPoint

    (tmp_path / "outside_operators.py").write_text(HALF.format(name="outside"))
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("outside", "outside_operators:outside", "burnish.merge_operators")
    monkeypatch.setattr(OPERATORS, "_entries", dict(OPERATORS._entries))
    monkeypatch.setattr("burnish.core.registry.entry_points", lambda group: [point] if group == point.group else [])
    assert {"outside", "task", "dare"} <= set(OPERATORS)
    base, paths, (a, _) = two
    got = merged(base, [(paths[0], 1.0)], tmp_path, operator="outside")
    check(got, lambda name: make.values["base"][name] + 0.5 * a[name], a)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), st.data())
def test_kth_largest(values, data):
    k = data.draw(st.integers(1, len(values)))
    array = np.array(values)
    blocks = np.array_split(array, 3)
    assert kth_largest(lambda: iter(blocks), k) == np.sort(np.abs(array).astype(np.float32))[::-1][k - 1]


def nearest_bf16(value: float) -> int:
    """Bits of the nearest bfloat16, ties to even, by exact comparison with both neighbours."""
    magnitude = Fraction(abs(value))
    bits = int(np.array(abs(value), np.float32).view(np.uint32)) >> 16
    candidates = [b for b in (bits - 1, bits, bits + 1) if 0 <= b < 0x7F80]

    def number(b):
        return Fraction(float(np.array(b << 16, np.uint32).view(np.float32)))

    best = min(candidates, key=lambda b: (abs(number(b) - magnitude), b & 1))
    return best | (0x8000 if np.signbit(value) else 0)


def near_midpoints() -> st.SearchStrategy[float]:
    """Doubles on and within a few units of the points between two bfloat16, where rounding twice goes wrong."""

    def build(bits, ulps, sign):
        middle = float(np.array((bits << 16) | 0x8000, np.uint32).view(np.float32))
        return sign * float(np.array(np.float64(middle).view(np.int64) + ulps).view(np.float64))

    return st.builds(build, st.integers(0, 0x7F00), st.integers(-3, 3), st.sampled_from([1.0, -1.0]))


@settings(deadline=None)
@given(st.lists(near_midpoints() | st.floats(-1e38, 1e38), min_size=1, max_size=40))
def test_bf16_is_rounded_once(values):
    value = np.array(values)
    expected = np.array([nearest_bf16(v) for v in values], np.uint16)
    np.testing.assert_array_equal(narrow(value.copy(), "BF16", np.empty(value.size, np.uint16)), expected)
    np.testing.assert_array_equal(narrowed(value, "BF16"), expected)


def test_strange_numbers():
    value = np.array([np.nan, np.inf, -np.inf, 3.4e38, 0.0, -0.0, 1e300, 5e-324])
    for bits in (narrow(value.copy(), "BF16", np.empty(8, np.uint16)), narrowed(value, "BF16")):
        back = widened(bits, "BF16")
        assert np.isnan(back[0]) and back[1] == np.inf and back[2] == -np.inf and back[6] == np.inf
        assert back[3] == np.inf and np.signbit(back[5]) and not np.signbit(back[4]) and back[7] == 0
    assert np.isinf(narrow(np.array([1e300]), "F32", np.empty(1, np.float32)))


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=50))
def test_widening_is_exact(bits):
    raw = np.array(bits, np.uint16)
    expected = (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    np.testing.assert_array_equal(widen(raw, "BF16", np.empty(raw.size)), expected)
