"""burnish_discrete: every verb in every way of training, against forwards made by hand."""

import copy
import shutil

import pytest
import torch
from idle import idle_parameters

from burnish.core.errors import BurnishError
from burnish.policies import create_policy, load_policy
from burnish.sampling.token_model import make_decoder
from workshop.tiny import default_statistics, make_tiny

STYLES = {
    "autoregressive": {"training": "autoregressive"},
    "parallel": {"training": "parallel", "state_as": "tokens"},
    "diffusion": {"training": "diffusion", "ordinal_weight": 0.5},
    "blocks": {"block_size": 14, "noise": "pipeline", "tokenizer": "quantile"},
    "shifted": {"block_size": 7, "shift": True, "noise": "d2f"},
}
CAMERAS = ("top", "wrist")
BINS, T, A, L = 16, 8, 7, 56


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("discrete")
    return {
        name: make_tiny("burnish_discrete", root / name, cameras=CAMERAS, overrides=options)
        for name, options in STYLES.items()
    }


@pytest.fixture(params=STYLES)
def style(request):
    return request.param


@pytest.fixture
def policy(folders, style):
    return load_policy(folders[style])


def draw(policy, seed=0, size=3):
    return policy.draw(size, torch.Generator().manual_seed(seed))


def take(batch, index):
    return {k: [v[i] for i in index] if isinstance(v, list) else v[index] for k, v in batch.items()}


def observation(batch):
    return {k: v for k, v in batch.items() if not k.startswith("action")}


def true_ids(policy, batch):
    return policy.policy.model.tokens.encode(policy._prepare(batch, batch["action"])["action"])


def ask(policy, batch, ids, positions, seen):
    """Logits of action rows fed at once on top of a prefilled prompt, through the decoders' door."""
    model = policy.token_model()
    with torch.no_grad():
        cache = model.prefill(model.embed(observation(batch)))
        prompt = cache.valid[:, None].expand(-1, len(positions), -1)
        slots = torch.zeros(len(positions), L, dtype=torch.bool)
        slots[:, positions] = seen
        visible = torch.cat([prompt, slots.expand(len(ids), -1, -1)], dim=2)
        return model.extend(ids, positions.expand_as(ids), visible, cache), cache.prompt_logits


def sees(policy, rows=L):
    at = torch.arange(rows) // policy.config.block
    return at[:, None] >= at[None, :]


def test_loss_is_the_cross_entropy_of_hidden_tokens(policy, batch, style):
    """One joint forward in training equals prompt first, rows on top: cached and uncached are the same model."""
    batch.pop("action_is_pad")
    draws, ids, every = draw(policy), true_ids(policy, batch), torch.arange(L)
    given = torch.where(draws.masks, BINS, ids)
    logits, first = ask(policy, batch, given, every, sees(policy))
    if policy.config.shift:
        logits = torch.cat([first[:, None], logits[:, :-1]], dim=1)
    logp = logits.log_softmax(-1)
    losses = -logp.gather(2, ids[..., None])[..., 0]
    if style == "diffusion":
        normalised = policy._prepare(batch, batch["action"])["action"].flatten(1).clamp(-1, 1)
        middle = torch.linspace(-1, 1, BINS + 1).unfold(0, 2, 1).mean(1)
        losses = losses + 0.5 * ((logp.exp() * middle).sum(-1) - normalised).abs()
    counts = draws.learned.float()
    out = policy.loss(batch, draws)
    torch.testing.assert_close(out.per_sample, (losses * counts).sum(1) / counts.sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.total, (losses * counts).sum() / counts.sum(), rtol=1e-4, atol=1e-5)


def test_score_is_the_chain_rule(policy, batch, style):
    """Token by token (or block by block), each given what comes before it, with its own pass."""
    batch.pop("action_is_pad")
    draws, ids = draw(policy, 5), true_ids(policy, batch)
    found = policy.score(batch, batch["action"], draws)
    assert found.requires_grad
    if style == "parallel":
        logits, _ = ask(policy, batch, torch.full_like(ids, BINS), torch.arange(L), sees(policy))
        expected = logits.log_softmax(-1).gather(2, ids[..., None]).sum((1, 2))
    elif style == "autoregressive":
        expected = torch.zeros(3)
        for i in range(L):
            logits, first = ask(policy, batch, ids[:, : max(i, 1)], torch.arange(max(i, 1)), sees(policy, max(i, 1)))
            last = first if i == 0 else logits[:, -1]
            expected += last.log_softmax(-1).gather(1, ids[:, i : i + 1])[:, 0]
    else:
        expected = _bound_by_hand(policy, batch, draws, ids)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-3)


def _bound_by_hand(policy, batch, draws, ids):
    from burnish.policies.discrete.losses import any_order_masks

    block = policy.config.block
    hidden, weight = any_order_masks(draws.noise.flatten(1), draws.time, torch.ones_like(ids).bool(), block)
    expected = torch.zeros(len(ids))
    for start in range(0, L, block):
        stop = start + block
        given = ids[:, :stop].clone()
        given[:, start:] = torch.where(hidden[:, start:stop], BINS, ids[:, start:stop])
        logits, first = ask(policy, batch, given, torch.arange(stop), sees(policy, stop))
        if policy.config.shift:
            logits = torch.cat([first[:, None], logits[:, :-1]], dim=1)
        logp = logits.log_softmax(-1).gather(2, ids[:, :stop, None])[..., 0]
        expected += (logp * weight[:, :stop])[:, start:].sum(1)
    return expected


def test_draws_decide_everything(policy, batch, style):
    same, again, other = (policy.loss(batch, draw(policy, seed)).per_sample for seed in (0, 0, 1))
    assert same.equal(again) and (style in ("autoregressive", "parallel") or not same.equal(other))
    before = torch.get_rng_state()
    policy.loss(batch)
    policy.act(observation(batch))
    assert torch.get_rng_state().equal(before)
    with pytest.raises(BurnishError, match="policy.draw"):
        policy.loss(batch, type(draw(policy))(draw(policy).noise, draw(policy).time))


def test_scores_need_only_noise_and_time(policy, batch):
    draws = draw(policy)
    two = type(draws)(torch.stack([draws.noise] * 2, 1), torch.stack([draws.time] * 2, 1))
    batch.pop("action_is_pad")
    table = policy.scores(batch, torch.stack([batch["action"], -batch["action"]], 1), two)
    torch.testing.assert_close(table[:, 0, 1], policy.score(batch, batch["action"], draws))
    assert table.shape == (3, 2, 2)


def test_padded_steps_count_nothing(policy, batch):
    draws = draw(policy)
    changed = {**batch, "action": batch["action"].clone()}
    changed["action"][2, 6:] *= -1
    torch.testing.assert_close(policy.loss(changed, draws).per_sample, policy.loss(batch, draws).per_sample)
    torch.testing.assert_close(
        policy.score(changed, changed["action"], draws), policy.score(batch, batch["action"], draws)
    )


def test_samples_do_not_see_their_neighbours(policy, batch):
    draws = draw(policy)
    together, chunk = policy.loss(batch, draws).per_sample, policy.act(observation(batch)).actions
    for i in range(3):
        alone = type(draws)(*(part[[i]] for part in (draws.noise, draws.time, draws.masks, draws.learned)))
        torch.testing.assert_close(policy.loss(take(batch, [i]), alone).per_sample, together[[i]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(policy.act(observation(take(batch, [i]))).actions, chunk[[i]])


def test_act_is_in_environment_units_and_keeps_a_prefix(policy, batch, style):
    chunk = policy.act(observation(batch)).actions
    assert chunk.shape == (3, T, A) and not chunk.requires_grad and policy.act(batch).actions.equal(chunk)
    stats = default_statistics(7, 7)["action"]
    centre = (chunk - stats["q01"]) / (stats["q99"] - stats["q01"]) * 2 - 1
    middles = policy.policy.model.tokens.centres.view(T, A, BINS)
    assert ((centre[..., None] - middles).abs().min(-1).values < 1e-4).all(), "actions are the middles of bins"
    prefix = batch["action"][:, :2]
    kept = policy.act(observation(batch), prefix=prefix).actions
    assert kept[:, :2].equal(prefix) and kept.shape == chunk.shape
    told = []
    streamed = policy.act(observation(batch), stream=lambda n, actions: told.append((n, actions))).actions
    assert streamed.equal(chunk) and told[-1][0] == T
    assert all(actions.equal(chunk[:, :n]) for n, actions in told)


def test_half_precision_compute(policy, batch):
    draws = draw(policy)
    with torch.autocast("cpu", torch.bfloat16):
        half = policy.loss(batch, draws)
        assert torch.isfinite(policy.act(observation(batch)).actions).all()
    half.total.backward()
    torch.testing.assert_close(half.per_sample, policy.loss(batch, draws).per_sample, rtol=0.05, atol=0.05)


def test_double_precision_is_the_same_policy(policy, batch):
    """Decoders are checked in float64, so the whole policy must run in it."""
    single = policy.loss(batch, draw(policy)).per_sample
    double = policy.double().loss(batch, draw(policy)).per_sample
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)
    assert policy.act(observation(batch)).actions.shape == (3, T, A)


def test_capture_shows_prompt_and_action_rows(policy, batch):
    with policy.capture([0, 3]) as captured:
        policy.loss(batch, draw(policy))
        S = captured.hidden[3].shape[1]
        assert {name: rows.shape for name, rows in captured.layout.items()} == dict.fromkeys(
            ("image", "text", "state", "action"), (3, S)
        )
        assert captured.layout["action"].sum(1).tolist() == [L] * 3
        assert captured.cameras == {"top": slice(0, 4), "wrist": slice(4, 8)}
        before = captured.hidden[3][:, : S - L].detach()
        policy.loss({**batch, "action": -batch["action"]}, draw(policy, 1))
        after = captured.hidden[3][:, : S - L].detach()
        assert before.equal(after), "the prompt sees no action"
        policy.act(observation(batch))
        assert captured.hidden[0].shape[1] == captured.layout["text"].shape[1] == S - L
        policy.score(batch, batch["action"], draw(policy))
        assert captured.hidden[0].shape[1] == captured.layout["action"].shape[1]


def test_gradients_reach_all_but_what_is_named(policy, batch):
    policy.loss(batch, draw(policy)).total.backward()
    idle = {n for n, p in policy.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == set(idle_parameters(policy)) or idle - set(idle_parameters(policy)) <= {
        "policy.model.vlm.model.text_model.embed_tokens.weight"
    }
    names = [n for n, _ in policy.backbone_parameters()]
    assert any("vision_model" in n for n in names) and not any("action_embed" in n or ".head." in n for n in names)


def test_folder_round_trip_also_after_a_move(policy, batch, tmp_path):
    policy.save(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    again = load_policy(tmp_path / "b")
    draws = draw(policy)
    assert again.loss(batch, draws).total.equal(policy.loss(batch, draws).total)
    assert again.act(batch).actions.equal(policy.act(batch).actions)
    assert type(again.config) is type(policy.config) and again.config.bins == BINS


def test_lerobot_runs_the_folder(folders, style, batch):
    """As lerobot-eval does: class by name, weights from the folder, processors, one action at a time."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    config = PreTrainedConfig.from_pretrained(folders[style])
    theirs = get_policy_class(config.type).from_pretrained(folders[style])
    pre, post = make_pre_post_processors(config, str(folders[style]))
    prepared = pre(observation(batch))
    theirs.reset()
    actions = torch.stack([post(theirs.select_action(prepared)) for _ in range(T)], dim=1)
    torch.testing.assert_close(actions, load_policy(folders[style]).act(batch).actions)
    torch.manual_seed(0)
    loss, _ = theirs.train()(pre(batch))
    loss.backward()
    assert torch.isfinite(loss)


def test_language_is_that_of_the_vlm_it_started_from(folders, tiny_smolvla, questions):
    base = load_policy(tiny_smolvla)
    features = {**base.config.input_features, **base.config.output_features}
    stats = default_statistics(7, 7)
    new = create_policy(tiny_smolvla, features, stats, {"bins": BINS}, type="burnish_discrete")
    torch.testing.assert_close(new.language(questions).per_token, base.language(questions).per_token)
    assert new.answer(questions) == base.answer(questions)
    assert new.config.scale_embeddings and new.config.max_state_dim == 8
    assert dict(new.backbone_parameters()).keys() and new.policy.model.state_proj.weight.equal(
        base.policy.model.state_proj.weight
    )
    loss = load_policy(folders["diffusion"]).language(questions)
    loss.mean.backward()


def test_prompt_of_a_smolvla_is_read_as_it_was(tiny_smolvla, batch):
    """The hidden states of images, instruction and state are those of the SmolVLA that the policy was made from."""
    base = load_policy(tiny_smolvla)
    features = {**base.config.input_features, **base.config.output_features}
    new = create_policy(tiny_smolvla, features, default_statistics(7, 7), {"bins": BINS}, type="burnish_discrete")
    with base.capture([2]) as theirs, new.capture([2]) as ours, torch.no_grad():
        base.act(observation(batch))
        new.act(observation(batch))
        real = theirs.layout["image"] | theirs.layout["text"] | theirs.layout["state"]
        assert all(theirs.layout[name].equal(ours.layout[name]) for name in ("image", "text", "state"))
        torch.testing.assert_close(ours.hidden[2][real], theirs.hidden[2][real], rtol=1e-4, atol=1e-4)


def test_another_vlm_family(tmp_path, batch, questions):
    """PaliGemma: other names inside, one image at a time, scaled embeddings of its own."""
    vlm = tiny_paligemma(tmp_path / "vlm")
    from lerobot.configs.types import FeatureType, PolicyFeature

    features = {
        **{f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for c in CAMERAS},
        "observation.state": PolicyFeature(FeatureType.STATE, (7,)),
        "action": PolicyFeature(FeatureType.ACTION, (7,)),
    }
    options = {"bins": BINS, "block_size": 7, "noise": "pipeline", "chunk_size": T}
    policy = create_policy(vlm, features, default_statistics(7, 7), options, type="burnish_discrete")
    policy.save(tmp_path / "policy")
    again = load_policy(tmp_path / "policy")
    out = policy.loss(batch, draw(policy))
    out.total.backward()
    assert torch.isfinite(out.total) and again.loss(batch, draw(policy)).total.equal(out.total)
    assert policy.act(batch).actions.shape == (3, T, A)
    ids, every = true_ids(policy, batch), torch.arange(L)
    hidden = torch.zeros_like(ids).bool()
    with torch.no_grad():
        joint = policy.policy.logits(policy._embed(policy._prepare(batch, None)), ids, hidden)
    torch.testing.assert_close(joint, ask(policy, batch, ids, every, sees(policy))[0], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(policy.language(questions).mean)


def tiny_paligemma(folder):
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    from workshop.tiny import NANO_TEXTS, build_tokenizer

    tokenizer = build_tokenizer(NANO_TEXTS, 384)
    config = PaliGemmaConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                       "image_size": 32, "patch_size": 8, "model_type": "siglip_vision_model", "projection_dim": 48},
        text_config={"model_type": "gemma", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
                     "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 64, "vocab_size": len(tokenizer)},
        projection_dim=48, image_token_id=5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_size": 5}, "do not divide"),
        ({"training": "autoregressive", "block_size": 7}, "back only"),
        ({"training": "guess"}, "not one of"),
        ({"bins": 1}, "2 to 4096"),
        ({"tokenizer": "fast"}, "fast_folder"),
        ({"max_state_dim": 3}, "max_state_dim"),
        ({"normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}}, "QUANTILES"),
        ({"noise": "white"}, "noise schedule"),
        ({"noise": "d2f", "noise_options": {"window": 2}}, "window"),
    ],
)
def test_values_that_cannot_work_are_refused(tiny_smolvla, options, reason):
    base = load_policy(tiny_smolvla)
    features = {**base.config.input_features, **base.config.output_features}
    with pytest.raises(BurnishError, match=reason):
        create_policy(tiny_smolvla, features, default_statistics(7, 7), options, type="burnish_discrete")


def test_fast_tokens_have_no_prefix(tiny_smolvla, batch, fast_folder):
    base = load_policy(tiny_smolvla)
    features = {**base.config.input_features, **base.config.output_features}
    options = {"tokenizer": "fast", "fast_folder": str(fast_folder), "fast_length": 96}
    policy = create_policy(tiny_smolvla, features, default_statistics(7, 7), options, type="burnish_discrete")
    batch["action"] = batch["action"].clamp(-1, 1)
    assert torch.isfinite(policy.loss(batch, draw(policy)).total) and policy.act(batch).actions.shape == (3, T, A)
    assert torch.isfinite(policy.score(batch, batch["action"], draw(policy))).all()
    with pytest.raises(BurnishError, match="FAST"):
        policy.act(batch, prefix=batch["action"][:, :1])
    told = []
    chunk = policy.act(batch, stream=lambda steps, actions: told.append((steps, actions))).actions
    assert [steps for steps, _ in told] == [T] and torch.equal(told[0][1], chunk), "no order, so all at once"


def test_a_folder_with_fast_tokens_is_self_contained(tiny_smolvla, batch, fast_folder, tmp_path):
    base = load_policy(tiny_smolvla)
    features = {**base.config.input_features, **base.config.output_features}
    options = {"tokenizer": "fast", "fast_folder": str(fast_folder), "fast_length": 96}
    policy = create_policy(tiny_smolvla, features, default_statistics(7, 7), options, type="burnish_discrete")
    policy.save(tmp_path / "p")
    shutil.rmtree(fast_folder)
    shutil.move(tmp_path / "p", tmp_path / "q")
    again = load_policy(tmp_path / "q")
    assert torch.equal(policy.eval().act(batch).actions, again.act(batch).actions)
    again.save(tmp_path / "q")


def test_a_decoder_that_cannot_work_is_told_when_the_policy_is_loaded(folders):
    with pytest.raises(BurnishError, match="typo"):
        load_policy(folders["diffusion"], overrides={"decoder": "typo"})
    with pytest.raises(BurnishError, match="threshold"):
        load_policy(folders["diffusion"], overrides={"decoder_options": {"threshold": -5}})


def test_new_statistics_move_quantile_bins(folders):
    stats = copy.deepcopy(default_statistics(7, 7))
    stats["action"]["q90"] = stats["action"]["q90"] + 0.3
    old, new = load_policy(folders["blocks"]), load_policy(folders["blocks"], dataset_stats=stats)
    assert not old.policy.model.tokens.edges.equal(new.policy.model.tokens.edges)


def test_decoders_agree_where_they_must(folders, batch):
    """A policy trained in one block, decoded token by token with the sharpest rule, is what its config says."""
    policy = load_policy(folders["diffusion"])
    model = policy.token_model()
    with torch.no_grad():
        prompt = model.embed(observation(batch))
    ids = make_decoder(policy.config.decoder_name, model)(prompt).ids
    chunk = policy.postprocessor(policy.policy.model.tokens.decode(ids))
    assert chunk.equal(policy.act(observation(batch)).actions)


def test_stored_in_half_precision_the_edges_of_bins_stay(folders, tmp_path, batch):
    """float16 would move 14 % of the tokens of data near an edge."""
    policy = load_policy(folders["blocks"])
    policy.save(tmp_path / "half", dtype=torch.float16)
    again = load_policy(tmp_path / "half")
    buffers = dict(policy.named_buffers())
    assert any("edge" in name or "bin" in name for name in buffers), list(buffers)
    for name, buffer in again.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    moved = [name for name, p in again.named_parameters() if not torch.equal(p, dict(policy.named_parameters())[name])]
    assert moved
