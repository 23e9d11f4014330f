"""Inputs that look right and are not, outputs that must not be lost, and numbers at the edge of their types."""

import fcntl
import json
import os
import shutil

import numpy as np
import pytest
from weight_files import assert_same, read_file, to_bf16, weights, write_file

from burnish.core.errors import BurnishError
from burnish.core.outputs import MARK, mark
from burnish.weights.control import control
from burnish.weights.delta import Delta
from burnish.weights.extract import extract
from burnish.weights.inspect import inspect
from burnish.weights.merge import merge
from burnish.weights.rounding import difference, narrow, unequal
from burnish.weights.sources import Checkpoint
from burnish.weights.verify import verify
from burnish.weights.writer import PART, part_folder

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(6, 8)).astype(np.float32), RNG.normal(size=(5, 4)).astype(np.float32)


def folder(path, **tensors):
    """A checkpoint; float32 unless a (dtype, bits) pair is given."""
    found = {n.replace("_", "."): v if isinstance(v, tuple) else ("F32", np.float32(v)) for n, v in tensors.items()}
    write_file(path / "model.safetensors", found)
    return path


def adapter(path, module="a", rank=2, seed=0, numbers=None, **config):
    rng = np.random.default_rng(seed)
    up, down = rng.normal(size=(6, rank)).astype(np.float32), rng.normal(size=(rank, 8)).astype(np.float32)
    names = {"lora_A": ("F32", down), "lora_B": ("F32", up)} | (numbers or {})
    write_file(
        path / "adapter_model.safetensors", {f"base_model.model.{module}.{n}.weight": v for n, v in names.items()}
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, up.astype(float) @ down


@pytest.fixture
def pair(tmp_path):
    """A base and a fine-tune of two matrices."""
    return folder(tmp_path / "base", a_weight=A, b_weight=B), folder(tmp_path / "tuned", a_weight=A + 1, b_weight=B + 1)


# --- what is no number to subtract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3"])
@pytest.mark.parametrize("who", ["base", "tuned", "both"])
def test_quantised_weights(pair, tmp_path, dtype, who):
    bits = (dtype, np.ones((6, 8), np.uint8))
    base = folder(tmp_path / "q0", a_weight=bits, b_weight=B) if who != "tuned" else pair[0]
    tuned = folder(tmp_path / "q1", a_weight=bits, b_weight=B + 1) if who != "base" else pair[1]
    with pytest.raises(BurnishError, match=f"'a.weight' is {dtype}"):
        extract(base, tuned, output=tmp_path / "d")
    with pytest.raises(BurnishError, match=f"'a.weight' is {dtype}"):
        merge(base, tuned=[(tuned, 1.0)], output=tmp_path / "m")
    assert set(extract(base, tuned, exclude=["^a"], output=tmp_path / "d").tensors) == {"b.weight"}


def test_an_adapter_of_a_quantised_base(tmp_path):
    base = folder(tmp_path / "q", a_weight=("I8", np.ones((6, 8), np.uint8)))
    with pytest.raises(BurnishError, match="I8"):
        extract(base, adapter(tmp_path / "lora")[0], output=tmp_path / "d")


@pytest.mark.parametrize("numbers", [("F8_E4M3", np.ones((2, 8), np.uint8)), ("F32", np.full((2, 8), np.nan, "f4"))])
def test_adapters_without_proper_numbers(pair, tmp_path, numbers):
    with pytest.raises(BurnishError, match="lora_A"):
        extract(pair[0], adapter(tmp_path / "lora", numbers={"lora_A": numbers})[0], output=tmp_path / "d")


def test_factors_are_not_subtracted_one_by_one(pair, tmp_path):
    one, two = adapter(tmp_path / "one")[0], adapter(tmp_path / "two", seed=1)[0]
    for base, tuned in ((one, two), (one / "adapter_model.safetensors", two / "adapter_model.safetensors")):
        with pytest.raises(BurnishError, match="adapter factor"):
            extract(base, tuned, output=tmp_path / "d")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "of_next_year"])
def test_adapters_whose_base_was_changed(pair, tmp_path, start):
    with pytest.raises(BurnishError, match=start):
        extract(pair[0], adapter(tmp_path / "lora", init_lora_weights=start)[0], output=tmp_path / "d")


@pytest.mark.parametrize("config", [{"r": None}, {"lora_alpha": "x"}, {"alpha_pattern": {"(": 3}},
                                    {"rank_pattern": ["a"]}])  # fmt: skip
def test_adapter_configs_that_cannot_be(pair, tmp_path, config):
    with pytest.raises(BurnishError, match="adapter_config|lora"):
        extract(pair[0], adapter(tmp_path / "lora", **config)[0], output=tmp_path / "d")


@pytest.mark.parametrize(("pattern", "alpha"), [("^a", 32), ("a", 32), ("model.a", 4), ("^model", 4)])
def test_patterns_are_searched_in_the_models_own_names(pair, tmp_path, pattern, alpha):
    path, product = adapter(tmp_path / "lora", alpha_pattern={pattern: 32})
    delta = extract(pair[0], path, output=tmp_path / "d")
    np.testing.assert_allclose(delta.whole("a.weight"), alpha / 2 * product, rtol=1e-6)


def test_an_adapter_that_changes_nothing_chosen(pair, tmp_path):
    with pytest.raises(BurnishError, match="none of the chosen"):
        extract(pair[0], adapter(tmp_path / "lora")[0], include=["^b"], output=tmp_path / "d")


# --- what was made of what -------------------------------------------------------------------------------------------


def test_low_rank_deltas_of_two_scales_are_two_deltas(pair, tmp_path):
    deltas = [
        extract(pair[0], adapter(tmp_path / f"l{k}", lora_alpha=k)[0], output=tmp_path / f"d{k}") for k in (4, 40)
    ]
    assert deltas[0].digest != deltas[1].digest
    merge(pair[0], [(deltas[0].path, 1.0)], output=tmp_path / "m")
    with pytest.raises(BurnishError, match="exists"):
        merge(pair[0], [(deltas[1].path, 1.0)], output=tmp_path / "m")


def test_a_finished_output_is_taken_only_for_the_same_inputs(pair, tmp_path):
    base, tuned = pair
    other = folder(tmp_path / "other", a_weight=A + 2, b_weight=B + 2)
    for path in (tuned, other):
        os.utime(path / "model.safetensors", (1e9, 1e9))
    lora, _ = adapter(tmp_path / "lora")
    for k, first in enumerate((tuned, lora)):
        extract(base, first, output=tmp_path / f"d{k}")
        merge(base, tuned=[(first, 1.0)], output=tmp_path / f"m{k}")
    adapter(lora, lora_alpha=40)
    for k, second in enumerate((other, lora)):
        with pytest.raises(BurnishError, match="exists"):
            extract(base, second, output=tmp_path / f"d{k}")
        with pytest.raises(BurnishError, match="exists"):
            merge(base, tuned=[(second, 1.0)], output=tmp_path / f"m{k}")
    (tmp_path / "m0/model.safetensors").unlink()
    with pytest.raises(BurnishError, match="exists"):
        merge(base, tuned=[(tuned, 1.0)], output=tmp_path / "m0")


def test_deltas_of_two_bases(pair, tmp_path):
    base, tuned = pair
    second = folder(tmp_path / "second", a_weight=A + 0.5, b_weight=B)
    one, two = extract(base, tuned, output=tmp_path / "d1").path, extract(second, tuned, output=tmp_path / "d2").path
    for order in ((one, two), (two, one)):
        for root in (base, second):
            with pytest.raises(BurnishError, match="another base"):
                merge(root, [(path, 0.5) for path in order], output=tmp_path / "m")
    merge(base, [(one, 0.5), (two, 0.5)], output=tmp_path / "m", other_base=True)


def test_heads_of_another_robot_that_have_the_same_shape(make, family, tmp_path):
    """pi0 and SmolVLA pad state and action, so shapes cannot tell."""
    base, tuned, _ = family
    make.joints = 14
    other = make.save("other", make.values["control"])
    same_weights = make.save("twin", make.values["base"])
    for refused in (lambda: extract(base, other, output=tmp_path / "d"),
                    lambda: extract(base, tuned, other, output=tmp_path / "d"),
                    lambda: merge(base, tuned=[(other, 1.0)], output=tmp_path / "m")):  # fmt: skip
        with pytest.raises(BurnishError, match="across robots"):
            refused()
    delta = extract(base, tuned, output=tmp_path / "d").path
    with pytest.raises(BurnishError, match="across robots"):
        merge(same_weights, [(delta, 1.0)], output=tmp_path / "m")
    merge(same_weights, [(delta, 1.0)], heads="skip", output=tmp_path / "m")
    assert "model.action_in_proj.weight" not in extract(base, other, heads="skip", output=tmp_path / "d2").tensors


# --- what must not be lost -------------------------------------------------------------------------------------------


def test_an_output_that_holds_an_input(pair, tmp_path):
    base, tuned = pair
    delta = extract(base, tuned, output=tmp_path / "deltas/d").path
    for output in (base, delta, delta.parent, tmp_path):
        with pytest.raises(BurnishError, match="would replace"):
            merge(base, [(delta, 1.0)], output=output, force=True)
    with pytest.raises(BurnishError, match="would replace"):
        control(delta, "flip", output=delta, force=True)
    assert Delta(delta).norm() > 0 and (base / "model.safetensors").is_file()


def test_outputs_that_cannot_be(pair, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "base")
    for output, force in (("", False), (".", True), ("..", True), (tmp_path / "file/sub", False),
                          (tmp_path / "file", True), (tmp_path / "link", True)):  # fmt: skip
        with pytest.raises(BurnishError):
            merge(pair[0], tuned=[(pair[1], 1.0)], output=output, force=force)
    assert (tmp_path / "file").read_text() == "x" and (tmp_path / "link").is_symlink()


def test_one_writer_at_a_time(pair, tmp_path):
    part = part_folder(tmp_path / "m")
    part.mkdir()
    mark(part, PART)
    (part / "model.safetensors").write_bytes(b"of the other process")
    handle = os.open(part / MARK, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(BurnishError, match="another process"):
        merge(pair[0], tuned=[(pair[1], 1.0)], output=tmp_path / "m")
    assert (part / "model.safetensors").read_bytes() == b"of the other process"
    os.close(handle)
    merge(pair[0], tuned=[(pair[1], 1.0)], output=tmp_path / "m")
    assert not part.exists()


def test_what_a_killed_writer_left_is_no_obstacle(pair, tmp_path):
    merge(pair[0], tuned=[(pair[1], 1.0)], output=tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / ".m.old")
    merge(pair[0], tuned=[(pair[1], 2.0)], output=tmp_path / "m", force=True)
    assert not (tmp_path / ".m.old").exists()
    np.testing.assert_allclose(weights(tmp_path / "m")["a.weight"], A + 2, rtol=1e-6)


# --- files in odd places ---------------------------------------------------------------------------------------------


def test_shards_in_folders_of_their_own(pair, tmp_path):
    base = tmp_path / "cut"
    write_file(base / "one/w.safetensors", {"a.weight": ("F32", A)})
    write_file(base / "two/w.safetensors", {"b.weight": ("F32", B)})
    index = {"metadata": None, "weight_map": {"a.weight": "one/w.safetensors", "b.weight": "two/w.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    (base / "action_head--1.pt").write_bytes(b"a part of its own")
    merge(base, tuned=[(pair[1], 1.0)], output=tmp_path / "m")
    assert verify(tmp_path / "m") == {"elements": 68, "unequal": 0}
    assert_same(
        weights(pair[1]), read_file(tmp_path / "m/one/w.safetensors") | read_file(tmp_path / "m/two/w.safetensors")
    )
    assert not (tmp_path / "m/pytorch_model.bin").exists() and (tmp_path / "m/action_head--1.pt").is_file()


@pytest.mark.parametrize("change", [{"metadata": 3}, {"weight_map": {"a.weight": 3}}, {"weight_map": ["a"]},
                                    {"weight_map": {"a.weight": "../base/model.safetensors"}}])  # fmt: skip
def test_indices_that_lie(tmp_path, change):
    tmp_path.joinpath("model.safetensors.index.json").write_text(json.dumps({"weight_map": {}, **change}))
    with pytest.raises(BurnishError, match="index"):
        Checkpoint(tmp_path)


def test_reads_that_the_system_cuts_short(pair, monkeypatch):
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, at: plain(handle, [buffers[0][:7]], at))
    assert np.array_equal(Checkpoint(pair[0]).read("a.weight", 3, 48).view(np.float32), A.ravel()[3:])


@pytest.mark.parametrize("name", ["weights.safetensors", "0a1b2c"])
def test_a_single_file_of_any_name(pair, tmp_path, name):
    file = tmp_path / "blobs" / name
    file.parent.mkdir()
    shutil.copy(pair[0] / "model.safetensors", file)
    delta = extract(file, pair[1], output=tmp_path / "d").path
    merge(file, [(delta, 1.1)], output=tmp_path / "m")
    assert verify(tmp_path / "m")["unequal"] == 0


def test_verify_knows_how_names_were_matched(tmp_path):
    """One wrapper's name is the tail of many names: `norm.weight` and `layers.0.norm.weight`."""
    names = ("norm_weight", "layers_0_norm_weight", "layers_1_norm_weight")
    base = folder(tmp_path / "base", **{f"model_{name}": A[0] for name in names})
    tuned = folder(tmp_path / "tuned", **{name: A[0] + k for k, name in enumerate(names)})
    assert verify(extract(base, tuned, output=tmp_path / "d").path)["unequal"] == 0
    other = folder(tmp_path / "other", **{f"old_{name}": A[0] + k for k, name in enumerate(names)})
    assert verify(extract(base, other, output=tmp_path / "d2", rename=[("^old", "model")]).path)["unequal"] == 0
    for rule in (("(", "x"), ("old", r"\9")):
        with pytest.raises(BurnishError, match="--rename"):
            extract(base, other, output=tmp_path / "d3", rename=[rule])


def test_verify_of_a_merge_with_left_out_tensors(pair, tmp_path):
    more = folder(tmp_path / "more", a_weight=A + 1, b_weight=B + 1, extra_weight=B)
    with pytest.raises(BurnishError, match="--exclude"):
        merge(pair[0], tuned=[(more, 1.0)], output=tmp_path / "m")
    merge(pair[0], tuned=[(more, 1.0)], exclude=["extra"], output=tmp_path / "m")
    assert verify(tmp_path / "m")["unequal"] == 0
    folder(tmp_path / "m", a_weight=A)
    with pytest.raises(BurnishError, match="lacks 'b.weight'"):
        verify(tmp_path / "m")


def test_a_control_vector_is_not_verified(pair, tmp_path):
    delta = extract(*pair, output=tmp_path / "d").path
    made = control(delta, "permute", output=tmp_path / "c").path
    with pytest.raises(BurnishError, match="control vector"):
        verify(made)


def test_inspect_reads_no_damaged_numbers(pair, tmp_path):
    delta = extract(*pair, output=tmp_path / "d").path
    content = bytearray((delta / "delta.safetensors").read_bytes())
    content[-1] ^= 1
    (delta / "delta.safetensors").write_bytes(content)
    with pytest.raises(BurnishError, match="damaged"):
        inspect(delta, [delta])


@pytest.mark.parametrize("content", [b"[1]", b"\xff", b'"text"'])
def test_records_that_are_none(pair, tmp_path, content):
    delta = extract(*pair, output=tmp_path / "d").path
    (delta / "delta.json").write_bytes(content)
    with pytest.raises(BurnishError, match=r"delta\.json"):
        Delta(delta)


# --- weights and numbers ---------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite(pair, tmp_path):
    for weight in (np.nan, np.inf, -np.inf):
        with pytest.raises(BurnishError, match="finite"):
            merge(pair[0], tuned=[(pair[1], weight)], output=tmp_path / "m")
        with pytest.raises(BurnishError, match="finite"):
            merge(pair[0], tuned=[(pair[1], 1.0)], modules=[("a", weight)], output=tmp_path / "m")
    with pytest.raises(BurnishError, match="scale"):
        merge(pair[0], tuned=[(pair[1], 1.0)], operator="ties", options={"scale": "nan"}, output=tmp_path / "m")
    with pytest.raises(BurnishError, match="threads"):
        merge(pair[0], tuned=[(pair[1], 1.0)], threads=-1, output=tmp_path / "m")


def test_infinities_that_nobody_changed(tmp_path):
    """Masks are stored as -inf; -inf - -inf is no number, but also no change."""
    mask = np.array([0.0, -np.inf, np.inf, 1.0], np.float32)
    base = folder(tmp_path / "base", mask=mask, a_weight=A)
    tuned = folder(tmp_path / "tuned", mask=mask, a_weight=A + 1)
    delta = extract(base, tuned, output=tmp_path / "d").path
    for name, how in (("stored", {"deltas": [(delta, 1.1)]}), ("on_the_fly", {"tuned": [(tuned, 1.1)]})):
        merge(base, **how, output=tmp_path / name)
        np.testing.assert_array_equal(weights(tmp_path / name)["mask"], mask)
        assert verify(tmp_path / name)["unequal"] == 0


def test_difference_in_place():
    control_, tuned = np.array([1.0, np.inf, -0.0, 2.0]), np.array([3.0, np.inf, -0.0, -np.inf])
    out = difference(tuned, control_, tuned)
    assert out is tuned and out.tolist() == [2.0, 0.0, 0.0, -np.inf] and np.signbit(out[[1, 2]]).all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001])
def test_every_nan_stays_one_in_bfloat16(bits):
    with np.errstate(invalid="ignore"):
        value = np.array([1.0, np.array(bits, np.uint32).view(np.float32)], np.float64)
    out = narrow(value, "BF16", np.empty(2, np.uint16))
    assert (out[1] & 0x7F80) == 0x7F80 and out[1] & 0x7F and out[0] == to_bf16(np.float32([1.0]))[0]


def test_the_sign_of_a_zero(tmp_path):
    """0.0 plus anything is never -0.0, so that is counted and not claimed."""
    base, tuned = folder(tmp_path / "b", a=[0.0, -0.0, 1.0]), folder(tmp_path / "t", a=[-0.0, 0.0, 2.0])
    delta = extract(base, tuned, output=tmp_path / "d")
    assert delta.meta["not_exact"] == 1 and verify(delta.path)["unequal"] == 0
    assert unequal(np.float32([0.0, np.nan, 1]), np.float32([-0.0, -np.nan, 1])).tolist() == [True, False, False]


def test_float16_has_a_largest_number(tmp_path):
    base = folder(tmp_path / "b", a=("F16", np.full(4, 4e4, np.float16)))
    tuned = folder(tmp_path / "t", a=("F16", np.full(4, 6e4, np.float16)))
    with pytest.raises(BurnishError, match="--dtype fp32"):
        merge(base, tuned=[(tuned, 3.0)], output=tmp_path / "m")
    merge(base, tuned=[(tuned, 3.0)], dtype="fp32", output=tmp_path / "m")
    assert weights(tmp_path / "m")["a"][0] == pytest.approx(1e5, rel=1e-3)


def test_a_linear_merge_is_the_average_of_all_models(pair, tmp_path):
    """A delta that lacks a tensor stands for a model that has it as in the base; a module's factor still counts."""
    base, tuned = pair
    whole, half = (extract(base, tuned, output=tmp_path / n, include=i).path for n, i in (("d1", []), ("d2", ["^a"])))
    merge(base, [(whole, 1.0), (half, 3.0)], operator="linear", modules=[("^a", 0.5)], output=tmp_path / "m")
    got = weights(tmp_path / "m")
    np.testing.assert_allclose(got["a.weight"], A + 0.5, rtol=1e-6)
    np.testing.assert_allclose(got["b.weight"], B + 0.25, rtol=1e-6)
    assert verify(tmp_path / "m")["unequal"] == 0


def test_a_module_factor_in_ties(pair, tmp_path):
    delta = extract(*pair, output=tmp_path / "d").path
    merge(pair[0], [(delta, 1.0)], operator="ties", options={"density": "1.0"}, modules=[("^a", 0.5)],
          output=tmp_path / "m")  # fmt: skip
    got = weights(tmp_path / "m")
    np.testing.assert_allclose(got["a.weight"], A + 0.5, rtol=1e-6)
    np.testing.assert_allclose(got["b.weight"], B + 1, rtol=1e-6)
    assert verify(tmp_path / "m")["unequal"] == 0


@pytest.mark.parametrize("how", [{"operator": "dare"}, {"include": ["embed"]}, {"modules": [("embed", 0.5)]}])
def test_tied_weights_stay_tied(tmp_path, how):
    base = folder(tmp_path / "base", embed_weight=A, lm__head_weight=A)
    tuned = folder(tmp_path / "tuned", embed_weight=A + B[0, 0], lm__head_weight=A + B[0, 0])
    for path in (base, tuned):  # `folder` cannot write an underscore
        found = read_file(path / "model.safetensors")
        values = {n.replace("lm..head", "lm_head"): ("F32", v) for n, v in found.items()}
        write_file(path / "model.safetensors", values)
    delta = extract(base, tuned, output=tmp_path / "d").path
    merge(base, [(delta, 1.0)], output=tmp_path / "m", **how)
    got = weights(tmp_path / "m")
    assert np.array_equal(got["embed.weight"], got["lm_head.weight"]) and not np.array_equal(got["embed.weight"], A)
    merge(base, [(delta, 1.0)], exclude=["lm_head"], output=tmp_path / "n")
    assert_same(weights(tmp_path / "n"), weights(base))
    with pytest.raises(BurnishError, match="tied"):
        extract(base, tuned, include=["embed"], output=tmp_path / "d2")
