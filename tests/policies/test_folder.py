"""Reading and writing policy folders, and every mistake that one can hold."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from idle import idle_parameters
from lerobot.configs.types import FeatureType, PolicyFeature
from safetensors.torch import load_file, save_file

from burnish.core.errors import BurnishError
from burnish.core.seeding import seeded
from burnish.policies import create_policy, load, load_policy
from burnish.policies import folder as folders
from burnish.policies.pi import PI_SIZES, small_pi
from workshop.tiny import NANO_TEXTS, build_tokenizer, default_statistics, make_tiny


def draw(policy, size=3):
    return policy.draw(size, torch.Generator().manual_seed(0))


def features(cameras=("side",), state=5, action=4):
    return {
        **{f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for c in cameras},
        "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
        "action": PolicyFeature(FeatureType.ACTION, (action,)),
    }


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the policy folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def spoil_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_round_trip(policy, batch, tmp_path):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    policy.save(tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    for (name, a), (other, b) in zip(policy.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and a.equal(b)
    assert again.act(batch, draw(policy)).actions.equal(policy.act(batch, draw(policy)).actions)
    assert again.loss(batch, draw(policy)).total.equal(policy.loss(batch, draw(policy)).total)


def test_lerobot_loads_our_folder(policy, folder, batch):
    """Stock LeRobot: same actions for the same noise through its own processors."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    with small_pi(policy.sizes) if config.type != "smolvla" else nullcontext():
        stock = get_policy_class(config.type).from_pretrained(folder)
        pre, post = make_pre_post_processors(config, pretrained_path=str(folder))
    noise = draw(policy).noise
    stock.model.sample_noise = lambda *_: noise
    observation = {k: v for k, v in batch.items() if not k.startswith("action")}
    actions = post(stock.predict_action_chunk(pre(observation)))
    assert actions.equal(policy.act(observation, draw(policy)).actions)


def test_a_moved_folder_needs_nothing_outside(folder, tmp_path, batch):
    first = shutil.copytree(folder, tmp_path / "a")
    for name in ("config.json", "policy_preprocessor.json"):
        text = (first / name).read_text().replace(str(folder), str(tmp_path / "gone"))
        (first / name).write_text(text)
    policy = load_policy(first)
    policy.save(tmp_path / "temporary", home=tmp_path / "final")
    stored = (tmp_path / "temporary/policy_preprocessor.json").read_text()
    assert str(tmp_path / "final") in stored and "temporary" not in stored and str(first) not in stored
    (tmp_path / "temporary").rename(tmp_path / "final")
    shutil.rmtree(first)
    again = load_policy(tmp_path / "final")
    assert again.act(batch, draw(policy)).actions.equal(policy.act(batch, draw(policy)).actions)


def test_hub_names_stay(tiny_smolvla, tmp_path):
    folder = shutil.copytree(tiny_smolvla, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vlm_model_name": "someone/some-vlm"}))
    folders.point_at(folder, "elsewhere/vlm")
    assert json.loads((folder / "config.json").read_text())["vlm_model_name"] == "someone/some-vlm"
    assert "elsewhere/vlm" in (folder / "policy_preprocessor.json").read_text()


def test_half_precision_and_foreign_weights(policy, tmp_path):
    doubled = {k: 2 * v for k, v in policy.policy.state_dict().items()}
    policy.save(tmp_path / "half", dtype=torch.float16, state_dict=doubled)
    assert all(v.dtype == torch.float16 for v in load_file(tmp_path / "half/model.safetensors").values())
    for a, b in zip(load_policy(tmp_path / "half").parameters(), policy.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert a.equal((2 * b).half().float())


def test_loading_draws_nothing(folder):
    before = torch.get_rng_state()
    load_policy(folder)
    assert torch.get_rng_state().equal(before)


def test_overrides_and_new_data(folder):
    stats = default_statistics(5, 4)
    policy = load_policy(
        folder, overrides={"chunk_size": 6, "n_action_steps": 2}, features=features(), dataset_stats=stats
    )
    assert (policy.cameras, policy.chunk_size, policy.n_action_steps) == (("side",), 6, 2)
    batch = {
        "observation.images.side": torch.rand(2, 3, 32, 32),
        "observation.state": stats["observation.state"]["mean"].expand(2, 5).clone(),
        "action": stats["action"]["mean"].expand(2, 6, 4).clone(),
        "task": ["open", "push"],
    }
    prepared = policy.preprocessor(batch)
    assert prepared["action"].abs().max() < 1e-5 and prepared["observation.state"].abs().max() < 1e-5
    assert policy.act(batch).actions.shape == (2, 6, 4)


def test_missing_and_unknown_tensors(copied):
    name = next(k for k in load_file(copied / "model.safetensors") if "vision" in k)
    spoil_weights(copied, lambda state: (state.pop(name), state.update(stray=torch.zeros(1))))
    with pytest.raises(BurnishError) as error:
        load_policy(copied)
    assert f"1 missing ({name}), 1 unknown" in str(error.value) and "stray" in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_shape_and_broken_file(copied):
    def cut(state):
        key = next(k for k in state if k.endswith("action_in_proj.weight"))
        state[key] = state[key][:, 1:].contiguous()

    spoil_weights(copied, cut)
    with pytest.raises(BurnishError, match="other shapes .*action_in_proj"):
        load_policy(copied)
    (copied / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BurnishError, match="model.safetensors cannot be read"):
        load_policy(copied)


def test_missing_statistics(copied):
    for file in copied.glob("policy_*processor_step_*.safetensors"):
        save_file({}, file)
    with pytest.raises(BurnishError, match=r"no statistic '\w+' of observation.state in .*copy"):
        load_policy(copied)
    (copied / "policy_preprocessor.json").unlink()
    with pytest.raises(BurnishError, match="no policy_preprocessor.json.*training"):
        load_policy(copied)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"features": features(state=9)}, "state of 9 dimensions; expected at most max_state_dim = 8"),
        ({"features": features(action=9)}, "action of 9 dimensions; expected at most max_action_dim = 8"),
        ({"features": features()}, "has 7 dimensions; expected 5"),
        ({"features": features(cameras=())}, "expected a camera"),
        ({"overrides": {"chunk_sise": 3}}, "config field 'chunk_sise'"),
        ({"overrides": {"chunk_size": "many"}}, "chunk_size is 'many'"),
        ({"overrides": {"n_action_steps": 99}}, "cannot be read: .*99"),
    ],
)
def test_bad_options(folder, options, said):
    with pytest.raises(BurnishError, match=said):
        load_policy(folder, **options)


def test_folders_that_are_none(tmp_path, tiny_smolvla):
    with pytest.raises(BurnishError, match="no policy at"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(BurnishError, match="no policy at enormous"):
        load_policy("enormous")
    folder = shutil.copytree(tiny_smolvla, tmp_path / "other")
    (folder / "config.json").write_text(json.dumps({"type": "none"}))
    with pytest.raises(BurnishError, match="policy type 'none'"):
        load_policy(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BurnishError, match="config.json is not JSON"):
        load_policy(folder)


def test_missing_vlm_files(tiny_smolvla, tmp_path):
    folder = shutil.copytree(tiny_smolvla, tmp_path / "bare")
    shutil.rmtree(folder / "vlm")
    for name in ("config.json", "policy_preprocessor.json"):
        (folder / name).write_text((folder / name).read_text().replace(str(tiny_smolvla), str(tmp_path / "gone")))
    with pytest.raises(BurnishError, match="bare"):
        load_policy(folder)


def test_shipped_bases_go_by_name(tiny_smolvla, tmp_path, monkeypatch):
    shutil.copytree(tiny_smolvla, tmp_path / "assets/small")
    folders.point_at(tmp_path / "assets/small", "vlm")
    monkeypatch.setattr(load, "ASSETS", tmp_path / "assets")
    assert load_policy("small").cameras == ("top", "wrist")


def test_new_policy_holds_the_vlm_in_float32(nano_vlm, tmp_path):
    stats = default_statistics(5, 4)
    before = torch.get_rng_state()
    policy = create_policy(nano_vlm, features(), stats, {"num_vlm_layers": 2, "chunk_size": 4, "n_action_steps": 4})
    again = create_policy(nano_vlm, features(), stats, {"num_vlm_layers": 2, "chunk_size": 4, "n_action_steps": 4})
    other = create_policy(nano_vlm, features(), stats, {"num_vlm_layers": 2}, generator_seed=1)
    assert torch.get_rng_state().equal(before)
    weights = load_file(nano_vlm / "model.safetensors")
    for name, value in policy.vlm.state_dict().items():
        assert value.dtype == torch.float32 and value.equal(weights[name])
    assert policy.num_layers == 2 and len(policy.vlm.state_dict()) < len(weights)
    expert = "policy.model.action_in_proj.weight"
    assert policy.state_dict()[expert].equal(again.state_dict()[expert])
    assert not policy.state_dict()[expert].equal(other.state_dict()[expert])
    policy.save(tmp_path / "new")
    assert json.loads((tmp_path / "new/config.json").read_text())["load_vlm_weights"] is False
    assert not (tmp_path / "new/vlm/model.safetensors").exists()
    assert load_policy(tmp_path / "new").num_layers == 2


def test_new_policy_mistakes(nano_vlm, tmp_path):
    stats = default_statistics(5, 4)
    with pytest.raises(BurnishError, match="no VLM"):
        create_policy(tmp_path, features(), stats)
    with pytest.raises(BurnishError, match="type 'smolvlm'.*paligemma, which pi0 is made of"):
        create_policy(nano_vlm, features(), stats, type="pi0")
    with pytest.raises(BurnishError, match="no statistic 'mean' of observation.state"):
        create_policy(nano_vlm, features(), {})


def test_fewer_expert_layers_leave_more_parameters_unused(nano_vlm):
    policy = create_policy(
        nano_vlm,
        features(),
        default_statistics(5, 4),
        {"num_expert_layers": 2, "self_attn_every_n_layers": 1, "chunk_size": 8, "n_action_steps": 8},
    )
    batch = {
        "observation.images.side": torch.rand(2, 3, 32, 32), "observation.state": torch.randn(2, 5),
        "action": torch.randn(2, 8, 4), "task": ["open", "push"],
    }  # fmt: skip
    policy.loss(batch).total.backward()
    idle = {n for n, p in policy.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == set(idle_parameters(policy))


def test_tiny_sizes_are_put_back():
    from lerobot.policies.pi0 import modeling_pi0

    before = modeling_pi0.get_gemma_config, modeling_pi0.PiGemmaForCausalLM
    with small_pi({"vocab_size": 9, "vision": {}, "gemma_2b": {}, "gemma_300m": {}}):
        assert modeling_pi0.get_gemma_config is not before[0]
    assert (modeling_pi0.get_gemma_config, modeling_pi0.PiGemmaForCausalLM) == before


def test_unknown_tiny_type(tmp_path):
    with pytest.raises(BurnishError, match="a tiny policy of type 'none'"):
        make_tiny("none", tmp_path)


@pytest.fixture
def nano_paligemma(tmp_path):
    """Folder of a PaliGemma in the sizes of a tiny pi0, with random weights and a tokenizer."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    sizes, tokenizer = PI_SIZES["gemma_2b"], build_tokenizer([*NANO_TEXTS, "Task: State: Action: 0 1 2 3"], 384)
    text = {
        "model_type": "gemma", "hidden_size": sizes["width"], "intermediate_size": sizes["mlp_dim"],
        "num_hidden_layers": sizes["depth"], "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"], "head_dim": sizes["head_dim"], "vocab_size": len(tokenizer),
        "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    vision = {**PI_SIZES["vision"], "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14,
              "projection_dim": sizes["width"], "vision_use_head": False}  # fmt: skip
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_id=len(tokenizer) - 1,
                             projection_dim=sizes["width"])  # fmt: skip
    with seeded(3):
        model = PaliGemmaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "paligemma")
    tokenizer.save_pretrained(tmp_path / "paligemma")
    return tmp_path / "paligemma", {**PI_SIZES, "vocab_size": len(tokenizer)}


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_a_new_pi_has_the_weights_of_its_paligemma(name, nano_paligemma, batch):
    folder, sizes = nano_paligemma
    stats = default_statistics(7, 7)
    fields = {"chunk_size": 8, "n_action_steps": 8, "max_state_dim": 8, "max_action_dim": 8, "num_inference_steps": 2,
              "image_resolution": [28, 28], "tokenizer_max_length": 96}  # fmt: skip
    with small_pi(sizes):
        policy = create_policy(folder, features(("top",), 7, 7), stats, fields, type=name)
    stored = load_file(folder / "model.safetensors")
    key = next(k for k in stored if k.endswith("layers.1.self_attn.q_proj.weight") and "language_model" in k)
    own = dict(policy.vlm.named_parameters())
    found = next(p for n, p in own.items() if n.endswith("language_model.layers.1.self_attn.q_proj.weight"))
    assert found.equal(stored[key])
    assert policy.act(batch, draw(policy)).actions.isfinite().all()
