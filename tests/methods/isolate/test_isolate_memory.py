"""What isolate keeps in memory beside the model, and that keeping less changes no number."""

import gc
import weakref

import pytest
import torch
from dissect import Dissected, recipe
from torch import nn

from burnish.core.seeding import generator
from burnish.methods import gradients as products
from burnish.methods.gradients import of_next_layers, stop_decay, stream_gradients
from burnish.methods.inputs import forward, token_groups
from burnish.methods.isolate import objective
from burnish.methods.start import Frozen, Start
from burnish.policies import load_policy
from burnish.train import run as training
from burnish.train.loop import train_step
from burnish.train.run import Run
from burnish.train.selfcheck import DivergenceGuard
from burnish.train.setup import own_accelerate_state
from burnish.train.step import Streams

LORA = ["--train.peft.method=lora", "--train.peft.rank=2"]


def robot(policy, count=2):
    return {
        **{f"observation.images.{c}": torch.rand(count, 3, 32, 32, generator=generator(c)) for c in policy.cameras},
        "observation.state": torch.zeros(count, 7), "action": torch.zeros(count, 8, 7), "task": ["open"] * count,
    }  # fmt: skip


def stepped(recipe, steps=3):
    """The run after some steps."""
    with own_accelerate_state():
        run = Run(recipe, progress=False)
        streams, guard = Streams(run), DivergenceGuard(recipe.output, 0, late=False)
        try:
            for _ in range(steps):
                train_step(run, streams, guard)
        finally:
            streams.close()
        return run


def test_gradients_are_handed_on_and_kept_nowhere():
    """As autograd.grad gives them, a shared parameter's in one piece, with the graph left for the task's backward."""
    draws = generator("stream")
    shared, other, unused = (nn.Parameter(torch.randn(4, 4, generator=draws)) for _ in range(3))
    hidden = torch.randn(3, 4, generator=draws) @ shared
    loss = (hidden @ other @ shared).square().sum()
    expected = torch.autograd.grad(loss, [shared, other], retain_graph=True)
    found = {}
    stream_gradients(loss, [shared, other, unused], lambda i, g: found.setdefault(i, []).append(g), retain_graph=True)
    assert {i: len(each) for i, each in found.items()} == {0: 1, 1: 1}
    assert all(torch.equal(found[i][0], expected[i]) for i in range(2))
    assert shared.grad is None
    loss.backward()  # no hook is left behind
    assert torch.equal(shared.grad, expected[0])


def test_old_and_new_direction_are_never_there_together(dataset, questions, tiny_smolvla, tmp_path, monkeypatch):
    """When a new protected gradient is taken, nothing holds the last one any more."""
    seen, last = [], []
    original = training.stream_gradients

    def watching(*args, **named):
        gc.collect()
        seen.append([one() for one in last])
        original(*args, **named)

    def refreshing(self, *args):
        made = refresh(self, *args)
        last[:] = [weakref.ref(made), weakref.ref(made.vector[0])]
        return made

    refresh = objective.Isolate._refresh
    monkeypatch.setattr(training, "stream_gradients", watching)
    monkeypatch.setattr(objective.Isolate, "_refresh", refreshing)
    inside = "method: aegis, optimiser: preconditioned"
    stepped(recipe(dataset, tiny_smolvla, tmp_path / "r", f"{inside}, questions: {questions}", "--train.log_every=100"))
    assert seen == [[], [None, None], [None, None]]


def test_no_product_is_longer_than_a_part(dataset, questions, tiny_smolvla, tmp_path, monkeypatch):
    """torch.dot counts in 32 bits, and a group of agem is the whole backbone."""
    longest, original = [0], torch.dot

    def measuring(one, other, **options):
        longest[0] = max(longest[0], one.numel(), other.numel())
        return original(one, other, **options)

    monkeypatch.setattr(torch, "dot", measuring)
    monkeypatch.setattr(products, "PART_CPU", 500)
    for number, inside in enumerate(["method: agem", "method: aegis, optimiser: preconditioned", "method: l2sp"]):
        stepped(recipe(dataset, tiny_smolvla, tmp_path / str(number), f"{inside}, questions: {questions}"), 2)
    assert 400 < longest[0] <= 500


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_start_is_what_was(tmp_path, place):
    draws = generator("start")
    parameters = {
        "a": nn.Parameter(torch.randn(5, 3, generator=draws)), "b": nn.Parameter(torch.tensor(2.5)),
        "c": nn.Parameter(torch.randn(4, generator=draws).bfloat16()),
        "d": nn.Parameter(torch.randn(7, generator=draws).bfloat16().float()),
    }  # fmt: skip
    before = {name: p.detach().clone() for name, p in parameters.items()}
    start = Start(parameters, tmp_path / "new" / "run" if place == "disk" else None)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(3)
    for _ in range(2):
        found = start.tensors()
        assert found.keys() == before.keys()
        assert all(torch.equal(found[n], b) and found[n].dtype == b.dtype for n, b in before.items())
    assert not list(tmp_path.rglob("*.*"))  # a file without a name
    if place == "memory":
        kinds = {name: kept.dtype for name, kept in start._kept.items()}
        assert kinds == {"a": torch.float32, "b": torch.bfloat16, "c": torch.bfloat16, "d": torch.bfloat16}
        away = torch.cat(list(start.away("a", parameters["a"])))
        torch.testing.assert_close(away, 2 * before["a"].flatten())


@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_frozen_policy_is_the_start_and_holds_no_second_one(request, tmp_path, kind, place):
    policy = load_policy(request.getfixturevalue(f"tiny_{kind}")).float().train()
    batch, layers = robot(policy), range(policy.num_layers)
    backbone = dict(policy.backbone_parameters())
    with torch.no_grad():
        expected = forward(policy.eval(), batch, layers)[0]
    policy.train()
    frozen = Frozen(policy, backbone, tmp_path if place == "disk" else None)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05)
    now = {name: p.detach().clone() for name, p in policy.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):  # whose cache holds casts of the weights that are in training
        forward(policy, batch, layers)
        frozen.call(forward, batch, layers)
    found = frozen.call(forward, batch, layers)[0]
    rows = token_groups(expected, "pooled")["tokens"]  # the state and padding look at what is not the backbone's
    assert all(torch.equal(found.hidden[layer][rows], expected.hidden[layer][rows]) for layer in layers)
    assert policy.training and all(torch.equal(p, now[n]) for n, p in policy.named_parameters())
    kept = sum(t.numel() for t in frozen._start._kept.values())
    assert kept == (0 if place == "disk" else sum(p.numel() for p in backbone.values()))


@pytest.mark.parametrize(("method", "more"), [("self_anchor", []), ("self_penalty", []), ("self_anchor", LORA)])
def test_self_methods_hold_no_second_policy(dataset, tiny_smolvla, tmp_path, method, more):
    """An edit has its direction in memory and the start on disk; a penalty the start; adapters are switched off."""
    run = Dissected(recipe(dataset, tiny_smolvla, tmp_path / "a", f"method: {method}", *more)).run
    frozen = run.objectives["isolate"].source.frozen
    assert frozen.policy is run.policy
    if more:
        assert frozen._start is None
    else:
        assert bool(frozen._start._kept) == (method == "self_penalty")


def test_self_penalty_under_autocast_sees_the_start(dataset, tiny_smolvla, tmp_path):
    """With cached casts of the trained weights the distance from the start would stay zero for ever."""
    inside = "method: self_penalty"
    run = stepped(recipe(dataset, tiny_smolvla, tmp_path / "a", inside, "--train.precision=bf16", "--train.lr=0.01"))
    batch = run.data.finish(run.data.raw(0), 0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        captured, _ = forward(run.policy, batch, range(run.policy.num_layers))
        moved = run.objectives["isolate"].source.loss(run.policy, batch, captured, 0)
    assert float(moved) > 0.01


@pytest.mark.parametrize(("method", "decay"), [("naive", 0.1), ("l2sp", 0), ("aegis", 0), ("replay", 0), ("random", 0)])
def test_weight_decay_does_not_pull_protected_weights_to_zero(
    dataset, questions, tiny_smolvla, tmp_path, method, decay
):
    inside = f"method: {method}, questions: {questions}"
    run = Run(recipe(dataset, tiny_smolvla, tmp_path / "a", inside, "--train.weight_decay=0.1"), progress=False)
    backbone = {id(p): n for n, p in run.policy.backbone_parameters()}
    found = {(id(p) in backbone, group["weight_decay"]) for group in run.optimizer.param_groups
             for p in group["params"] if p.ndim >= 2}  # fmt: skip
    assert found == {(True, decay), (False, 0.1)}
    assert sorted(id(p) for group in run.optimizer.param_groups for p in group["params"]) == sorted(
        id(p) for p in run.trained.values()
    )


def test_adapters_keep_their_decay_as_they_start_from_zero():
    adapter, weight, expert = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = torch.optim.AdamW([adapter, weight, expert], lr=1.0, weight_decay=0.5)
    stop_decay(optimizer, {"vlm.layers.0.lora_A.default.weight": adapter, "vlm.layers.0.weight": weight})
    for parameter in (adapter, weight, expert):
        parameter.grad = torch.zeros(2, 2)
    optimizer.step()
    assert [float(p[0, 0]) for p in (adapter, weight, expert)] == [0.5, 1.0, 0.5]


def test_shuffled_layers_have_the_gradients_of_their_neighbours(dataset, questions, tiny_smolvla, tmp_path):
    """The control changes where the direction lies and nothing else; what is outside of layers protects nothing."""
    names = ["vlm.layers.0.w", "vlm.layers.1.w", "vlm.layers.2.w", "tower.layers.0.w", "vlm.head"]
    g = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    moved = {name: float(value[0]) for name, value in of_next_layers(g).items()}
    assert moved == {names[0]: 1.0, names[1]: 2.0, names[2]: 0.0, names[3]: 3.0}
    assert of_next_layers({names[0]: torch.zeros(2), names[1]: torch.zeros(3)}) == {}
    plain, shuffled = (
        Dissected(recipe(dataset, tiny_smolvla, tmp_path / name, f"method: {name}, questions: {questions}"))
        for name in ("aegis", "shuffled")
    )
    assert all(torch.equal(plain.protected[n], shuffled.protected[n]) for n in plain.protected)
    layout, vector = shuffled.method.layout, shuffled.method._direction.vector
    expected = of_next_layers({n: g for n, g in plain.protected.items() if n in plain.raw})
    assert len(expected) > 20
    for name in layout.names:
        found = torch.cat(vector[layout.places[name]])
        assert torch.equal(found, expected.get(name, torch.zeros_like(plain.run.trained[name])).flatten())


def test_a_wrong_anchor_is_one_of_noise(dataset, questions, tiny_smolvla, tmp_path):
    right, wrong = (
        Dissected(recipe(dataset, tiny_smolvla, tmp_path / name, f"method: {name}, questions: {questions}"))
        for name in ("aegis", "wrong_anchor")
    )
    gaps = [run.method.source.gaps for run in (right, wrong)]
    assert gaps[0]["questions"] < gaps[1]["questions"] and set(gaps[1]) == {"questions", "robot"}
    assert any(not torch.equal(wrong.edited[n], wrong.raw[n]) for n in wrong.protected if n in wrong.raw)


@pytest.mark.parametrize("method", ["aegis", "random", "self_anchor"])
def test_cosine_of_protected_gradient_and_gradient_of_the_answers(dataset, questions, tiny_smolvla, tmp_path, method):
    """The cheapest test of the premise, against both gradients in full; no `.grad` is touched."""
    run = Dissected(recipe(dataset, tiny_smolvla, tmp_path / "a", f"method: {method}, questions: {questions}"))
    layout, direction = run.method.layout, run.method._direction
    batch = run.method._asked.batch(0)
    names, parameters = zip(*run.method._backbone.items(), strict=True)
    found = torch.autograd.grad(run.run.policy.language(batch).mean, parameters, allow_unused=True)
    answers = layout.parts({n: g.contiguous() for n, g in zip(names, found, strict=True) if g is not None})
    along, own = layout.dot(answers, direction.vector), layout.dot(answers, answers)
    both = (own > 0) & (direction.square > 0)
    expected = (along / (own * direction.square).sqrt())[both].sum() / both.sum().clamp_min(1)
    assert float(run.figures["isolate_answer_cosine"]) == pytest.approx(float(expected), abs=1e-6)
    assert (method == "self_anchor") == (not both.any())  # it equals its start in the first step
    assert method != "random" or abs(float(expected)) < 0.05
    assert all(torch.equal(run.run.trained[n].grad, run.edited[n]) for n in run.edited)


def test_there_is_no_cosine_without_questions(dataset, tiny_smolvla, tmp_path):
    run = Dissected(recipe(dataset, tiny_smolvla, tmp_path / "a", "method: self_anchor"))
    assert "isolate_answer_cosine" not in run.figures
