"""Which tokens come first, which chunks a decoder may write, and drawn tokens."""

import math
import random

import pytest
import torch
from toy import ToyModel

from burnish.core.errors import BurnishError
from burnish.sampling.autotune import CAREFUL
from burnish.sampling.sampled import SampledDecoder
from burnish.sampling.timing import measure_decoder
from burnish.sampling.token_model import Decoded, Decoder, Prompt, make_decoder, noise_seeds


def seeded(prompt, *seeds):
    return Prompt(prompt.states, prompt.valid, torch.tensor(seeds))


@pytest.fixture
def model():
    whole = ToyModel(block=56)
    whole.executed = 28
    return whole


@pytest.mark.parametrize("rule", [{"min_unmasked": "cosine"}, {"min_unmasked": "one", "threshold": 0.4}, {"steps": 3}])
def test_executed_steps_come_first(model, rule):
    unmasked = make_decoder("prompt_cached", model, order="executed", **rule)(model.prompts(3)).unmasked
    assert (unmasked[:, :28].amax(1) <= unmasked[:, 28:].amin(1)).all()
    free = make_decoder("prompt_cached", model, **rule)(model.prompts(3)).unmasked
    assert not (free[:, :28].amax(1) <= free[:, 28:].amin(1)).all()


@pytest.mark.parametrize("rule", [{}, {"min_unmasked": "one", "threshold": 0.1}, {"steps": 4}])
def test_earlier_steps_come_first(model, rule):
    unmasked = make_decoder("prompt_cached", model, order="time", **rule)(model.prompts(3)).unmasked.view(3, 8, 7)
    assert (unmasked[:, :-1].amax(2) <= unmasked[:, 1:].amin(2)).all()


def test_among_equals_confidence_decides(model):
    """Executed steps alone are decoded as a chunk of theirs is by confidence: the first pass unmasks the surest."""
    prompt = model.prompts(2)
    one = make_decoder("prompt_cached", model, order="executed", min_unmasked="one", threshold=1.01)(prompt)
    cache = model.empty(prompt)
    masked = torch.full((2, 56), model.mask_id)
    seen = torch.ones(2, 56, 9 + 56, dtype=torch.bool)
    sure = model.whole(prompt, masked, seen, cache).softmax(-1).amax(-1)
    assert (one.unmasked == 1).int().argmax(1).tolist() == sure[:, :28].argmax(1).tolist()


def test_a_random_order_follows_the_seeds_sample_by_sample(model):
    prompt = model.prompts(3)
    decode = make_decoder("prompt_cached", model, order="random")
    assert decode.draws and not make_decoder("prompt_cached", model).draws
    one, again, other = (decode(seeded(prompt, *seeds)).unmasked for seeds in ((1, 2, 3), (1, 2, 3), (4, 2, 3)))
    assert torch.equal(one, again) and not torch.equal(one[0], other[0]) and torch.equal(one[1:], other[1:])
    alone = decode(Prompt(prompt.states[1:2], prompt.valid[1:2], torch.tensor([2])))
    assert torch.equal(alone.unmasked[0], one[1])
    tau = [float(torch.corrcoef(torch.stack([sample.double(), torch.arange(56.0).double()]))[0, 1]) for sample in one]
    assert max(map(abs, tau)) < 0.5


@pytest.mark.parametrize("order", ["executed", "time", "random"])
def test_orders_are_cached_exactly(order):
    model = ToyModel()
    model.executed = 21
    prompt = seeded(model.prompts(3, ragged=True), 5, 6, 7)
    kept, anew = (
        make_decoder("pipelined", model, order=order, block=14, cache=cache)(prompt) for cache in (True, False)
    )
    assert torch.equal(kept.ids, anew.ids) and torch.equal(kept.unmasked, anew.unmasked)


def test_orders_that_nobody_knows_are_refused():
    model = ToyModel()
    with pytest.raises(BurnishError, match="order executed"):
        make_decoder("pipelined", model, order="executed")
    with pytest.raises(BurnishError, match="order is 'late'"):
        make_decoder("pipelined", model, order="late")
    with pytest.raises(BurnishError, match="fast_dllm: order random"):
        make_decoder("fast_dllm", model, order="random")
    model.time_ordered = False
    with pytest.raises(BurnishError, match="order time"):
        make_decoder("pipelined", model, order="time")


class Joint(ToyModel):
    """Knows a joint distribution over a few chunks exactly: the likeliest token of each place given what it sees."""

    def __init__(self, support, weights, block):
        super().__init__(length=len(support[0]), step_length=2, block=block, vocabulary=3)
        self.support, self.weights = torch.tensor(support), torch.tensor(weights, dtype=torch.float64)

    def whole(self, prompt, ids, visible, cache, **options):
        logits = torch.empty(*ids.shape, self.vocabulary, dtype=torch.float64)
        for b, row in enumerate(ids):
            for place in range(len(row)):
                known = (row != self.mask_id) & (torch.arange(len(row)) // self.block <= place // self.block)
                fits = (self.support[:, : len(row)][:, known] == row[known]).all(1)
                mass = torch.bincount(self.support[fits, place], self.weights[fits], minlength=self.vocabulary)
                mass = mass if mass.sum() else torch.ones_like(mass)  # after a chunk that cannot be
                logits[b, place] = (mass / mass.sum()).clamp_min(1e-30).log()
        return logits

    def extend(self, ids, positions, visible, cache, read=None):
        logits = self.whole(None, ids, visible, cache)
        return logits if read is None else logits.gather(1, read[..., None].expand(-1, -1, self.vocabulary))


def joints(count, seed=0):
    draws = random.Random(seed)
    for _ in range(count):
        support = {tuple(draws.randrange(3) for _ in range(4)) for _ in range(draws.randint(2, 6))}
        yield sorted(support), [draws.random() + 0.01 for _ in support]


def impossible(name, block, **options):
    wrong = 0
    for support, weights in joints(60):
        model = Joint(support, weights, block)
        cached = {} if block == 4 else {"cache": False}
        ids = make_decoder(name, model, **cached, **options)(model.prompts(1)).ids[0]
        wrong += tuple(ids.tolist()) not in support
    return wrong


@pytest.mark.parametrize(("name", "block"), [("confidence", 4), ("d2f", 2)])
def test_defaults_write_no_chunk_that_cannot_be(name, block):
    assert impossible(name, block) == 0


def test_less_careful_plans_write_such_chunks():
    """The argmax of every token by itself; half of the tokens at once; whatever reaches a half."""
    assert impossible("one_pass", 4) > 10
    assert impossible("together", 2, threshold=0.5) > 5
    assert impossible("pipelined", 2, preset="paper") > 0


def test_auto_keeps_to_its_budget_of_other_tokens():
    support, weights = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 0)], [0.4, 0.35, 0.25]
    model = Joint(support, weights, 2)
    decode = make_decoder("auto", model, repeats=1, cache=False)
    decoded = decode(model.prompts(1))
    key = next(iter(decode.chosen))
    assert tuple(decoded.ids[0].tolist()) in support
    allowed = [name for name, error in decode.errors[key].items() if error <= 0.05]
    assert decode.chosen[key] in (allowed or [list(decode.plans)[-1]]) and len(decode._kept) == 1
    nothing = make_decoder("auto", ToyModel(), repeats=1, budget=0.0)
    assert "min_unmasked=one" in nothing(ToyModel().prompts(2)).detail["plan"]
    assert nothing.plans[list(nothing.plans)[-1]].threshold == CAREFUL["threshold"]
    words = dict(word.split("=") for word in list(nothing.plans)[-1].split())
    assert make_decoder(
        "pipelined", ToyModel(), preset=words.pop("preset"), add=float(words["add"]), ties=words["ties"]
    )
    for budget in (-0.1, 1.5, math.nan, "no"):
        with pytest.raises(BurnishError, match="budget"):
            make_decoder("auto", ToyModel(), budget=budget)


def test_drawn_tokens_follow_seeds_and_greedy_ones_the_schedule(model):
    prompt = model.prompts(3, ragged=True)
    greedy = make_decoder("dd_vla", model, temperature=0, choice_temperature=0)(prompt)
    known = make_decoder("prompt_cached", model)(prompt)
    assert torch.equal(greedy.ids, known.ids) and torch.equal(greedy.unmasked, known.unmasked) and greedy.passes == 12
    assert greedy.positions == known.positions
    decode = make_decoder("dd_vla", model)
    one, again, other = (decode(seeded(prompt, *seeds)).ids for seeds in ((1, 2, 3), (1, 2, 3), (4, 2, 3)))
    assert torch.equal(one, again) and not torch.equal(one[0], other[0]) and torch.equal(one[1:], other[1:])
    alone = decode(Prompt(prompt.states[1:2], prompt.valid[1:2], torch.tensor([2])))
    assert torch.equal(alone.ids[0], one[1]) and isinstance(decode, SampledDecoder)
    prefix = one[:, :14]
    kept = decode(seeded(prompt, 1, 2, 3), prefix=prefix)
    assert torch.equal(kept.ids[:, :14], prefix) and (kept.ids < model.vocabulary).all()
    with pytest.raises(BurnishError, match="without a MASK"):
        model.mask_id = None
        make_decoder("dd_vla", model)


def test_drawn_tokens_have_the_models_frequencies():
    model = Joint([(0, 0), (1, 1), (2, 2)], [0.6, 0.3, 0.1], 2)
    prompt = Prompt(torch.zeros(1200, 9, 32), torch.ones(1200, 9, dtype=torch.bool), torch.arange(1200))
    ids = make_decoder("dd_vla", model, steps=1)(prompt).ids
    share = torch.bincount(ids[:, 0], minlength=3) / 1200
    torch.testing.assert_close(share, torch.tensor([0.6, 0.3, 0.1]), atol=0.05, rtol=0)
    assert (ids[:, 0] != ids[:, 1]).float().mean() > 0.3, "one pass mixes"
    two = make_decoder("dd_vla", model, steps=2)(prompt).ids
    assert (two[:, 0] == two[:, 1]).all(), "the second pass has seen the first"


def test_remasking_takes_back_what_became_unlikely():
    """The first token that is drawn is likely to be wrong; once the others are known it is hidden again."""

    class Late(ToyModel):
        def whole(self, prompt, ids, visible, cache, **options):
            logits = torch.zeros(*ids.shape, self.vocabulary, dtype=torch.float64)
            logits[..., 1] = 4.0 * (ids != self.mask_id).double().mean(-1, keepdim=True)
            return logits

        def extend(self, ids, positions, visible, cache, read=None):
            return self.whole(None, ids, visible, cache)

    model = Late(length=14, block=14, vocabulary=4)
    prompt = seeded(model.prompts(60), *range(60))
    right = [
        float((make_decoder("dd_vla", model, remask=remask, choice_temperature=0.0)(prompt).ids == 1).float().mean())
        for remask in (False, True)
    ]
    assert right[1] > right[0] + 0.02


def test_seeds_follow_the_noise_of_a_sample():
    noise = torch.randn(3, 8, 7)
    assert torch.equal(noise_seeds(noise)[1:2], noise_seeds(noise[1:2])) and len(set(noise_seeds(noise).tolist())) == 3


def test_steps_beyond_the_episode_have_no_error():
    class Known(Decoder):
        def __init__(self, model):
            self.model = model

        def decode(self, prompt, prefix, goal, stream):
            ids = torch.zeros(1, 56, dtype=torch.long)
            ids[0, 28:] = 7
            return Decoded(ids, 1, 1, torch.ones_like(ids))

    model = ToyModel()
    truth, padded = torch.zeros(1, 56, dtype=torch.long), torch.arange(8)[None] >= 4
    known = {"truth": truth, "actions": lambda ids: ids.view(-1, 8, 7).double()}
    whole = measure_decoder(Known(model), [model.prompts(1)], model, **known)
    cut = measure_decoder(Known(model), [model.prompts(1)], model, padded=padded, **known)
    assert whole["action_error"] == 3.5 and whole["token_error"] == 0.5
    assert cut["action_error"] == cut["token_error"] == 0
