"""pi0-FAST: LeRobot's loss and actions, an exact score, FAST's stop, and folders without foreign code."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from burnish.core.errors import BurnishError
from burnish.core.provenance import weights_hash
from burnish.core.types import Draws
from burnish.policies import load_policy
from burnish.policies.pi import small_pi
from burnish.policies.pi0_fast import local_tokenizers
from workshop.tiny import make_tiny

PRE = "policy_preprocessor.json"


@pytest.fixture
def policy(tiny_pi0_fast):
    return load_policy(tiny_pi0_fast)


def draws(size=3):
    return Draws(torch.zeros(size, 1, 4), torch.ones(size))


@pytest.fixture
def stock(tiny_pi0_fast, policy):
    """LeRobot's own, from the same folder; it is only given our readers in place of code from a hub."""
    config = PreTrainedConfig.from_pretrained(tiny_pi0_fast)
    config.validate_action_token_prefix = False  # random weights write anything
    with local_tokenizers(config), small_pi(policy.sizes, image_size=28):
        theirs = get_policy_class("pi0_fast")(config)
        theirs.load_state_dict(policy.policy.state_dict())
        pre, post = make_pre_post_processors(config, pretrained_path=str(tiny_pi0_fast))
    step = next(s for s in pre.steps if type(s).__name__ == "ActionTokenizerProcessorStep")
    step.fast_skip_tokens = config.fast_skip_tokens  # which LeRobot does not store
    files = policy.fast
    pairs = SimpleNamespace(decode=lambda ids: files.pairs.decode(ids.tolist(), skip_special_tokens=False))
    theirs.action_tokenizer = SimpleNamespace(bpe_tokenizer=pairs, min_token=files.least, scale=files.scale)
    return theirs.eval(), pre, post


def test_loss_and_actions_are_lerobots(policy, stock, batch):
    theirs, pre, post = stock
    prepared = pre({k: v for k, v in batch.items() if k != "action_is_pad"})
    expected, _ = theirs(prepared)
    out = policy.loss(batch)
    assert torch.allclose(out.total, expected, rtol=1e-5)
    counted = prepared["action.token_mask"][:, 1:].sum(1)
    assert torch.allclose((out.per_sample * counted).sum() / counted.sum(), out.total)
    seen = {k: v for k, v in batch.items() if not k.startswith("action")}
    assert torch.allclose(post(theirs.predict_action_chunk(pre(seen))), policy.act(seen).actions, atol=1e-5)


@torch.no_grad()
def test_score_is_the_sum_of_log_softmax_token_by_token(policy, batch):
    """By decoding: each token's probability after a pass over the ones before it alone."""
    model, score = policy.policy.model, policy.score(batch, batch["action"], draws())
    prepared = policy._prepare(batch, batch["action"])
    images, present = policy.prepare_images(prepared)
    tokens, real = prepared["action.tokens"], prepared["action.token_mask"]
    total = torch.zeros(3, dtype=torch.float64)
    for n in range(1, int(real.sum(1).max())):
        embeds, pad, allowed, *_ = model.embed_prefix_fast(
            images, present, prepared["observation.language.tokens"],
            prepared["observation.language.attention_mask"], tokens[:, :n], real[:, :n])  # fmt: skip
        (states, _), _ = policy.inner.forward(
            attention_mask=prepare_attention_masks_4d(allowed, dtype=embeds.dtype),
            position_ids=pad.cumsum(1) - 1, inputs_embeds=[embeds, None], use_cache=False)  # fmt: skip
        logs = policy.vlm.lm_head(states[:, -1]).double().log_softmax(-1).gather(1, tokens[:, n : n + 1])[:, 0]
        total += logs * real[:, n]
    assert torch.allclose(score.double(), total, atol=1e-3, rtol=1e-5)
    two = torch.stack([batch["action"], batch["action"].flip(1)], 1)
    both = policy.scores(batch, two, Draws(torch.zeros(3, 2, 1), torch.ones(3, 2)))
    assert both.shape == (3, 2, 2) and torch.allclose(both[:, 0, 0], score) and both[..., 0].equal(both[..., 1])
    assert policy.supports("likelihood") and not policy.supports("prefix")


def test_an_answer_is_read_back(policy, batch):
    """What the preprocessor writes for a chunk spells that chunk, up to FAST's rounding, whatever follows the stop."""
    prepared = policy._prepare(batch, batch["action"])
    answers = zip(prepared["action.tokens"], prepared["action.token_mask"], strict=True)
    rows = [row[mask].tolist() for row, mask in answers]
    assert len({len(row) for row in rows}) > 1, "answers have their own lengths"
    assert all(row[-1] == policy.words.eos_token_id for row in rows)
    spelled = policy.read([row[1:] + row[1:9] for row in rows])
    assert (spelled - prepared["action"]).abs().max() < 8**0.5 * 0.5 / policy.fast.scale
    assert policy.read([[0, 1, 2]])[0].equal(torch.zeros(8, 7)) or policy.words.vocab_size < 8


def test_a_chunk_that_is_too_long_has_no_score(tiny_pi0_fast, batch):
    policy = load_policy(tiny_pi0_fast, overrides={"max_action_tokens": 16})
    with pytest.raises(BurnishError, match="takes more than 16 FAST tokens; expected at most max_action_tokens"):
        policy.score(batch, batch["action"], draws())


def test_temperature_draws_row_by_row(tiny_pi0_fast, batch):
    policy = load_policy(tiny_pi0_fast, overrides={"temperature": 1.0})
    some, state = policy.draw(3, torch.Generator().manual_seed(0)), torch.get_rng_state()
    tokens = policy.act(batch, some).actions
    assert torch.get_rng_state().equal(state) and policy.act(batch, some).actions.equal(tokens)
    alone = policy.act({k: v[1:2] for k, v in batch.items()}, Draws(some.noise[1:2], some.time[1:2])).actions
    assert torch.allclose(alone[0], tokens[1], atol=1e-5)


def test_the_language_model_answers_and_learns(policy, questions):
    loss = policy.language(questions)
    loss.mean.backward()
    reached = [n for n, p in policy.backbone_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("vision_tower" in n for n in reached) and any("language_model" in n for n in reached)
    assert len(policy.answer(questions)) == 3


def test_layout_of_a_forward(policy, batch):
    with policy.capture([0, 2]) as captured:
        policy.loss(batch)
    width = captured.hidden[0].shape[1]
    assert all(mask.shape == (3, width) for mask in captured.layout.values())
    assert captured.layout["image"].sum(1).tolist() == [8, 8, 8] and captured.layout["action"].sum(1).min() > 3
    assert not (captured.layout["action"] & captured.layout["text"]).any()
    with policy.capture([0]) as captured:
        policy.act(batch)
    assert captured.layout["text"].shape[1] == captured.hidden[0].shape[1]


def test_a_folder_is_whole_and_runs_no_code(tiny_pi0_fast, tmp_path, batch):
    folder = Path(shutil.copytree(tiny_pi0_fast, tmp_path / "a"))
    (folder / "fast/processing_action_tokenizer.py").write_text("raise SystemExit('ran')")
    content = json.loads((folder / "fast/processor_config.json").read_text())
    content["auto_map"] = {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"}
    (folder / "fast/processor_config.json").write_text(json.dumps(content))
    policy = load_policy(folder)
    policy.save(tmp_path / "b", home=tmp_path / "c")
    text = (tmp_path / "b/config.json").read_text() + (tmp_path / "b" / PRE).read_text()
    assert str(tmp_path / "c/fast") in text and str(tmp_path / "c/tokenizer") in text and str(folder) not in text
    assert (tmp_path / "b/fast/processing_action_tokenizer.py").is_file(), "LeRobot needs it"
    (tmp_path / "b").rename(tmp_path / "c")
    before = policy.act(batch).actions
    shutil.rmtree(folder)
    assert load_policy(tmp_path / "c").act(batch).actions.equal(before)
    assert weights_hash(tmp_path / "c") == weights_hash(shutil.copytree(tmp_path / "c", tmp_path / "d"))
    shutil.rmtree(tmp_path / "d/fast")
    with pytest.raises(BurnishError, match="no fast/ in .*nothing outside the folder is read"):
        load_policy(tmp_path / "d")


def test_lerobots_own_folder_names_hubs(tiny_pi0_fast, tmp_path):
    """As save_pretrained leaves it: hub names, and no tokenizer beside the weights."""
    folder = Path(shutil.copytree(tiny_pi0_fast, tmp_path / "a"))
    raw = json.loads((folder / "config.json").read_text())
    text, fast = "google/paligemma-3b-pt-224", "lerobot/fast-action-tokenizer"
    stored = {**raw, "text_tokenizer_name": text, "action_tokenizer_name": fast}
    (folder / "config.json").write_text(json.dumps(stored))
    assert load_policy(folder).name == "pi0_fast"
    shutil.rmtree(folder / "fast")
    with pytest.raises(BurnishError, match="hf download lerobot/fast-action-tokenizer .*fast"):
        load_policy(folder)


def test_one_action_dimension_and_blank_cameras(tmp_path):
    made = make_tiny("pi0_fast", tmp_path / "p", action_dim=1, state_dim=1, overrides={"empty_cameras": 1})
    policy = load_policy(made)
    batch = {"observation.images.top": torch.rand(2, 3, 20, 36), "observation.state": torch.randn(2, 1),
             "action": torch.randn(2, 8, 1), "task": ["open", "push"]}  # fmt: skip
    policy.loss(batch).total.backward()
    assert policy.act(batch).actions.shape == (2, 8, 1)
