"""OpenVLA and OpenVLA-OFT on tiny weights: every verb against plain forwards of transformers' own model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from burnish.policies.openvla.actions import ActionSpace
from burnish.policies.openvla.files import PROMPT
from burnish.runtime.decoders import compare_decoders
from workshop.tiny import default_statistics, make_tiny

A, T, L = 7, 8, 56
START, STOP = 1, 2


@pytest.fixture
def folder(tiny_openvla):
    return tiny_openvla


@pytest.fixture(scope="module")
def openvla(tiny_openvla):
    return load_policy(tiny_openvla)


@pytest.fixture(scope="module")
def oft(tiny_openvla_oft):
    return load_policy(tiny_openvla_oft)


@pytest.fixture(params=["openvla", "oft"])
def both(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("change", [
    {"vision_backbone_id": ["x"]}, {"burnish": {"cameras": [["x"]]}}, {"burnish": {"cameras": []}},
    {"burnish": {"towers": [3, None]}}, {"text_config": {"pad_token_id": 10**9}},
], ids=str)  # fmt: skip
def test_a_config_that_is_none_is_one_line(tiny_openvla, tmp_path, change):
    folder = Path(shutil.copytree(tiny_openvla, tmp_path / "policy"))
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BurnishError):
        load_policy(folder)


def draw(policy, size=3):
    return policy.draw(size, torch.Generator().manual_seed(0))


def observation(batch):
    return {k: v for k, v in batch.items() if not k.startswith("action")}


def alone(batch, row):
    return {k: v[row : row + 1] for k, v in batch.items()}


def embedded(policy, batch, row):
    """[S, D] embeddings of one observation, spelt out: <s>, cameras, the state, the prompt with its empty word."""
    net, embed = policy.policy, policy.policy.text_model.embed_tokens
    prepared = policy._prepare(alone(batch, row), None)
    views = [net.projector(net.vision_backbone(view))[0] for view in policy.prepare_images(prepared)[0]]
    words = policy.tokenizer(PROMPT.format(instruction=batch["task"][row].lower()), add_special_tokens=False)[
        "input_ids"
    ]
    words.append(policy.tokenizer.convert_tokens_to_ids("▁"))
    state = [net.proprio_projector(prepared["observation.state"])] if policy.continuous else []
    return torch.cat([embed(torch.tensor([START])), *views, *state, embed(torch.tensor(words))])


def ids_of(policy, actions):
    """Token ids of raw actions by numpy's digitize, as the released tokenizer writes them."""
    import numpy as np

    normalised = policy.preprocessor(actions).double().numpy()
    bins = np.digitize(np.clip(normalised, -1, 1), np.linspace(-1, 1, 256))
    return torch.from_numpy(704 - bins).flatten(-2)


def log_p(policy, prompt, ids):
    """[len(ids) + 1, V] log-softmax behind one prompt, by one plain causal forward of LlamaForCausalLM."""
    states = torch.cat([prompt, policy.policy.text_model.embed_tokens(ids)])[None]
    return policy.policy.language_model(inputs_embeds=states).logits[0, len(prompt) - 1 :].log_softmax(-1)


def test_loss_is_the_cross_entropy_of_actions_and_the_end(openvla, batch):
    ids, kept = ids_of(openvla, batch["action"]), ~batch["action_is_pad"]
    out, sums, counts = openvla.loss(batch), [], []
    for row in range(3):
        found = log_p(openvla, embedded(openvla, batch, row), ids[row])
        nats = [-found[i, token].item() for i, token in enumerate(ids[row].tolist()) if kept[row, i // A]]
        nats += [-found[L, STOP].item()] if bool(kept[row, -1]) else []
        sums.append(sum(nats))
        counts.append(len(nats))
    torch.testing.assert_close(out.per_sample, torch.tensor(sums) / torch.tensor(counts))
    torch.testing.assert_close(out.total, torch.tensor(sum(sums) / sum(counts)))
    assert counts == [57, 57, 42]


def test_score_is_the_sum_of_log_softmax(openvla, batch):
    """Exact, also for several chunks in one pass; padded steps count nothing, and draws change nothing."""
    more = torch.stack([batch["action"], batch["action"].flip(1) * 0.7], dim=1)
    pads = torch.stack([batch["action_is_pad"], torch.zeros(3, T, dtype=torch.bool)], dim=1)
    draws = draw(openvla)
    several = type(draws)(draws.noise[:, None].expand(3, 2, 1, 1), draws.time[:, None].expand(3, 2))
    found = openvla.scores({**observation(batch), "action_is_pad": pads}, more, several)
    assert found.shape == (3, 2, 2) and found[..., 0].equal(found[..., 1])
    for row in range(3):
        prompt = embedded(openvla, batch, row)
        for chunk in range(2):
            ids = ids_of(openvla, more[row, chunk])
            wanted = log_p(openvla, prompt, ids)[range(L), ids].view(T, A)[~pads[row, chunk]].sum()
            torch.testing.assert_close(found[row, chunk, 0], wanted, rtol=1e-5, atol=1e-4)
    assert openvla.score(batch, more[:, 0], draws).equal(found[:, 0, 0]) or torch.allclose(
        openvla.score(batch, more[:, 0], draws), found[:, 0, 0], rtol=1e-5
    )
    assert openvla.supports("likelihood") and openvla.supports("tokens")


def test_actions_are_greedy_and_independent_of_the_batch(openvla, batch):
    chunk = openvla.act(observation(batch)).actions
    prompt, ids = embedded(openvla, batch, 2), []
    for _ in range(L):
        ids.append(int(log_p(openvla, prompt, torch.tensor(ids, dtype=torch.long))[-1].argmax()))
    expected = openvla.postprocessor(openvla.config.space.decode(torch.tensor([ids])))
    assert chunk[2:].equal(expected) and chunk.shape == (3, T, A)
    assert openvla.act(observation(alone(batch, 2))).actions.equal(chunk[2:])
    streamed = []
    openvla.act(observation(batch), stream=lambda steps, actions: streamed.append((steps, actions.clone())))
    assert [steps for steps, _ in streamed] == list(range(1, T + 1)) and streamed[-1][1].equal(chunk)
    prefix = batch["action"][:, :3]
    longer = openvla.act(observation(batch), prefix=prefix).actions
    assert longer[:, :3].equal(prefix) and longer.shape == chunk.shape


def test_decoders_measure_it(openvla):
    found = compare_decoders(openvla, count=1, repeats=1, progress=False)
    assert list(found["decoders"]) == ["autoregressive"] and "MASK" in found["refused"]["confidence"]


def regressed(policy, batch, row):
    """[T, A] of one sample: every position sees every other, actions are zeros, </s> stands at the end."""
    net, prompt = policy.policy, embedded(policy, batch, row)
    stop = net.text_model.embed_tokens(torch.tensor([STOP]))
    states = torch.cat([prompt, torch.zeros(L, prompt.shape[1]), stop])[None]
    everything = torch.zeros(1, 1, states.shape[1], states.shape[1])
    hidden = net.text_model(inputs_embeds=states, attention_mask=everything).last_hidden_state[0]
    return net.action_head.model(hidden[len(prompt) - 1 : len(prompt) - 1 + L].reshape(T, -1))


def test_oft_regresses_the_whole_chunk(oft, batch):
    wanted = torch.stack([regressed(oft, batch, row) for row in range(3)])
    torch.testing.assert_close(oft.act(observation(batch)).actions, oft.postprocessor(wanted))
    errors = (wanted - oft.preprocessor(batch["action"])).abs()[~batch["action_is_pad"]]
    out = oft.loss(batch)
    torch.testing.assert_close(out.total, errors.mean())
    torch.testing.assert_close(oft.score(batch, batch["action"], draw(oft)).sum(), -errors.sum())
    with pytest.raises(BurnishError, match="no way to continue"):
        oft.act(observation(batch), prefix=batch["action"][:, :2])
    assert oft.name == "openvla_oft" and oft.supports("score") and not oft.supports("likelihood")
    with pytest.raises(BurnishError, match="no action tokens"):
        oft.token_model()
    state = {**batch, "observation.state": batch["observation.state"] + 0.3}
    assert not oft.loss(state).total.equal(out.total)


def test_which_parameters_learn(both, batch):
    """All but what the released code leaves idle too: the last vision blocks and what comes after them."""
    both.zero_grad(set_to_none=True)
    both.loss(batch).total.backward()
    idle = {name for name, p in both.named_parameters() if p.grad is None}
    after = ("featurizer.blocks.2.", "featurizer.norm.", "featurizer.attn_pool.")
    wanted = {name for name, _ in both.named_parameters() if any(part in name for part in after)}
    assert idle - wanted == ({"policy.language_model.lm_head.weight"} if both.continuous else set())
    assert wanted <= idle
    both.zero_grad(set_to_none=True)
    vlm = dict(both.backbone_parameters())
    assert not any("action_head" in name or "proprio" in name for name in vlm) and len(vlm) > 50


def test_layout_points_at_the_embeddings(both, batch):
    entered = []
    handle = both.policy.text_model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda _m, a: entered.append(a[0])
    )
    with both.capture([0, 3]) as captured, torch.no_grad():
        both.loss(batch)
    handle.remove()
    assert captured.layout["image"].sum(1).tolist() == [8, 8, 8] and set(captured.cameras) == {"top", "wrist"}
    assert captured.hidden[0].shape[:2] == captured.layout["text"].shape == captured.layout["action"].shape
    assert captured.layout["state"].sum() == (3 if both.continuous else 0)
    assert captured.layout["action"].sum(1).tolist() == [L] * 3
    for row in range(3):
        lone = embedded(both, batch, row)
        shown = torch.cat([captured.layout[name][row][:, None] for name in ("image", "state", "text")], 1).any(1)
        torch.testing.assert_close(entered[0][row][shown], lone[1:], rtol=1e-5, atol=1e-6)


def test_language_is_log_softmax_and_reads_images_as_the_loss_does(both, batch, questions):
    image = both.embed_image(both.prepare_images({both.camera_keys[0]: questions["observation.images.top"]})[0][0])
    loss, tok = both.language(questions), both.tokenizer
    for row in range(3):
        prompt = tok(f"Question: {questions['question'][row]}\nAnswer:", add_special_tokens=False)["input_ids"]
        answer = [*tok(f" {questions['answer'][row]}", add_special_tokens=False)["input_ids"], STOP]
        embed = both.policy.text_model.embed_tokens
        states = torch.cat([embed(torch.tensor([START])), image[row], embed(torch.tensor(prompt))])
        found = log_p(both, states, torch.tensor(answer))
        wanted = torch.stack([-found[i, token] for i, token in enumerate(answer)])
        torch.testing.assert_close(loss.per_token[row][loss.mask[row]], wanted, rtol=1e-4, atol=1e-4)
    said = both.answer(questions, max_new_tokens=3)
    assert said == [both.answer(alone(questions, row), max_new_tokens=3)[0] for row in range(3)]
    if not both.continuous:
        with both.capture([3]) as captured, torch.no_grad():
            both.language(questions, through="prefix")
        asked = captured.hidden[3][captured.layout["image"]]
        with both.capture([3]) as captured, torch.no_grad():
            both.loss(batch)
        torch.testing.assert_close(asked.view(3, 4, -1), captured.hidden[3][:, captured.cameras["top"]])


def test_a_saved_folder_is_the_published_one(both, batch, tmp_path):
    both.save(tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    for (name, a), (other, b) in zip(both.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and a.equal(b)
    assert again.act(observation(batch)).actions.equal(both.act(observation(batch)).actions)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["model_type"] == "openvla" and "burnish" in config["norm_stats"]
    assert json.loads((tmp_path / "saved/dataset_statistics.json").read_text()) == config["norm_stats"]
    names = set(load_file(tmp_path / "saved/model.safetensors"))
    assert {name.partition(".")[0] for name in names} == {"vision_backbone", "projector", "language_model"}
    assert "vision_backbone.featurizer.blocks.0.ls1.scale_factor" in names
    assert "vision_backbone.fused_featurizer.attn_pool.latent" in names
    heads = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert heads == (["action_head.safetensors"] if both.continuous else []) + ["model.safetensors"] + (
        ["proprio_projector.safetensors"] if both.continuous else []
    )


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def shard(folder, dtype=torch.bfloat16):
    """Weights as they are published: half precision, in shards."""
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


def test_a_published_folder_loads_and_none_of_its_code_runs(copied, batch, tmp_path):
    """Shards in bfloat16, statistics of the fine-tuning beside config.json, `auto_map` with code."""
    state = shard(copied)
    config = json.loads((copied / "config.json").read_text())
    own = {"towers": config["burnish"]["towers"], "chunk_size": T, "cameras": ["top", "wrist"]}
    stats = config["norm_stats"].pop("burnish")
    names = {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.Other",
    }
    edit(copied, burnish=own, norm_stats={"bridge_orig": stats, "other": stats}, auto_map=names)
    (copied / "dataset_statistics.json").write_text(json.dumps({"libero_spatial_no_noops": stats}))
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        told = json.loads((copied / name).read_text())
        (copied / name).write_text(json.dumps({**told, "auto_map": {"AutoProcessor": "processing_prismatic.Own"}}))
    ran = tmp_path / "ran"
    for name in ("configuration_prismatic", "modeling_prismatic"):
        (copied / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').write('ran')\n")
    policy = load_policy(copied)
    assert all(value.dtype == torch.float32 for value in policy.state_dict().values())
    assert all(tensor.float().equal(policy.policy.state_dict()[name]) for name, tensor in state.items())
    assert policy.config.settings.unnorm_key == "libero_spatial_no_noops"
    policy.save(tmp_path / "saved")
    assert (tmp_path / "saved/modeling_prismatic.py").read_bytes() == (copied / "modeling_prismatic.py").read_bytes()
    assert json.loads((tmp_path / "saved/config.json").read_text())["auto_map"] == names
    again = load_policy(tmp_path / "saved")
    assert again.act(observation(batch)).actions.equal(policy.act(observation(batch)).actions) and not ran.exists()
    half = load_policy(tmp_path / "saved", overrides={"dtype": "bfloat16"})
    assert half.policy.projector.fc1.weight.dtype == torch.bfloat16
    assert half.act(observation(batch)).actions.shape == (3, T, A)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_resize_strategy": "letterbox"}, "resize-naive"),
        ({"vision_backbone_id": "siglip-vit-so400m"}, "dinosiglip"),
        ({"n_action_bins": 1e9}, "2 to 4096"),
        ({"text_config": {"model_type": "phi"}}, "llama"),
        ({"text_config": {"model_type": "llama", "vocab_size": 768, "hidden_size": 4096}}, "belongs to the weights"),
        ({"norm_stats": {}}, "no norm_stats"),
        ({"norm_stats": {"a": 1}}, "'action'"),
        ({"norm_stats": {"a": {"action": {"q01": [0.0], "q99": ["x"]}}}}, "list of numbers"),
        ({"norm_stats": {"a": {"action": {"q01": [1.0], "q99": [0.0]}}}}, "lower and upper"),
        ({"norm_stats": {"a": {"action": {"q01": [0.0], "q99": [1.0], "mask": [1]}}}}, "true or false"),
        ({"burnish": []}, "table of settings"),
        ({"burnish": {"zoom": 1}}, "unknown option 'zoom'"),
        ({"burnish": {"towers": [{"embed_dim": 1e9}, {}]}}, "embed_dim"),
        ({"image_sizes": [29, 29]}, "multiple"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(copied, change, message):
    if "norm_stats" in change:
        (copied / "dataset_statistics.json").unlink()
        config = json.loads((copied / "config.json").read_text())
        edit(copied, burnish={**config["burnish"], "unnorm_key": ""})
    edit(copied, **change)
    with pytest.raises(BurnishError, match=message):
        load_policy(copied)


def test_statistics_are_chosen_by_name(copied):
    config = json.loads((copied / "config.json").read_text())
    stats = config["norm_stats"]["burnish"]
    other = json.loads(json.dumps(stats))
    other["action"]["q99"] = [value + 1 for value in other["action"]["q99"]]
    (copied / "dataset_statistics.json").write_text(json.dumps({"first": stats, "second": other}))
    edit(copied, burnish={**config["burnish"], "unnorm_key": ""})
    with pytest.raises(BurnishError, match="2 data sets.*unnorm_key=first"):
        load_policy(copied)
    with pytest.raises(BurnishError, match="unnorm_key 'third'"):
        load_policy(copied, overrides={"unnorm_key": "third"})
    highs = [load_policy(copied, overrides={"unnorm_key": key}).config.space.high for key in ("first", "second")]
    torch.testing.assert_close(highs[1] - highs[0], torch.ones(A, dtype=torch.float64))


def test_damaged_files_are_one_line(copied):
    (copied / "tokenizer.json").write_text('{"model": {"vocab": {"a": 123456789}}}')
    with pytest.raises(BurnishError, match="7 digits"):
        load_policy(copied)
    (copied / "tokenizer.json").unlink()
    with pytest.raises(BurnishError, match=r"tokenizer\.json"):
        load_policy(copied)


def test_new_data_brings_statistics_cameras_and_an_oft_head(folder, tmp_path, batch):
    """The recipe of OFT from a plain OpenVLA: the head is new, and stored from then on."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    features = {
        "observation.images.side": PolicyFeature(FeatureType.VISUAL, (3, 40, 52)),
        "observation.state": PolicyFeature(FeatureType.STATE, (5,)),
        "action": PolicyFeature(FeatureType.ACTION, (4,)),
    }
    policy = load_policy(folder, overrides={"head": "l1", "proprio": True, "chunk_size": 3, "n_action_steps": 2},
                         features=features, dataset_stats=default_statistics(5, 4))  # fmt: skip
    assert (policy.cameras, policy.action_dim, policy.state_dim, policy.n_action_steps) == (("side",), 4, 5, 2)
    assert policy.view_sizes == {"side": (40, 52)} and policy.normalization("ACTION") == "QUANTILES"
    stateless = {key: one for key, one in features.items() if key != "observation.state"}
    plain = load_policy(folder, features=stateless, dataset_stats=default_statistics(5, 4))
    assert plain.cameras == ("side",) and plain.act({key: batch[key] for key in ("task",)} | {
        "observation.images.side": torch.rand(len(batch["task"]), 3, 40, 52)}).actions.shape[-1] == 4  # fmt: skip
    with pytest.raises(BurnishError, match="reads the robot's state, and the data set has none"):
        load_policy(folder, overrides={"proprio": True}, features=stateless, dataset_stats=default_statistics(5, 4))
    policy.save(tmp_path / "new")
    seen = {
        "observation.images.side": torch.rand(2, 3, 40, 52),
        "observation.state": torch.zeros(2, 5),
        "task": ["a", "b"],
    }
    again = load_policy(tmp_path / "new")
    assert again.act(seen).actions.equal(policy.act(seen).actions) and again.act(seen).actions.shape == (2, 3, 4)
    with pytest.raises(BurnishError, match="head of another robot"):
        load_policy(tmp_path / "new", features={**features, "action": PolicyFeature(FeatureType.ACTION, (2,))},
                    dataset_stats=default_statistics(5, 2))  # fmt: skip
    with pytest.raises(BurnishError, match="state of 3 dimensions"):
        again.act({**seen, "observation.state": torch.zeros(2, 3)})
    (tmp_path / "new/action_head.safetensors").unlink()
    with pytest.raises(BurnishError, match=r"no action_head\.safetensors"):
        load_policy(tmp_path / "new")


def space(**table):
    limits = {"q01": [-2.0, 0.0, 1.0], "q99": [2.0, 1.0, 1.0], **table}
    return ActionSpace({"action": limits}, "bounds_q99", 256, 704, 768, "mask" in table, "here")


def test_actions_are_normalised_clipped_and_binned():
    plain = space()
    raw = torch.tensor([[-3.0, 0.25, 1.0], [1.0, 1.0, 7.0]])
    assert plain.normalise(raw).tolist() == [[-1.0, -0.5, 0.0], [0.5, 1.0, 0.0]]
    torch.testing.assert_close(plain.denormalise(torch.tensor([[0.5, -1.0, 0.0]])), torch.tensor([[1.0, 0.0, 1.0]]))
    ids = plain.encode(torch.tensor([[[-1.0, 0.0, 1.0]]]))
    assert ids.tolist() == [[703, 576, 448]]
    values = plain.decode(torch.tensor([[703, 448, 3, 449, 767, 576]]))
    assert values.flatten().tolist() == pytest.approx(
        [-254 / 255, 254 / 255, 254 / 255, 254 / 255, -254 / 255, 0], abs=1e-6
    )
    drawn = torch.rand(1, 100, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (plain.decode(plain.encode(drawn)) - drawn).abs().max() <= 1 / 255 + 1e-6
    gripper = space(mask=[True, True, False])
    assert gripper.normalise(torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]]))[:, 2].tolist() == [1.0, 0.0]
    assert gripper.denormalise(torch.tensor([[0.0, 0.0, 0.9], [0.0, 0.0, 0.1]]))[:, 2].tolist() == [-1.0, 1.0]


def test_without_timm_one_line_says_what_to_install(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BurnishError, match=r"pip install 'burnish\[openvla\]'"):
        load_policy(folder)


def test_a_tiny_one_is_made_by_name(tmp_path):
    policy = load_policy(make_tiny("openvla", tmp_path / "one", overrides={"chunk_size": 1, "n_action_steps": 1}))
    assert policy.config.length == 7 and F.softmax(policy.policy.head.weight[:1], -1).isfinite().all()
