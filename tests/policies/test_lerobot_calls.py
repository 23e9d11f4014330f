"""What LeRobot's rollouts and trainings ask of burnish_discrete: real-time chunks, adapters, sharding, text."""

import pytest
import torch
from lerobot.rollout.inference.rtc import supports_rtc_inference

from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from workshop.tiny import make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("calls")
    return make_tiny("burnish_discrete", root / "policy", cameras=("top", "wrist"), overrides={"block_size": 7})


@pytest.fixture
def policy(folder):
    return load_policy(folder)


@pytest.fixture
def prepared(policy, batch):
    seen = policy.preprocessor({key: value for key, value in batch.items() if not key.startswith("action")})
    return {key: value[:1] for key, value in seen.items() if isinstance(value, torch.Tensor)}


def test_what_is_left_over_is_continued(policy, prepared):
    """The real-time loop gives the earlier chunk and how many of its actions are gone when the new one is there."""
    theirs = policy.policy
    assert supports_rtc_inference(theirs)
    plain = theirs.predict_action_chunk(prepared)
    left = theirs.model.tokens.decode(torch.randint(16, (1, 56), generator=torch.Generator().manual_seed(1)))
    for given in (left, left[0]):
        chunk = theirs.predict_action_chunk(prepared, inference_delay=3, prev_chunk_left_over=given)
        assert chunk[:, :3].equal(left[:, :3]) and not chunk[:, :3].equal(plain[:, :3])
    assert theirs.predict_action_chunk(prepared, inference_delay=0, prev_chunk_left_over=left).equal(plain)
    assert theirs.predict_action_chunk(prepared, inference_delay=3, prev_chunk_left_over=None).equal(plain)
    late = theirs.predict_action_chunk(prepared, inference_delay=99, prev_chunk_left_over=left, execution_horizon=8)
    assert late[:, :7].equal(left[:, :7]), "the last action is always decoded"


def test_fast_tokens_continue_nothing(fast_folder, tmp_path, batch):
    folder = make_tiny("burnish_discrete", tmp_path / "p", cameras=("top", "wrist"), overrides={
        "tokenizer": "fast", "fast_folder": str(fast_folder), "training": "autoregressive"})  # fmt: skip
    theirs = load_policy(folder).policy
    assert not theirs.supports_rtc() and not supports_rtc_inference(theirs)
    with pytest.raises(BurnishError, match="FAST tokens, which have no order in time"):
        theirs.committed(torch.zeros(1, 8, 7), 2)


def test_waiting_actions_are_where_lerobot_looks(policy, prepared):
    theirs = policy.policy
    theirs.select_action(prepared)
    (name,) = theirs._action_queue_attrs
    assert len(getattr(theirs, name)) == theirs.config.n_action_steps - 1


def test_adapters_have_default_places(policy):
    theirs = policy.policy
    theirs.config.pretrained_path = "policy"
    wrapped = theirs.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 2})
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    for place in ("text_model.layers.0.self_attn.q_proj", "text_model.layers.3.self_attn.v_proj", "state_proj", "head"):
        assert any(f"{place}.lora_A" in name for name in trained), place
    assert not any("vision" in name for name in trained)


def test_sharding_wraps_layers_that_are_there(policy):
    kinds = {type(part).__name__ for part in policy.policy.modules()}
    assert policy.policy._fsdp_wrap_modules and set(policy.policy._fsdp_wrap_modules) <= kinds


def test_it_answers_questions_in_a_rollout(policy, prepared, batch):
    theirs = policy.policy
    assert theirs.supports_text_generation()
    asked = {**prepared, "query_kind": "vqa", "query_text": "how many?"}
    question = {"observation.images.top": batch["observation.images.top"][:1], "question": ["how many?"]}
    assert theirs.generate_text(asked) == policy.answer(question, max_new_tokens=16)[0]
    with pytest.raises(BurnishError, match="next_subtask"):
        theirs.generate_text({**asked, "query_kind": "next_subtask"})


def test_what_lerobot_saves_is_whole(policy, tmp_path, batch):
    """As lerobot-train saves: its own calls, without ours."""
    policy.policy.save_pretrained(tmp_path / "saved")
    policy.preprocessor.save_pretrained(tmp_path / "saved")
    policy.postprocessor.save_pretrained(tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    assert str(tmp_path / "saved" / "vlm") == again.config.vlm_model_name
    draws = policy.draw(3, torch.Generator().manual_seed(0))
    assert again.loss(batch, draws).total.equal(policy.loss(batch, draws).total)
