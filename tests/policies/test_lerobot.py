"""The wrapper of every LeRobot type without a file of its own, on folders that LeRobot itself wrote."""

import importlib.util
import json
import shutil
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature

from burnish.core.errors import BurnishError
from burnish.core.provenance import weights_hash
from burnish.core.types import Draws
from burnish.data.loader import RobotData
from burnish.policies import create_policy, load_policy
from burnish.policies.draws import drawn
from burnish.policies.lerobot import LeRobotPolicy
from workshop import policy_table
from workshop.tiny import KINDS as TINY
from workshop.tiny import default_statistics, make_tiny

diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
KINDS = ["act", pytest.param("diffusion", marks=diffusers), "vqbet"]
FIELDS = {
    "act": {"chunk_size": 8, "n_action_steps": 6, "dim_model": 32, "n_heads": 2, "dim_feedforward": 48,
            "n_encoder_layers": 3, "latent_dim": 4, "n_vae_encoder_layers": 1, "pretrained_backbone_weights": None},
    "diffusion": {"n_obs_steps": 2, "horizon": 16, "n_action_steps": 6, "down_dims": (8, 16), "n_groups": 4,
                  "diffusion_step_embed_dim": 16, "spatial_softmax_num_keypoints": 4, "num_train_timesteps": 10,
                  "num_inference_steps": 3, "pretrained_backbone_weights": None, "use_group_norm": True,
                  "drop_n_last_frames": 3},
    "vqbet": {"n_obs_steps": 3, "n_action_pred_token": 2, "action_chunk_size": 4, "crop_shape": (48, 48),
              "vqvae_embedding_dim": 16, "vqvae_enc_hidden_dim": 16, "gpt_block_size": 32, "gpt_input_dim": 32,
              "gpt_output_dim": 32, "gpt_n_layer": 2, "gpt_n_head": 2, "gpt_hidden_dim": 32,
              "spatial_softmax_num_keypoints": 4, "use_group_norm": True, "pretrained_backbone_weights": None},
}  # fmt: skip
"""Tiny, and otherwise LeRobot's defaults."""


def features(cameras, state=7, action=7, size=(32, 32)):
    return {
        **{f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, *size)) for c in cameras},
        "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
        "action": PolicyFeature(FeatureType.ACTION, (action,)),
    }


def write_by_lerobot(kind, folder, cameras=("top", "wrist"), **sizes):
    """What LeRobot's own save_pretrained leaves of a policy and its processors."""
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    cameras = cameras[:1] if kind == "vqbet" else cameras
    edge = 32 if kind == "act" else 64  # one place of a spatial softmax would say nothing
    declared = features(cameras, **{"size": (edge, edge), **sizes})
    config = make_policy_config(kind, device="cpu", push_to_hub=False, **FIELDS[kind])
    config.output_features = {"action": declared.pop("action")}
    config.input_features = declared
    stats = default_statistics(sizes.get("state", 7), sizes.get("action", 7))
    picture = {"mean": torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), "std": torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)}
    stats |= {key: picture for key in declared if "images" in key}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = get_policy_class(kind)(config)
        if kind == "vqbet":  # its first training phase, over in a real checkpoint
            policy.vqbet.action_head.vqvae_model.discretized.fill_(True)
    pre, post = make_pre_post_processors(config, dataset_stats=stats)
    for part in (policy, pre, post):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = write_by_lerobot(kind, tmp_path_factory.mktemp("lerobot") / kind)
        return made[kind]

    return get


@pytest.fixture(params=KINDS)
def folder(request, folders):
    return folders(request.param)


@pytest.fixture
def policy(folder):
    return load_policy(folder)


def batch_for(policy, size=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    n, window = policy.chunk_size, len(policy.window.observations)
    lead = (size, window) if window > 1 else (size,)
    pad = torch.zeros(size, n, dtype=torch.bool)
    pad[-1, -2:] = True
    sizes = policy.view_sizes.items()
    return {
        **{f"observation.images.{c}": torch.rand(*lead, 3, *size, generator=g) for c, size in sizes},
        "observation.state": torch.randn(*lead, policy.state_dim, generator=g),
        "action": torch.randn(size, n, policy.action_dim, generator=g), "action_is_pad": pad,
        "task": ["open", "push", "lift the cube"][:size],
    }  # fmt: skip


def noise(policy, size=3, seed=1):
    return policy.draw(size, torch.Generator().manual_seed(seed))


def stock(folder):
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder)
    return policy, *make_pre_post_processors(config, pretrained_path=str(folder))


def test_it_acts_as_lerobot_does(policy, folder):
    """Step by step through LeRobot's select_action, the last moments of which are our batch."""
    theirs, pre, post = stock(folder)
    batch, draws = batch_for(policy), noise(policy)
    ours = policy.act(batch, draws).actions
    assert ours.shape == (3, policy.act_steps, 7)
    moments = len(policy.window.observations)
    seen = {k: v for k, v in batch.items() if k.startswith("observation") or k == "task"}
    theirs.reset()
    for s in range(moments):
        now = {k: v[:, s] if moments > 1 and k != "task" else v for k, v in seen.items()}
        waiting = theirs._action_queue if policy.name == "act" else theirs._queues["action"]
        waiting.clear()
        with drawn(draws.noise):
            first = theirs.select_action(pre(now))
    rest = list(waiting if isinstance(waiting, deque) else ())
    expected = torch.stack([post(action) for action in (first, *rest)], dim=1)
    assert expected.shape[1] == policy.n_action_steps
    assert torch.allclose(ours[:, : expected.shape[1]], expected, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_its_loss_is_lerobots(policy, folder, training):
    theirs, pre, _ = stock(folder)
    batch, draws = batch_for(policy), noise(policy)
    policy.train(training)
    theirs.train(training)
    prepared = pre({**batch})
    torch.manual_seed(0)
    with drawn(draws.noise):
        expected, _ = theirs(prepared)
    torch.manual_seed(0)
    out = policy.loss(batch, draws)
    assert out.total.requires_grad and torch.allclose(out.total, expected, rtol=1e-5)
    assert out.per_sample.shape == (3,) and all(part.ndim == 0 for part in out.parts.values())


def test_a_row_is_the_same_alone_and_nothing_is_drawn_outside(policy):
    batch, draws, before = batch_for(policy), noise(policy), torch.get_rng_state()
    whole = policy.act(batch, draws).actions
    assert policy.act(batch, draws).actions.equal(whole)
    alone = {k: v[1:2] for k, v in batch.items()}
    assert torch.allclose(policy.act(alone, Draws(draws.noise[1:2], draws.time[1:2])).actions[0], whole[1], atol=1e-5)
    assert torch.get_rng_state().equal(before)
    assert policy.loss(batch, draws).total.equal(policy.loss(batch, draws).total)
    if policy.name == "diffusion":
        assert not policy.act(batch, noise(policy, seed=2)).actions.allclose(whole, atol=1e-3)


def test_it_is_saved_as_lerobot_reads_it(policy, folder, tmp_path):
    assert weights_hash(folder) != ""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    policy.save(tmp_path / "saved")
    again, batch, draws = load_policy(tmp_path / "saved"), batch_for(policy), noise(policy)
    assert again.act(batch, draws).actions.equal(policy.act(batch, draws).actions)
    theirs, _, _ = stock(tmp_path / "saved")
    for (name, a), (other, b) in zip(theirs.state_dict().items(), policy.policy.state_dict().items(), strict=True):
        assert name == other and a.equal(b)


def test_a_tokenizer_is_saved_with_it(folders, nano_vlm, tmp_path):
    """As types have one that read their instruction."""
    folder = shutil.copytree(folders("act"), tmp_path / "from")
    shutil.copytree(nano_vlm, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    steps = json.loads((folder / "policy_preprocessor.json").read_text())
    steps["steps"].insert(2, {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "owner/name"}})
    (folder / "policy_preprocessor.json").write_text(json.dumps(steps))
    policy = load_policy(folder)
    policy.save(tmp_path / "saved")
    shutil.rmtree(folder)
    stored = json.loads((tmp_path / "saved/policy_preprocessor.json").read_text())["steps"][2]["config"]
    assert stored["tokenizer_name"] == str(tmp_path / "saved/tokenizer")
    again = load_policy((tmp_path / "saved").rename(tmp_path / "moved"))
    batch, tokens = batch_for(policy), "observation.language.tokens"
    assert again._prepare(batch, None)[tokens].equal(policy._prepare(batch, None)[tokens])
    assert again.act(batch, noise(policy)).actions.equal(policy.act(batch, noise(policy)).actions)


def test_acting_leaves_training_on(policy):
    policy.train()
    policy.act(batch_for(policy), noise(policy))
    assert policy.policy.training


def test_every_camera_and_the_state_count(policy):
    batch, draws = batch_for(policy), noise(policy)
    whole = policy.act(batch, draws).actions
    for key in (*policy.camera_keys, "observation.state"):
        assert not policy.act({**batch, key: torch.zeros_like(batch[key])}, draws).actions.equal(whole), key


def test_what_it_lacks_is_one_line(policy):
    asked = {
        "score": lambda: policy.score({}, torch.zeros(1), noise(policy)), "language": lambda: policy.language({}),
        "act": lambda: policy.act({}, None, torch.zeros(1, 2, 7)),
    }  # fmt: skip
    for verb, ask in asked.items():
        with pytest.raises(BurnishError, match=f"{verb}: a policy of type {policy.name} has no ") as error:
            ask()
        assert "\n" not in str(error.value)
    with pytest.raises(BurnishError, match=r"actions of shape \(3, 1, 7\)"):
        policy.loss({**batch_for(policy), "action": torch.zeros(3, 1, 7)})


@pytest.mark.parametrize(("kind", "moments"), [("vqbet", 3)])
def test_a_missing_moment_is_named(folders, kind, moments):
    policy = load_policy(folders(kind))
    batch = batch_for(policy)
    with pytest.raises(BurnishError, match=f"observation.state of shape .*3.* moments as a policy of type {kind}"):
        policy.act({**batch, "observation.state": batch["observation.state"][:, 0]})


def test_the_loader_gives_the_moments_and_actions_of_lerobots(folder, dataset):
    """Against LeRobotDataset with the timestamps that LeRobot derives from the policy's config."""
    from lerobot.datasets import LeRobotDataset
    from lerobot.datasets.factory import resolve_delta_timestamps

    policy = load_policy(folder)
    data = RobotData(dataset, ["front"], policy.chunk_size, 4, 0, augmented=False, progress=False, window=policy.window)
    theirs = LeRobotDataset("local/fake", root=dataset)
    shifts = resolve_delta_timestamps(policy.config, theirs.meta)
    shifts = {k: v for k, v in shifts.items() if k in ("action", "observation.state")}
    theirs = LeRobotDataset("local/fake", root=dataset, delta_timestamps=shifts)
    ends, drop = np.cumsum([9, 10, 11]), policy.window.drop_last
    assert set(data.indices) == {r for r in range(30) if r < ends[np.searchsorted(ends, r, "right")] - drop}
    rows = np.array([0, 1, 8, 9, 17, 29])
    batch = data.finish(data.observations(rows), 0)
    actions, padded = data.chunks(rows)
    for i, row in enumerate(rows):
        item = theirs[int(row)]
        assert np.allclose(actions[i], item["action"]) and (padded[i] == item["action_is_pad"].numpy()).all()
        assert torch.allclose(batch["observation.state"][i], item["observation.state"])
        brightness = batch["observation.images.front"][i, ..., 0, :, :].mean((-2, -1)) * 255
        start = [0, 9, 19][np.searchsorted(ends, row, "right")]
        moments = np.maximum(row + np.array(policy.window.observations), start)
        assert torch.allclose(brightness, torch.tensor(8 * moments % 256).float(), atol=12)


def test_augmentation_moves_all_moments_alike(dataset, folders):
    window = load_policy(folders("vqbet")).window
    data = RobotData(dataset, ["front"], 4, 4, 0, progress=False, window=window)
    batch = data.raw(0)
    still = batch["observation.images.front"][:, -1:].expand(-1, len(window.observations), -1, -1, -1)
    moved = data.finish({**batch, "observation.images.front": still.contiguous()}, 0)
    views = moved["observation.images.front"]
    assert views.shape == (4, 3, 3, 32, 32) and views[:, 0].equal(views[:, -1])
    assert moved["shift.front"].shape == (4, 2)


@pytest.mark.parametrize(("cameras", "size", "state", "action"), [
    (("a",), (32, 48), 1, 1), (("a", "b", "c", "d"), (40, 20), 32, 32)])  # fmt: skip
def test_robots_of_any_shape(tmp_path, cameras, size, state, action):
    folder = write_by_lerobot("act", tmp_path / "p", cameras, state=state, action=action, size=size)
    policy = load_policy(folder)
    assert policy.cameras == cameras and policy.view_sizes["a"] == size
    batch = batch_for(policy)
    policy.loss(batch).total.backward()
    assert policy.act(batch).actions.shape == (3, 8, action)


def test_pictures_keep_the_statistics_of_training(folders):
    """New data replaces those of state and action; a camera keeps its own, and a new one has ImageNet's."""
    policy = load_policy(folders("act"), dataset_stats=default_statistics(7, 7), features=features(("top", "side")))
    step = next(s for s in policy.preprocessor.steps if type(s).__name__ == "NormalizerProcessorStep")
    stored = step.state_dict()
    assert stored["observation.images.top.mean"].flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert stored["observation.images.side.mean"].flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_hidden_states_of_act_are_what_flows_on(folders):
    policy = load_policy(folders("act"))
    batch, draws = batch_for(policy), noise(policy)
    plain = policy.loss(batch, draws).total
    with policy.capture([0, 2]) as captured:
        total = policy.loss(batch, draws).total
    assert total.equal(plain) and policy.num_layers == 3
    first, last = captured.hidden[0], captured.hidden[2]
    assert first.shape == last.shape == (3, 2 + 2, 32), "latent, state, one position of each camera at 32 pixels"
    assert captured.cameras == {"top": slice(2, 3), "wrist": slice(3, 4)}
    assert captured.layout["image"].sum() == 6 and captured.layout["state"][:, 1].all()
    for state in (first, last):
        assert torch.autograd.grad(total, state, retain_graph=True)[0].abs().sum() > 0
    held = {name for name, _ in policy.backbone_parameters()}
    assert any("backbone.conv1" in name for name in held) and not any("decoder" in name for name in held)
    with pytest.raises(BurnishError, match=r"layers \[3\] to capture"), policy.capture([3]):
        pass


def test_a_new_policy_of_its_config_alone(tmp_path):
    made = [create_policy("", features(("a",)), default_statistics(7, 7), {"dim_model": 32, "n_heads": 2,
            "dim_feedforward": 32, "use_vae": False}, type="act", generator_seed=s) for s in (0, 0, 1)]  # fmt: skip
    weights = [policy.state_dict()["policy.model.action_head.weight"] for policy in made]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    made[0].save(tmp_path / "p")
    assert load_policy(tmp_path / "p").chunk_size == 100
    with pytest.raises(BurnishError, match="a VLM for a new policy of type act"):
        create_policy(tmp_path, features(("a",)), default_statistics(7, 7), type="act")


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("act", {"dim_model": 16384, "dim_feedforward": 65536}, "describes a model of .* numbers"),
        ("act", {"dim_model": 10**9}, "dim_model is 1000000000"),
        ("act", {"n_encoder_layers": 10**6}, "n_encoder_layers is 1000000"),
        ("act", {"vision_backbone": "resnet_of_mine"}, "cannot be built"),
        ("act", {"dim_feedforward": 64}, "have other shapes"),
        ("act", {"type": "tdmpc"}, "cannot be read"),
        ("act", {"type": "nothing"}, "policy type 'nothing' in .*; expected one of act, "),
        ("act", {"type": None, "model_type": "dream-vla"}, r"policy type 'dream-vla' \(Dream-VLA: .*code of its own"),
        ("act", {"type": None, "model_type": "Emu3"}, r"policy type 'Emu3' \(UD-VLA"),
        ("vqbet", {"vision_backbone": "/etc"}, "vision_backbone is '/etc', outside the folder"),
    ],
)
def test_bad_folders(folders, tmp_path, kind, changes, said):
    folder = Path(shutil.copytree(folders(kind), tmp_path / "p"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**raw, **changes}.items() if v is not None}))
    with pytest.raises(BurnishError, match=said) as error:
        load_policy(folder)
    assert "\n" not in str(error.value)


def test_files_that_a_config_names_are_no_links_and_no_pickles(tmp_path):
    (tmp_path / "p").mkdir()
    raw, place = {"type": "vqbet", "vision_backbone": "x"}, tmp_path / "p" / "vision_backbone"
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BurnishError, match="is a link to .*elsewhere"):
        LeRobotPolicy.read_config(raw, tmp_path / "p")
    place.unlink()
    place.mkdir()
    (place / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    with pytest.raises(BurnishError, match="code"):
        LeRobotPolicy.read_config(raw, tmp_path / "p")
    (place / "config.json").write_text("{}")
    assert LeRobotPolicy.read_config(raw, tmp_path / "p")["vision_backbone"] == str(place)


def test_robots_that_a_type_does_not_take(folders):
    with pytest.raises(BurnishError, match="expected data whose state, actions and views have the policy's own sizes"):
        load_policy(folders("act"), features=features(("top",), state=4), dataset_stats=default_statistics(4, 7))
    with pytest.raises(BurnishError, match="a new vqbet.*only one image"):
        create_policy("", features(("a", "b")), default_statistics(7, 7), {}, type="vqbet")
    with pytest.raises(BurnishError, match="a new tdmpc: a policy of type tdmpc that learns from rewards"):
        create_policy("", features(("a",)), default_statistics(7, 7), {}, type="tdmpc")
    with pytest.raises(BurnishError, match="gaussian_actor that predicts no chunk"):
        create_policy("", features(("a",)), default_statistics(7, 7), {}, type="gaussian_actor")


def test_draws_of_rows_are_theirs_alone():
    row = torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(0))

    def draws():
        at = torch.full((4, 3), 2.0)
        return [torch.randn(4, 2), torch.rand((4, 3)), torch.randint(0, 9, (4, 5)), torch.randint(7, size=(4, 2)),
                torch.randn_like(at), torch.normal(mean=0.0, std=2.0, size=(4, 2)), torch.normal(at, 1.0),
                torch.multinomial(at.repeat(2, 1), 2, replacement=True), torch.empty(4, 2).normal_(1.0, 3.0),
                torch.distributions.Beta(at, at).sample(), torch.rand(3)]  # fmt: skip

    before = torch.get_rng_state()
    with drawn(row):
        whole = draws()
    with drawn(row):
        assert all(a.equal(b) for a, b in zip(whole, draws(), strict=True))
    assert torch.get_rng_state().equal(before)
    with drawn(torch.cat([row[2:3], row[2:3], row[:1], row[:1]])):
        other = draws()
    for a, b in list(zip(whole, other, strict=True))[:-1]:
        n = len(a) // 4
        assert b[:n].equal(a[2 * n : 3 * n]) and b[n : 2 * n].equal(b[:n]) and b[2 * n : 3 * n].equal(a[:n])
    torch.manual_seed(0)
    with drawn(row):
        given = torch.randn(3, generator=torch.Generator().manual_seed(5))
    assert given.equal(torch.randn(3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("kind", ["act", pytest.param("diffusion", marks=diffusers), "vqbet"])
def test_the_tiny_ones(kind, tmp_path):
    policy = load_policy(make_tiny(kind, tmp_path / kind))
    policy.loss(batch_for(policy)).total.backward()
    assert policy.act(batch_for(policy)).actions.isfinite().all()


def test_the_page_says_what_each_can_do(request, tmp_path):
    """Its table is what `python -m workshop policy-table` writes."""
    written = policy_table.PLACE.search(policy_table.PAGE.read_text())[0].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in written] == sorted(TINY)
    for line, kind in zip(written, sorted(TINY), strict=True):
        if kind == "diffusion" and importlib.util.find_spec("diffusers") is None:
            continue
        ready = kind in ("smolvla", "pi0", "pi05", "pi0_fast")
        folder = request.getfixturevalue(f"tiny_{kind}") if ready else make_tiny(kind, tmp_path / kind)
        assert policy_table.row(kind, load_policy(folder)).strip() == line
