"""Plans that cannot work are refused with the reason; masks, peers, the choice of a plan."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyModel

from burnish.core.errors import BurnishError
from burnish.runtime.decoders import draw_decode, token_states
from burnish.sampling.autotune import AutoDecoder, candidates
from burnish.sampling.plan import DecodePlan
from burnish.sampling.token_model import DECODERS, Prompt, dense_mask, make_decoder


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ({}, {"block": 9}, "blocks of 9 do not divide a chunk of 56"),
        ({"block": 14}, {"block": 7}, "trained with attention over blocks of 14"),
        ({"block": 56}, {"block": 7}, "(bidirectional)"),
        ({}, {"add": 1.2}, "decoder: add is 1.2"),
        ({}, {"act": -0.1}, "decoder: act is -0.1"),
        ({}, {"threshold": float("nan")}, "decoder: threshold is nan"),
        ({}, {"share": 0}, "decoder: share is 0"),
        ({}, {"append": 1.5}, "decoder: append is 1.5"),
        ({}, {"min_unmasked": "half"}, "decoder: min_unmasked is 'half'"),
        ({}, {"shift": True}, "shift=True"),
        ({}, {"legal": [3, 99]}, "legal ids"),
        ({}, {"tau": 0.5}, "unknown option 'tau'"),
        ({}, {"preset": "slow"}, "unknown preset 'slow'"),
        ({"prompt_sees_actions": True}, {}, "prompt attends to action tokens"),
    ],
)
def test_impossible_plans_are_refused_with_the_reason(model, options, words):
    with pytest.raises(BurnishError) as error:
        make_decoder("pipelined", ToyModel(**model), **options)
    assert words in str(error.value)


def test_old_names_of_options_make_the_same_plan(caplog):
    """Recipes and stored policies (`decoder_options`) say conf and forced where threshold and min_unmasked are now."""
    from burnish.core import renames

    renames._told.clear()
    old, new = {"conf": 0.9, "forced": "one"}, {"threshold": 0.9, "min_unmasked": "one"}
    for name in ("pipelined", "fast_dllm", "auto", "autoregressive"):
        model = ToyModel(block=1, shift=True) if name == "autoregressive" else ToyModel()
        made = [make_decoder(name, model, **options) for options in (old, new)]
        if name != "auto":
            assert made[0].plan == made[1].plan and made[0].plan.threshold == 0.9
    assert "decoder: conf is now called threshold" in caplog.text and "min_unmasked" in caplog.text


def test_models_that_a_plan_cannot_use_are_refused():
    unmasked, odd = ToyModel(), ToyModel()
    unmasked.mask_id, odd.mask_id = None, 3
    with pytest.raises(BurnishError, match="without a MASK token"):
        make_decoder("pipelined", unmasked)
    with pytest.raises(BurnishError, match="MASK has id 3"):
        make_decoder("pipelined", odd)
    with pytest.raises(BurnishError, match="trained autoregressively"):
        make_decoder("autoregressive", ToyModel())
    with pytest.raises(BurnishError, match="unknown decoder 'greedy'"):
        make_decoder("greedy", ToyModel())


def test_prefixes_and_exits_that_do_not_fit_are_refused():
    model = ToyModel()
    decode, prompt = make_decoder("pipelined", model), model.prompts(2)
    for prefix, words in (
        (torch.zeros(2, 5, dtype=torch.long), "multiple of the 7 tokens"),
        (torch.zeros(1, 7, dtype=torch.long), r"\[2, n\]"),
        (torch.full((2, 7), model.mask_id), "no actions"),
    ):
        with pytest.raises(BurnishError, match=words):
            decode(prompt, prefix=prefix)
    with pytest.raises(BurnishError, match="early exit after 9"):
        decode(prompt, until=9)
    model.time_ordered = False
    with pytest.raises(BurnishError, match="FAST"):
        decode(prompt, prefix=torch.zeros(2, 7, dtype=torch.long))
    with pytest.raises(BurnishError, match="FAST"):
        make_decoder("pipelined", model, confidence="ordinal")


@settings(max_examples=25, deadline=None)
@given(
    block=st.sampled_from([1, 2, 3, 6]),
    num=st.integers(1, 4),
    size=st.integers(1, 6),
    prompt_sees_actions=st.booleans(),
)
def test_masks_follow_the_rule_of_blocks(block, num, size, prompt_sees_actions):
    length = block * num
    valid = torch.ones(2, size, dtype=torch.bool)
    valid[1, size // 2 + 1 :] = False
    mask = dense_mask(valid, length, block, prompt_sees_actions)
    number = [0] * size + [1 + i // block for i in range(length)]
    for b in range(2):
        for row in range(size + length):
            for slot in range(size + length):
                wanted = number[row] >= number[slot] or (prompt_sees_actions and row < size)
                wanted = wanted and (slot >= size or bool(valid[b, slot]))
                assert bool(mask[b, row, slot]) == wanted


def test_autoregressive_is_greedy_and_continues_a_prefix():
    model = ToyModel(length=12, step_length=3, block=1, shift=True)
    prompt = model.prompts(2, ragged=True)
    decode = make_decoder("autoregressive", model)
    full = decode(prompt)
    assert full.passes == 12 and full.positions == 9 + 11
    ids = torch.zeros(2, 0, dtype=torch.long)
    for _ in range(12):  # everything anew for each token
        cache = model.empty(prompt)
        size = ids.shape[1]
        logits = model.whole(prompt, ids, dense_mask(prompt.valid, size, 1)[:, 9:], cache)
        logits = logits[:, -1] if size else cache.prompt_logits
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(full.ids, ids)
    steps = []
    again = decode(prompt, prefix=ids[:, :6], stream=lambda done, _: steps.append(done))
    assert torch.equal(again.ids, ids) and again.passes == 6 and steps == [3, 4]
    assert torch.equal(decode(prompt, until=2).ids[:, :6], ids[:, :6])


def test_fast_dllm_recomputes_at_every_block():
    model = ToyModel(block=56)
    decoded = make_decoder("fast_dllm", model, threshold=0.0)(model.prompts(2))
    assert decoded.passes == 8 and decoded.positions == 8 * (9 + 56)
    worst = make_decoder("fast_dllm", model, threshold=1.01)(model.prompts(2))
    assert worst.passes == 56 and worst.positions == 8 * (9 + 56) + 48 * 7
    told = []
    make_decoder("fast_dllm", model)(model.prompts(1), stream=lambda steps, ids: told.append(steps))
    assert told == list(range(1, 9))


def test_full_bidirectional_follows_its_schedule_and_may_open_its_prompt():
    model = ToyModel(block=56, prompt_sees_actions=True)
    decoded = make_decoder("bidirectional", model)(model.prompts(2))
    assert decoded.passes == 12 and decoded.positions == 12 * (9 + 56)
    assert [int((decoded.unmasked[0] > turn).sum()) for turn in (1, 6, 12)] == [55, 39, 0]
    closed = ToyModel(block=56)
    one, other = (make_decoder(name, closed)(closed.prompts(2)) for name in ("bidirectional", "prompt_cached"))
    assert torch.equal(one.ids, other.ids) and other.positions == 9 + 12 * 56


def test_auto_takes_the_fastest_and_says_which():
    model = ToyModel(length=28)
    decoder = make_decoder("auto", model, repeats=1, budget=1.0)
    assert isinstance(decoder, AutoDecoder)
    decoded = decoder(model.prompts(1))
    times = next(iter(decoder.times.values()))
    assert decoded.detail["plan"] == min(times, key=times.get)
    plans = candidates(model, DecodePlan())
    assert {plan.block for plan in plans} == {7, 14, 28}
    assert {(plan.block, plan.append) for plan in plans} >= {(7, 1), (7, 4), (28, 1)}
    bidirectional = candidates(ToyModel(block=56), DecodePlan())
    assert [plan.block for plan in bidirectional] == [56]


def test_static_shapes_change_nothing(monkeypatch):
    from burnish.sampling.passes import Passes

    model = ToyModel()
    prompt = model.prompts(3, ragged=True)
    plain = make_decoder("pipelined", model)(prompt)
    monkeypatch.setattr(Passes, "static", lambda self, device: True)
    decoder = make_decoder("pipelined", model)
    padded = decoder(prompt)
    assert torch.equal(plain.ids, padded.ids) and padded.positions >= plain.positions
    assert [decoder.passes.blocks(fed, prompt.states.device) for fed in range(1, 9)] == [1, 2, 3, 4, 6, 6, 8, 8]


def test_compiled_passes_give_the_same_tokens(monkeypatch):
    # Dynamo's tracing is what can go wrong with caches written in place; generating code would take a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = ToyModel(length=28, layers=1)
    prompt = model.prompts(2, ragged=True)
    compiled = make_decoder("pipelined", model, compile=True)
    plain = make_decoder("pipelined", model)(prompt)
    assert torch.equal(compiled(prompt).ids, plain.ids)
    assert [compiled.passes.blocks(fed, prompt.states.device) for fed in (1, 2, 3, 4)] == [1, 2, 4, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_give_the_same_tokens():
    model = ToyModel(dtype=torch.float32)
    model.to("cuda")
    prompt = model.prompts(3, ragged=True)
    prompt = Prompt(prompt.states.cuda(), prompt.valid.cuda())
    plain = make_decoder("pipelined", model, graph=False)(prompt)
    decoder = make_decoder("pipelined", model, graph=True)
    for _ in range(2):  # captured, then replayed
        again = decoder(prompt)
        assert torch.equal(again.ids, plain.ids) and torch.equal(again.unmasked, plain.unmasked)


def test_buffers_are_used_again_for_another_prompt():
    model = ToyModel()
    decoder = make_decoder("pipelined", model)
    first, second = model.prompts(3, seed=1), model.prompts(3, seed=2, ragged=True)
    decoder(first)
    again = decoder(second)
    assert torch.equal(again.ids, make_decoder("pipelined", model)(second).ids)


def test_picture_shows_every_pass(tmp_path):
    model = ToyModel()
    decoded = make_decoder("pipelined", model, preset="paper", threshold=1.01)(model.prompts(1))
    states = token_states(decoded, 7)
    assert states.shape == (18, 56)
    assert (states[-1] >= 3).all() and (states == 3).sum() == 56
    # The first block: all open, then four, two, one, none of its tokens left; frozen in the pass after that.
    assert [(states[turn, :7] == 2).sum() for turn in range(4)] == [4, 2, 1, 0]
    assert (states[3, :7] < 5).all() and (states[4, :7] == 5).all()
    draw_decode(model, decoded, "pipelined", tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").stat().st_size > 5000


def test_all_decoders_are_plug_ins():
    make_decoder("one_pass", ToyModel())
    assert set(DECODERS) >= {
        "auto", "autoregressive", "bidirectional", "confidence", "d2f", "fast_dllm", "one_pass", "pipelined",
        "prompt_cached", "sequential", "together",
    }  # fmt: skip
