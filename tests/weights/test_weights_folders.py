"""Folders as they come: SmolVLA, pi0 and pi05 of LeRobot, OpenVLA-like shards, a plain transformers model."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import assert_same, from_bf16, to_bf16, weights, write_file

from burnish.cli.main import main
from burnish.weights.extract import extract
from burnish.weights.inspect import inspect
from burnish.weights.merge import merge
from burnish.weights.names import group_of, match_names, module_of


def tuned_copy(source, target, seed=0):
    """The folder with noise on every floating tensor."""
    shutil.copytree(source, target)
    draws = torch.Generator().manual_seed(seed)
    state = load_file(source / "model.safetensors")
    moved = {
        k: v + 0.01 * torch.randn(v.shape, generator=draws) if v.is_floating_point() else v for k, v in state.items()
    }
    save_file({k: v.contiguous() for k, v in moved.items()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
def test_lerobot_policies(kind, request, tmp_path):
    """Extract, merge, and load the result as a policy that computes what the tuned one does."""
    from burnish.policies import load_policy

    base = request.getfixturevalue(f"tiny_{kind}")
    tuned = tuned_copy(base, tmp_path / "tuned")
    delta = extract(base, tuned, output=tmp_path / "delta")
    groups = {entry["group"] for entry in delta.tensors.values()}
    assert groups == {"vision", "language", "expert", "head"}
    merge(base, [(delta.path, 1.0)], output=tmp_path / "out")
    assert_same(weights(tmp_path / "out"), weights(tuned))
    merged, expected = load_policy(tmp_path / "out"), load_policy(tuned)
    batch = {f"observation.images.{c}": torch.rand(2, 3, 32, 32) for c in merged.cameras}
    batch |= {"observation.state": torch.rand(2, 7), "task": ["pick up the red cube", "open the drawer"]}
    draws = merged.draw(2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged.act(batch, draws).actions, expected.act(batch, draws).actions, rtol=0, atol=0)


def test_transformers_model(nano_vlm, tmp_path):
    from transformers import AutoModelForImageTextToText

    tuned = tuned_copy(nano_vlm, tmp_path / "tuned")
    extract(nano_vlm, tuned, output=tmp_path / "delta")
    merge(nano_vlm, [(tmp_path / "delta", 1.0)], output=tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for name, parameter in model.named_parameters():
        expected = load_file(tuned / "model.safetensors").get(name)
        assert expected is None or torch.equal(parameter, expected)


def test_openvla_like_shards(tmp_path):
    """bf16 shards; the fine-tune was saved from a wrapper and has a fresh action head of its own."""
    shapes = {
        "vision_backbone.featurizer.blocks.0.attn.qkv.weight": (12, 8), "projector.fc1.weight": (16, 8),
        "language_model.model.layers.0.self_attn.q_proj.weight": (16, 16), "language_model.lm_head.weight": (24, 16),
    }  # fmt: skip
    rng, values = np.random.default_rng(0), {}
    values["base"] = {k: from_bf16(to_bf16(rng.normal(scale=0.02, size=s))) for k, s in shapes.items()}
    values["tuned"] = {
        k: from_bf16(to_bf16(v + rng.normal(scale=0.004, size=v.shape))) for k, v in values["base"].items()
    }
    for who, prefix in (("base", ""), ("tuned", "module.")):
        names, weight_map = [prefix + k for k in shapes], {}
        for k in range(2):
            file = f"model-{k + 1:05d}-of-00002.safetensors"
            write_file(
                tmp_path / who / file, {n: ("BF16", to_bf16(values[who][n.removeprefix(prefix)])) for n in names[k::2]}
            )
            weight_map |= dict.fromkeys(names[k::2], file)
        if who == "tuned":
            head = {"module.action_head.fc1.weight": ("BF16", to_bf16(np.ones((4, 16))))}
            write_file(tmp_path / who / "model-00003.safetensors", head)
            weight_map |= dict.fromkeys(head, "model-00003.safetensors")
        (tmp_path / who / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    command = ["weights", "extract", str(tmp_path / "base"), str(tmp_path / "tuned")]
    assert main([*command, "-o", str(tmp_path / "delta")]) == 2  # the head needs a rule
    assert main([*command, "-o", str(tmp_path / "delta"), "--heads", "skip", "--verify"]) == 0
    assert main(["weights", "merge", str(tmp_path / "base"), "--delta", f"{tmp_path / 'delta'}=1",
                 "-o", str(tmp_path / "out"), "--verify"]) == 0  # fmt: skip
    assert_same(weights(tmp_path / "out"), {k: to_bf16(v) for k, v in values["tuned"].items()})


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.vlm_with_expert.vlm.model.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.vlm_with_expert.vlm.model.text_model.layers.3.mlp.up_proj.weight", "language"),
        ("model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight", "language"),
        ("model.vlm_with_expert.lm_expert.layers.3.mlp.up_proj.weight", "expert"),
        ("model.paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight", "expert"),
        ("model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm.weight", "vision"),
        ("model.action_in_proj.weight", "head"), ("model.state_proj.bias", "head"),
        ("action_head.model.fc1.weight", "head"), ("model.action_time_mlp_in.weight", "expert"),
        ("normalize_inputs.buffer_observation_state.mean", "statistics"),
        ("model.rotary_emb.inv_freq", "buffer"), ("language_model.model.embed_tokens.weight", "language"),
    ],
)  # fmt: skip
def test_groups(name, group):
    assert group_of(name, "F32") == group and group_of(name, "I64") == "buffer"


def test_names_of_wrapped_models_meet():
    reference = ["model.paligemma.layers.0.w", "model.head.w"]
    assert match_names(["paligemma.layers.0.w", "head.w"], reference) == {
        "paligemma.layers.0.w": reference[0], "head.w": reference[1],
    }  # fmt: skip
    assert match_names(["policy.model.head.w"], reference)["policy.model.head.w"] == reference[1]
    rules = [(r"^backbone\.", "model.paligemma."), (r"\.kernel$", ".w")]
    assert match_names(["backbone.layers.0.kernel"], reference, rules)["backbone.layers.0.kernel"] == reference[0]
    assert match_names(["unknown.w"], reference) == {"unknown.w": "unknown.w"}
    assert module_of("a.layers.12.mlp.w") == "a.layers.12" and module_of("head.weight") == "head"


def test_inspect(family, make, tmp_path, capsys):
    base, tuned, plain = family
    delta = extract(base, tuned, output=tmp_path / "delta")
    other = extract(base, plain, output=tmp_path / "other")
    found = inspect(delta.path, [other.path])
    a, b = (np.concatenate([d.whole(n).ravel() for n in d.tensors]) for d in (delta, other))
    against = found["others"][str(other.path)]
    assert against["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)
    assert against["sign_conflict"] == pytest.approx(np.mean(np.sign(a) != np.sign(b)), abs=1e-3)
    assert found["norm"] == pytest.approx(np.linalg.norm(a)) and sum(found["groups"].values()) == pytest.approx(1)
    heads = sum(np.square(delta.whole(n)).sum() for n in delta.tensors if "action_" in n)
    assert found["groups"]["head"] == pytest.approx(heads / (a @ a))
    assert sum(m["norm"] ** 2 for m in found["modules"].values()) == pytest.approx(a @ a)
    arguments = [str(delta.path), "--other", str(other.path), "--plots", str(tmp_path / "plots")]
    assert main(["weights", "inspect", *arguments, "--output", str(tmp_path / "found.json")]) == 0
    assert "cosine" in capsys.readouterr().out and json.loads((tmp_path / "found.json").read_text())["norm"]
    assert {p.name for p in (tmp_path / "plots").glob("*.png")} == {"norm.png", "cosine.png"}
    assert main(["weights", "control", str(delta.path), "--kind", "flip", "-o", str(tmp_path / "flip")]) == 0
    assert inspect(delta.path, [tmp_path / "flip"])["others"][str(tmp_path / "flip")]["sign_conflict"] == 1.0
    assert main(["weights", "merge", str(base), "--delta", str(delta.path), "-o", str(tmp_path / "m")]) == 0
    assert main(["weights", "verify", str(tmp_path / "m")]) == 0
    assert "elements are right" in capsys.readouterr().out
