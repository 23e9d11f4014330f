"""What must hold exactly: merge of 0 and 1, linearity, shards, threads, seams between pieces and blocks."""

import json

import numpy as np
import pytest
from weight_files import assert_same, from_bf16, read_file, to_bf16, weights

from burnish.weights.control import control
from burnish.weights.delta import Delta
from burnish.weights.extract import extract
from burnish.weights.merge import merge
from burnish.weights.verify import verify


def delta_of(delta: Delta, name: str) -> np.ndarray:
    """The stored numbers of one tensor as float64, read by hand."""
    return read_file(delta.path / "delta.safetensors")[name].astype(np.float64)


def test_merge_of_nothing_is_the_base(family, tmp_path):
    base, tuned, _ = family
    extract(base, tuned, output=tmp_path / "delta")
    merge(base, [(tmp_path / "delta", 0.0)], output=tmp_path / "out")
    assert_same(weights(tmp_path / "out"), weights(base))


def test_base_plus_delta_is_the_tuned_model_bit_for_bit(family, tmp_path):
    base, tuned, _ = family
    delta = extract(base, tuned, output=tmp_path / "delta")
    assert delta.meta["not_exact"] == 0
    assert extract(base, tuned, output=tmp_path / "single", dtype="fp32").meta["not_exact"] > 0  # would not have done
    merge(base, [(tmp_path / "delta", 1.0)], output=tmp_path / "out")
    assert_same(weights(tmp_path / "out"), weights(tuned))
    assert verify(tmp_path / "delta")["unequal"] == verify(tmp_path / "out")["unequal"] == 0


def test_even_where_the_change_is_far_larger_than_the_result(make, tmp_path):
    """Cancellation: 1 + d = 1e-8 needs more bits of d than float32 has; unchanged -0.0 stays -0.0."""
    start = np.array([1.0, 3.1415927, -0.0, 0.0, 1e-20, 7.0], np.float32)
    end = np.array([1e-8, -2.7e-6, -0.0, 0.0, 5.0, 7.0], np.float32)
    base, tuned = make.save("a", {"model.w.weight": start}), make.save("b", {"model.w.weight": end})
    extract(base, tuned, output=tmp_path / "delta")
    merge(base, [(tmp_path / "delta", 1.0)], output=tmp_path / "out")
    assert_same(weights(tmp_path / "out"), weights(tuned))


def test_what_float64_cannot_hold_is_counted(make, tmp_path):
    base, tuned = (make.save(n, {"model.w": np.array([v], np.float32)}) for n, v in (("a", 3.1415927), ("b", -2.7e-9)))
    delta = extract(base, tuned, output=tmp_path / "delta")
    assert delta.meta["not_exact"] == 1
    merge(base, [(delta.path, 1.0)], output=tmp_path / "out")
    got = weights(tmp_path / "out")["model.w"]
    assert abs(int(got.view(np.int32)[0]) - int(np.float32(-2.7e-9).view(np.int32))) == 1  # one unit in the last place


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_parents(make, tmp_path, dtype):
    base, tuned = make("base", 0, dtype=dtype), make("tuned", 1, of="base", dtype=dtype)
    delta = extract(base, tuned, output=tmp_path / "delta")
    assert {info.dtype for info in delta.numbers.tensors.values()} == {"F32"} and 0 < delta.meta["rounding_noise"] < 1
    merge(base, [(tmp_path / "delta", 1.0)], output=tmp_path / "out")
    assert_same(weights(tmp_path / "out"), weights(tuned))


def test_a_coarser_delta_says_that_it_is_not_exact(family, tmp_path):
    base, tuned, _ = family
    delta = extract(base, tuned, output=tmp_path / "delta", dtype="bf16")
    assert delta.meta["not_exact"] > 0


def test_half_precision_base_with_float32_fine_tune(make, tmp_path):
    """The merged tensors take the wider type, or the fine-tune would be rounded away."""
    base, tuned = make("base", 0, dtype="F16"), make("tuned", 1, of="base")
    extract(base, tuned, output=tmp_path / "delta")
    merge(base, [(tmp_path / "delta", 1.0)], output=tmp_path / "out")
    assert_same(weights(tmp_path / "out"), weights(tuned))
    merge(base, [(tmp_path / "delta", 1.0)], output=tmp_path / "narrow", dtype="base")
    assert {v.dtype for v in weights(tmp_path / "narrow").values()} == {np.dtype(np.float16), np.dtype(np.int64)}


def test_weights_add_up(family, tmp_path):
    """Two deltas in either order, and one delta in two portions, in float64 rounded once."""
    base, tuned, control_model = family
    one = extract(base, tuned, output=tmp_path / "one").path
    two = extract(base, control_model, output=tmp_path / "two").path
    merge(base, [(one, 0.7), (two, 0.4)], output=tmp_path / "ab")
    merge(base, [(two, 0.4), (one, 0.7)], output=tmp_path / "ba")
    merge(base, [(one, 0.3), (one, 0.4), (two, 0.4)], output=tmp_path / "aab")
    expected = weights(tmp_path / "ab")
    for other in ("ba", "aab"):
        for key, value in weights(tmp_path / other).items():
            np.testing.assert_allclose(value, expected[key], rtol=1.2e-7, atol=1e-12)


def test_the_vector_of_two_fine_tunes(family, make, tmp_path):
    base, tuned, plain = family
    delta = extract(base, tuned, plain, output=tmp_path / "delta")
    merge(base, [(delta.path, 1.1)], output=tmp_path / "out")
    b, t, c = (make.values[name] for name in ("base", "tuned", "control"))
    for key, value in weights(tmp_path / "out").items():
        if key in b:
            np.testing.assert_array_equal(value, (b[key] + 1.1 * delta_of(delta, key)).astype(np.float32))
            np.testing.assert_allclose(value, b[key] + 1.1 * (t[key] - c[key]), rtol=1e-5, atol=1e-8)
    task, other = (np.concatenate([(x[k] - b[k]).ravel() for k in b]).astype(float) for x in (c, t))
    geometry = delta.meta["geometry"]
    cosine = task @ other / np.linalg.norm(task) / np.linalg.norm(other)
    assert geometry["cosine_of_tasks"] == pytest.approx(cosine, abs=1e-4)
    ratio = np.linalg.norm(other - task) / np.linalg.norm(task)
    assert geometry["norm_over_control_task"] == pytest.approx(ratio, rel=1e-4)
    assert delta.norm() == pytest.approx(np.linalg.norm(other - task), rel=1e-4)


def test_without_a_stored_delta(family, tmp_path):
    base, tuned, plain = family
    extract(base, tuned, plain, output=tmp_path / "delta")
    merge(base, [(tmp_path / "delta", 1.1)], output=tmp_path / "stored")
    merge(base, tuned=[(tuned, 1.1), (plain, -1.1)], output=tmp_path / "on_the_fly")
    for key, value in weights(tmp_path / "on_the_fly").items():
        np.testing.assert_allclose(value, weights(tmp_path / "stored")[key], rtol=2e-6, atol=1e-9)
    assert verify(tmp_path / "on_the_fly")["unequal"] == 0


def test_heads_alone(family, tmp_path):
    base, tuned, _ = family
    merge(base, tuned=[(tuned, 0.5)], output=tmp_path / "out", include=["action_in_proj"], heads="keep")
    got, before = weights(tmp_path / "out"), weights(base)
    assert {name for name in got if not np.array_equal(got[name], before[name])} == {"model.action_in_proj.weight"}
    assert verify(tmp_path / "out")["unequal"] == 0


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_shards_and_threads_change_nothing(make, tmp_path, dtype):
    base, tuned = make("base", 0, dtype=dtype), make("tuned", 1, of="base", dtype=dtype)
    cut = make.save("cut", make.values["base"], dtype, shards=3)
    cut_tuned = make.save("cut_tuned", make.values["tuned"], dtype, shards=2)
    one = extract(base, tuned, output=tmp_path / "one", threads=1)
    two = extract(cut, cut_tuned, output=tmp_path / "two", threads=3)
    assert one.digest == two.digest and one.meta["base"]["digest"] == two.meta["base"]["digest"]
    for operator in ("task", "dare", "ties"):
        merge(base, [(one.path, 1.1)], output=tmp_path / f"{operator}1", operator=operator, threads=1)
        record = merge(cut, [(one.path, 1.1)], output=tmp_path / f"{operator}2", operator=operator, threads=3)
        assert_same(weights(tmp_path / f"{operator}1"), weights(tmp_path / f"{operator}2"))
    index = json.loads((tmp_path / "task2/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in weights(cut).values())
    assert set(index["weight_map"].values()) == {p.name for p in (tmp_path / "task2").glob("*.safetensors")}
    assert len(record["tensors"]) == len(weights(cut))


def test_tensors_of_many_pieces(make, tmp_path, monkeypatch):
    """Pieces and blocks are seams that must not show."""
    from burnish.weights import tensorfile

    base, tuned = make("base", 0, dtype="BF16"), make("tuned", 1, of="base", dtype="BF16")
    extract(base, tuned, output=tmp_path / "whole")
    merge(base, [(tmp_path / "whole", 1.1)], output=tmp_path / "one")
    monkeypatch.setattr(tensorfile, "PIECE", 1000)
    monkeypatch.setattr(tensorfile.blocks, "__defaults__", (300,))
    extract(base, tuned, output=tmp_path / "pieces")
    merge(base, [(tmp_path / "pieces", 1.1)], output=tmp_path / "two")
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert verify(tmp_path / "two")["unequal"] == verify(tmp_path / "pieces")["unequal"] == 0


def test_companions_come_along_and_point_to_their_new_home(family, tmp_path):
    base, tuned, _ = family
    extract(base, tuned, output=tmp_path / "delta")
    merge(base, [(tmp_path / "delta", 1.0)], output=tmp_path / "out")
    assert (tmp_path / "out/vlm/tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out/config.json").read_text())["vlm_model_name"] == str(tmp_path / "out/vlm")
    assert not list(tmp_path.glob(".*"))


def test_modules_and_patterns(family, make, tmp_path):
    base, tuned, _ = family
    delta = extract(base, tuned, output=tmp_path / "delta")
    merge(base, [(tmp_path / "delta", 1.0)], output=tmp_path / "out", modules=[("lm_expert", 0.0), ("vision", 0.5)],
          exclude=["action_"])  # fmt: skip
    got, b = weights(tmp_path / "out"), make.values["base"]
    for key in b:
        share = 0.0 if "lm_expert" in key or "action_" in key else 0.5 if "vision" in key else 1.0
        exact = (b[key] + share * delta_of(delta, key)).astype(np.float32)
        np.testing.assert_array_equal(got[key], exact, err_msg=key)


def test_tied_weights_are_kept_once_and_merged_twice(make, tmp_path):
    shared = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    other = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    base = make.save("base", dict.fromkeys(names, shared))
    tuned = make.save("tuned", dict.fromkeys(names, other))
    delta = extract(base, tuned, output=tmp_path / "delta")
    assert len(delta.tensors) == 1
    assert delta.norm() == pytest.approx(np.linalg.norm((other - shared).astype(float)), rel=1e-6)
    merge(base, [(delta.path, 1.0)], output=tmp_path / "out")
    assert_same(weights(tmp_path / "out"), weights(tuned))


@pytest.mark.parametrize("kind", ["permute", "flip", "noise", "rescale"])
def test_control_vectors(family, tmp_path, kind):
    base, tuned, plain = family
    delta = extract(base, tuned, plain, output=tmp_path / "delta")
    reference = extract(base, tuned, output=tmp_path / "reference")
    made = control(delta.path, kind, output=tmp_path / kind, norm_of=reference.path, seed=3)
    assert made.norm() == pytest.approx(reference.norm(), rel=0.02)
    factor = reference.norm() / delta.norm()
    for name in delta.tensors:
        old, new = delta.whole(name), made.whole(name)
        if kind == "permute":
            np.testing.assert_allclose(np.sort(new.ravel()), np.sort(factor * old.ravel()), rtol=1e-5, atol=1e-9)
        elif kind != "noise":
            np.testing.assert_allclose(new, (-factor if kind == "flip" else factor) * old, rtol=1e-5, atol=1e-9)
    again = control(delta.path, kind, output=tmp_path / "again", norm_of=reference.path, seed=3)
    assert again.digest == made.digest
    merge(base, [(made.path, 1.0)], output=tmp_path / "out")


def test_difference_of_a_model_to_itself_is_zero(family, tmp_path):
    base, tuned, _ = family
    delta = extract(base, tuned, tuned, output=tmp_path / "delta")
    assert delta.norm() == 0 and Delta(delta.path).norm() == 0


def test_bf16_rounding_helper_of_the_tests():
    values = np.array([1.0, 1.00390625, 1.01171875, -3.0e38], np.float32)
    assert from_bf16(to_bf16(values))[1] == 1.0 and from_bf16(to_bf16(values))[2] == 1.015625
