"""Invariants of block decoding, against plain loops, closed forms and deliberate mistakes."""

import itertools
import random

import pytest
import torch
from reference import pipelined as plain
from toy import ToyModel

from burnish.core.errors import BurnishError
from burnish.runtime.verify import Watched, check_model, shift
from burnish.sampling import passes, state, unmask
from burnish.sampling.token_model import Prompt, make_decoder


def one(prompt, b):
    return Prompt(prompt.states[b : b + 1], prompt.valid[b : b + 1])


def random_case(draws):
    """A model (small, any block size, shifted or not, dull or sharp) and options of a plan for it."""
    block = draws.choice([1, 2, 3, 5, 7, 8])
    num = draws.choice([1, 2, 3, 5, 8])
    wide = draws.choice([w for w in (1, 2) if num % w == 0])
    model = {
        "length": block * num, "step_length": block, "block": block, "shift": draws.random() < 0.5,
        "sharp": draws.choice([1.0, 3.0, 6.0]), "seed": draws.randrange(10**6), "width": 16, "vocabulary": 12,
    }  # fmt: skip
    plan = {
        "block": block * wide, "add": draws.choice([0, 2 / 7, 0.4, 0.5, 0.6, 1]),
        "act": draws.choice([0, 0.4, 4 / 7, 0.7, 1]), "threshold": draws.choice([0.0, 0.2, 0.3, 0.5, 0.9, 1.01]),
        "share": draws.choice([1, 2, 3]), "min_unmasked": draws.choice(["floor", "ceil", "one"]),
    }  # fmt: skip
    return model, plan


@pytest.mark.parametrize(("dtype", "first"), [(torch.float32, 0), (torch.float64, 500)], ids=str)
def test_cached_and_batched_equals_uncached_loops_in_1000_cases(dtype, first):
    """Half of them in each precision, no model or plan in both."""
    draws, cases = random.Random(first), first
    while cases < first + 500:
        model_options, plan = random_case(draws)
        model = ToyModel(dtype=dtype, **model_options)
        prompt = model.prompts(10, seed=cases, ragged=True)
        ours = make_decoder("pipelined", model, **plan)(prompt)
        most = 0
        for b in range(10):
            ids, committed, count = plain(
                model,
                one(prompt, b),
                plan["block"],
                plan["add"],
                plan["act"],
                plan["threshold"],
                plan["share"],
                plan["min_unmasked"],
            )
            assert ours.ids[b].tolist() == ids, (model_options, plan, b)
            assert ours.unmasked[b].tolist() == committed, (model_options, plan, b)
            most = max(most, count)
        assert ours.passes == most == ours.host_syncs
        cases += 10


# Section 2.8 of the specification of Fast-dVLA: k = 7, N = 8, nothing is ever confident.
WORST = {
    (1, 1): (32, 24, 56, 8), (0.5, 0.7): (18, 17, 42, 8), (0.4, 0.6): (18, 17, 42, 8), (0.4, 0.4): (11, 10, 28, 8),
    (2 / 7, 4 / 7): (18, 10, 35, 8), (0.6, 0.8): (25, 17, 49, 8), (0, 0): (11, 10, 14, 8),
}  # fmt: skip


@pytest.mark.parametrize("thresholds", WORST, ids=str)
def test_worst_case_pass_counts(thresholds):
    model = ToyModel()
    rules = ({"min_unmasked": "floor"}, {"min_unmasked": "ceil"}, {"min_unmasked": "one"}, {"share": 1})
    (add, act), prompt = thresholds, model.prompts(1)
    counts = tuple(
        make_decoder("pipelined", model, add=add, act=act, threshold=1.01, preset="paper", **rule)(prompt).passes
        for rule in rules
    )
    assert counts == WORST[thresholds]


def cache_too_early(layout_state, layout, plan, positions, ids, sure):
    """`settle`, and then every block that this very pass completed is cached too: the mistake."""
    state.settle(layout_state, layout, plan, positions, ids, sure)
    done = (~state.is_masked(layout_state, layout)).view(len(ids), -1, plan.block).all(-1)
    layout_state.cached.copy_(torch.maximum(layout_state.cached, done.long().cumprod(1).sum(1)))


def test_freezing_one_pass_early_is_caught(monkeypatch):
    monkeypatch.setattr(passes, "settle", cache_too_early)
    wrong = 0
    for seed in range(10):
        model = ToyModel(seed=seed)
        prompt = model.prompts(4, seed=seed)
        ours = make_decoder("pipelined", model)(prompt)
        true = [plain(model, one(prompt, b), 7, 2 / 7, 4 / 7, 0.9, 2, "ceil")[0] for b in range(4)]
        wrong += sum(ours.ids[b].tolist() != true[b] for b in range(4))
    assert wrong > 20
    found = {check.name: check.ok for check in check_model(model, prompt)}
    assert not found["cached = uncached"] and not found["cached once"]


@pytest.mark.parametrize("share", [2, 3, 4])
def test_the_stall_of_algorithm_1_is_caught(monkeypatch, share):
    def literal(sure, is_open, active, turns, plan, rank=None):
        count = is_open.sum(-1) // plan.share  # 0 for the last tokens: nothing is forced any more
        forced = (sure.masked_fill(~is_open, -1).argsort(-1, descending=True).argsort(-1)) < count[..., None]
        return is_open & ((sure >= plan.threshold) | forced)

    model = ToyModel()
    monkeypatch.setattr(state, "choose", literal)
    with pytest.raises(BurnishError, match="came to no end"):
        make_decoder("pipelined", model, threshold=1.01, share=share)(model.prompts(1))


@pytest.mark.parametrize(("block", "shift"), [(7, False), (7, True), (56, False), (14, True)])
def test_own_checks_pass_on_a_sound_model(block, shift):
    model = ToyModel(block=block, shift=shift)
    found = {check.name: check.ok for check in check_model(model, model.prompts(3, ragged=True))}
    assert set(found.values()) <= {True, None} and len(found) == 7


def test_checks_catch_a_model_that_leaks_and_one_that_shifts():
    class Leaky(ToyModel):
        def whole(self, prompt, ids, visible, cache, **options):
            return super().whole(prompt, ids, torch.ones_like(visible), cache, see_actions=True)

    model = Leaky()
    found = {check.name: check.ok for check in check_model(model, model.prompts(3))}
    assert not found["no look-ahead"] and not found["prompt isolation"] and not found["cached once"]

    class Told(ToyModel):
        """The row at a position tells that position, modulo V."""

        def whole(self, prompt, ids, visible, cache, **options):
            super().whole(prompt, ids, visible, cache, **options)
            told = torch.arange(ids.shape[1]).expand_as(ids) % self.vocabulary
            return torch.nn.functional.one_hot(told, self.vocabulary).double()

    model = Told()
    truth = (torch.arange(56) % model.vocabulary).expand(3, -1)
    assert shift(model, model.prompts(3), truth).ok
    model.shift = True
    assert shift(model, model.prompts(3), truth).ok is False


@pytest.mark.parametrize("shift", [False, True])
def test_bounds_and_limits_of_the_thresholds(shift):
    model = ToyModel(shift=shift)
    prompt = model.prompts(3)

    def run(name="pipelined", **options):
        return make_decoder(name, model, **options)(prompt)

    for share, add, act in itertools.product((1, 3), (0, 0.5, 1), (0, 0.7, 1)):
        count = run(share=share, add=add, act=act, min_unmasked="floor").passes
        assert 8 <= count <= 8 * 7
    assert run(threshold=0.0).passes == 8
    assert run(share=1, threshold=1.01).passes == 8
    one_by_one, together = run("sequential", threshold=1.01), run(add=1.0, act=1.0, threshold=1.01)
    assert torch.equal(one_by_one.ids, together.ids) and one_by_one.passes == 24
    assert torch.equal(run(block=56, min_unmasked="one", ties="first").ids, run("confidence").ids)


def test_blocks_of_one_token_go_left_to_right():
    model = ToyModel(length=12, step_length=4, block=1)
    decoded = make_decoder("sequential", model, threshold=1.01)(model.prompts(2))
    assert decoded.unmasked.tolist() == [list(range(1, 13))] * 2


def test_a_semi_activated_block_that_is_never_confident_commits_nothing():
    model = ToyModel()
    decoded = make_decoder("pipelined", model, add=0.0, act=1.0, threshold=1.01)(model.prompts(2))
    first, last = decoded.unmasked.view(2, 8, 7).min(-1).values, decoded.unmasked.view(2, 8, 7).max(-1).values
    assert (first[:, 1:] > last[:, :-1]).all()
    assert (decoded.detail["blocks"]["opened"] == torch.arange(1, 9)).all()


def test_equal_thresholds_leave_no_block_semi_activated():
    model = ToyModel()
    blocks = make_decoder("pipelined", model, add=0.5, act=0.5)(model.prompts(3)).detail["blocks"]
    assert torch.equal(blocks["opened"], blocks["active"])


@pytest.mark.parametrize("name", ["pipelined", "sequential", "d2f", "prompt_cached", "bidirectional", "confidence",
                                  "one_pass", "fast_dllm"])  # fmt: skip
@pytest.mark.parametrize("shift", [False, True])
def test_a_sample_is_independent_of_its_batch(name, shift):
    model = ToyModel(block=7 if name in ("pipelined", "sequential", "d2f") else 56, shift=shift)
    prompt = model.prompts(4, ragged=True)
    together = make_decoder(name, model)(prompt)
    for b in range(4):
        alone = make_decoder(name, model)(one(prompt, b))
        assert torch.equal(alone.ids[0], together.ids[b])
    assert (together.ids < model.vocabulary).all()


def test_every_pass_commits_and_nothing_changes_afterwards():
    for seed in range(5):
        model = ToyModel(seed=seed)
        watched = Watched(model)
        decoded = make_decoder("pipelined", watched, threshold=1.01)(model.prompts(3))
        for ids, positions in watched.fed:
            final = torch.cat((decoded.ids, torch.zeros(3, 1, dtype=torch.long)), 1).gather(1, positions)
            known = (positions < 56) & (ids != model.mask_id)
            assert torch.equal(ids[known], final[known])
        for sample in decoded.unmasked:
            assert set(sample.tolist()) == set(range(1, int(sample.max()) + 1))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_prefix_is_kept_and_freezes_at_once(shift, steps):
    model = ToyModel(shift=shift)
    prompt = model.prompts(3, ragged=True)
    prefix = torch.randint(model.vocabulary, (3, 7 * steps), generator=torch.Generator().manual_seed(0))
    cached = make_decoder("pipelined", model)(prompt, prefix=prefix)
    plain_ = make_decoder("pipelined", model, cache=False)(prompt, prefix=prefix)
    assert torch.equal(cached.ids, plain_.ids) and torch.equal(cached.ids[:, : 7 * steps], prefix)
    assert (cached.unmasked[:, : 7 * steps] == 0).all()
    if steps < 8:
        assert (cached.detail["blocks"]["cached"][:, :steps] == 1).all()


def test_early_exit_gives_the_same_first_steps_and_streaming_tells_them():
    model = ToyModel()
    prompt = model.prompts(2)
    decoder = make_decoder("pipelined", model)
    told = []
    full = decoder(prompt, stream=lambda steps, ids: told.append((steps, ids)))
    early = decoder(prompt, until=3)
    assert torch.equal(early.ids[:, :21], full.ids[:, :21]) and early.passes < full.passes
    assert [steps for steps, _ in told] == sorted({steps for steps, _ in told}) and told[-1][0] == 8
    for steps, ids in told:
        assert torch.equal(ids[:, : 7 * steps], full.ids[:, : 7 * steps])
    assert told[0][1][:, -1].eq(model.mask_id).all()


def test_more_blocks_at_once_need_fewer_passes_than_blocks():
    model = ToyModel()
    prompt = model.prompts(2)
    assert make_decoder("pipelined", model, threshold=0.0, append=4)(prompt).passes == 2
    cached, plain_ = (make_decoder("pipelined", model, append=3, cache=cache)(prompt) for cache in (True, False))
    assert torch.equal(cached.ids, plain_.ids)


@pytest.mark.parametrize("step", [1, 4, 7, 10])
def test_all_blocks_together_need_the_passes_of_one_block(step):
    """The forced share halves every block, the odd token included, so a block of k takes floor(log2 k) + 1 passes."""
    for steps in (1, 2, 8):
        model = ToyModel(length=steps * step, step_length=step, block=step)
        prompt = model.prompts(2)
        options = {"preset": "together", "threshold": 1.01, "ties": "first"}
        cached, anew = (make_decoder("pipelined", model, cache=cache, **options)(prompt) for cache in (True, False))
        assert cached.passes == step.bit_length() and torch.equal(cached.ids, anew.ids)
        assert torch.equal(cached.unmasked, anew.unmasked) and cached.positions == 9 + cached.passes * steps * step


def test_confidence_threshold_and_the_theorem_of_fast_dllm():
    """Two modes, (0, 0) and (1, 1), each half: committed together at 0.5 the tokens may be mixed; at 0.9 they are not.

    Theorem 1 of Fast-dLLM: n tokens together equal the joint argmax only if each is surer than 1 - 1 / (n + 1).
    """

    class TwoModes(ToyModel):
        """Position 0 leans to mode 0, position 1 to mode 1; once one is known, the other follows."""

        def whole(self, prompt, ids, visible, cache, **options):
            return self._told(ids)

        def extend(self, ids, positions, visible, cache, read=None):
            logits = self._told(ids)
            return logits if read is None else logits.gather(1, read[..., None].expand(-1, -1, 2))

        def _told(self, ids):
            logits = torch.zeros(*ids.shape, 2, dtype=torch.float64)
            logits[:, 0, 0] = logits[:, 1, 1] = 0.1
            for here, there in ((0, 1), (1, 0)):
                known = ids[:, there] != self.mask_id
                logits[known, here] = torch.nn.functional.one_hot(ids[known, there], 2).double() * 20
            return logits

    model = TwoModes(length=2, step_length=2, block=2, vocabulary=2)
    mixed = make_decoder("confidence", model, threshold=0.5)(model.prompts(1)).ids[0].tolist()
    safe = make_decoder("confidence", model, threshold=0.9, ties="first")(model.prompts(1)).ids[0].tolist()
    assert mixed == [0, 1] and safe == [0, 0]


def test_ordinal_confidence_counts_neighbouring_bins():
    from burnish.sampling.plan import DecodePlan

    logits = torch.tensor([[0.1, 0.4, 0.35, 0.05, 0.1]]).log()
    ids, sure = unmask.likeliest(logits, DecodePlan(confidence="ordinal", width=1))
    assert ids.tolist() == [1] and sure.item() == pytest.approx(0.85)
    ids, sure = unmask.likeliest(logits, DecodePlan(legal=(3, 4)))
    assert ids.tolist() == [4] and sure.item() == pytest.approx(2 / 3)


def test_schedules_leave_what_they_say():
    from burnish.sampling.plan import DecodePlan

    for rule, left in (("cosine", [55, 54, 51, 48, 44, 39, 34, 28, 21, 14, 7, 0]), ("linear", None)):
        plan = DecodePlan(block=56, min_unmasked=rule, steps=12)
        still, seen = 56, []
        for turn in range(1, 13):
            still -= int(unmask.least_unmasked(torch.tensor([still]), torch.tensor([turn]), plan))
            seen.append(still)
        assert seen[-1] == 0
        assert left is None or seen == left


def test_tokens_carried_stay_and_save_passes():
    """What an earlier call has left behind its early exit is frozen from the first pass; the rest is as if it were
    known from the start; where all is known nothing runs."""
    model = ToyModel(seed=3, block=56)
    prompt, mask = model.prompts(2, seed=3), model.mask_id
    decoder = make_decoder("confidence", model, threshold=0.5)
    whole, early = decoder(prompt), decoder(prompt, until=1)
    assert early.passes < whole.passes and (early.ids[:, :7] != mask).all()
    assert ((early.ids[:, 14:] != mask) & (early.ids[:, 14:] == whole.ids[:, 14:])).any(), "something to carry"
    carry = torch.cat([early.ids[:, 7:], torch.full((2, 7), mask)], 1)
    prefix = torch.full((2, 7), 3)
    found = decoder(prompt, prefix=prefix, carry=carry)
    known = torch.cat([prefix, carry[:, 7:]], 1)
    assert found.ids[known != mask].equal(known[known != mask]) and (found.ids < mask).all()
    assert (found.unmasked[known != mask] == 0).all() and (found.unmasked[known == mask] > 0).all()
    assert found.passes < decoder(prompt, prefix=prefix).passes
    again = decoder(prompt, carry=found.ids, until=8)
    assert again.ids.equal(found.ids) and again.passes == 0
    assert decoder(prompt, carry=torch.full_like(carry, mask)).ids.equal(whole.ids)


def test_what_cannot_be_carried_is_refused():
    model = ToyModel()
    prompt, carry = model.prompts(1), torch.full((1, 56), 16)
    for decoder, given, said in (
        ("pipelined", carry[:, :7], "carried tokens of shape"),
        ("pipelined", carry + 1, "no actions"),
        ("fast_dllm", carry, "left to right"),
    ):
        with pytest.raises(BurnishError, match=said):
            make_decoder(decoder, model)(prompt, carry=given)
