"""Questions through the policy's own prefix: the same states as robot inputs, and what is refused otherwise."""

import re
from contextlib import contextmanager
from dataclasses import replace

import fake
import pytest
import torch
from dissect import recipe

from burnish.core.errors import BurnishError
from burnish.core.seeding import generator
from burnish.methods.inputs import forward, question_batches, token_groups
from burnish.methods.isolate.anchor import Anchor, Provenance, build, build_from_questions
from burnish.policies import language, load_policy, vqa
from burnish.train.run import Run
from workshop.tiny import make_tiny

KINDS = {
    "smolvla": {}, "pi0": {}, "pi05": {}, "burnish_discrete": {},
    "smolvla with special tokens": {"add_image_special_tokens": True},
    "burnish_discrete scaled": {"scale_embeddings": True},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def policy(request, tmp_path_factory):
    """One camera, so that nothing stands between its picture and the text."""
    folder = tmp_path_factory.mktemp("prefix") / "policy"
    made = make_tiny(request.param.split()[0], folder, cameras=("top",), overrides=KINDS[request.param])
    return load_policy(made).float().eval()


def robot(picture, task="open the drawer"):
    draws = generator("prefix test")
    return {
        "observation.images.top": picture, "observation.state": torch.randn(1, 7, generator=draws),
        "action": torch.randn(1, 8, 7, generator=draws), "task": [task],
    }  # fmt: skip


@contextmanager
def entering(policy, layers=(0,)):
    """The states that enter the backbone, and its captured ones."""
    entered = []
    first = policy.backbone.text_model.layers[0].input_layernorm
    handle = first.register_forward_pre_hook(lambda _m, args: entered.append(args[0].detach()))
    with torch.no_grad(), policy.capture(list(layers)) as captured:
        yield entered, captured
    handle.remove()


def test_language_and_loss_enter_the_backbone_alike(policy):
    """The very numbers of one picture at the entrance of the first layer, which SmolVLA scales and its VLM does not."""
    picture = torch.rand(1, 3, 32, 32, generator=generator("picture"))
    with entering(policy) as (acting, captured):
        policy.loss(robot(picture), policy.draw(1, generator("draw")))
    expected = acting[0][:, captured.cameras["top"]]
    asked = {"observation.images.top": picture, "question": ["how many cups are there?"], "answer": ["2"]}
    with entering(policy) as (reading, captured):
        policy.language(asked, through="prefix")
    found = reading[0][:, captured.cameras["top"]]
    assert found.shape == expected.shape and float((found - expected).abs().max()) <= 1e-5
    image = captured.layout["image"][0]
    assert torch.equal(reading[0][0, image], found[0]), "the layout names other rows"


def test_a_question_in_the_place_of_the_instruction_has_its_states_in_every_layer(policy, monkeypatch):
    """Order, special tokens, masks and positions: the same text and picture give the same states down to the last."""
    picture = torch.rand(1, 3, 32, 32, generator=generator("picture"))
    batch = robot(picture)
    layers = range(policy.num_layers)
    with entering(policy, layers) as (_, acting):
        policy.loss(batch, policy.draw(1, generator("draw")))
    prepared = policy.preprocessor({k: v for k, v in batch.items() if k != "action"})
    ids = prepared["observation.language.tokens"][0][prepared["observation.language.attention_mask"][0].bool()]
    monkeypatch.setattr(vqa, "PROMPT", "{question}")
    text = policy.tokenizer.decode(ids, skip_special_tokens=False)
    bos = policy.tokenizer.bos_token
    leads = text.startswith(bos)
    text = text.removeprefix(bos)
    backbone = replace(policy.prefix, bos=leads)
    monkeypatch.setattr(type(policy), "prefix", property(lambda _: backbone))
    with entering(policy, layers) as (_, reading):
        policy.language({"observation.images.top": picture, "question": [text], "answer": ["2"]}, through="prefix")
    assert language.encode(backbone, picture, [text], None).input_ids[0].tolist() == ids.tolist()
    for layer in layers:
        for group in ("image", "text"):
            expected = acting.hidden[layer][acting.layout[group]]
            found = reading.hidden[layer][reading.layout[group]][: len(expected)]  # the answer comes after
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_answers_are_scored_after_the_prefix(policy):
    """Several turns about one picture; a later one changes nothing before it, and the gradient reaches the backbone."""
    picture = torch.rand(1, 3, 32, 32, generator=generator("picture"))
    one = {"observation.images.top": picture, "question": ["how many?"], "answer": ["2"]}
    two = {**one, "question": [["how many?", "is it red?"]], "answer": [["2", "no"]]}
    first, both = (policy.language(batch, through="prefix") for batch in (one, two))
    lone = first.per_token[first.mask]
    torch.testing.assert_close(both.per_token[both.mask][: len(lone)], lone, rtol=1e-4, atol=1e-4)
    assert both.mask.sum() > first.mask.sum() > 0
    gradients = torch.autograd.grad(first.mean, [p for _, p in policy.backbone_parameters()], allow_unused=True)
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients) > 10


def about(policy, **more):
    return Provenance("abc", policy.num_layers, 0, "fake", 0, template=vqa.PROMPT, **more)


@pytest.mark.parametrize("tokens", ["apart", "pooled"])
def test_the_base_agrees_with_its_own_anchor(policy, tmp_path, tokens):
    """The anchor loss of the undrifted base on held-out questions over the anchor's variance: at most 0.1."""
    folder = fake.make_questions(tmp_path / "q", count=160)
    anchor = build_from_questions(policy, folder, 3000, 16, about(policy, tokens=tokens), "cpu")
    assert anchor.about.held_out == 32 and anchor.about.samples == 128
    assert 0 < anchor.about.gap <= 0.1
    assert anchor.gap(anchor) == 0
    by_hand = build(policy, question_batches(folder, 32, 16, 0, "cpu", skip=128), about(policy, tokens=tokens))
    assert anchor.about.gap == pytest.approx(anchor.gap(by_hand), rel=1e-9)


def test_smolvla_is_measured_where_it_acts(tiny_smolvla, tmp_path):
    """Read as the VLM alone reads, questions lie far from any robot input before anything has drifted."""
    policy = load_policy(tiny_smolvla).float().eval()
    folder = fake.make_questions(tmp_path / "q", count=60)
    anchor = build_from_questions(policy, folder, 3000, 16, about(policy), "cpu")
    frames = {
        **{f"observation.images.{c}": torch.rand(4, 3, 32, 32, generator=generator(c)) for c in policy.cameras},
        "observation.state": torch.zeros(4, 7), "action": torch.zeros(4, 8, 7), "task": ["q1?", "q2?", "q3?", "q4?"],
    }  # fmt: skip
    alone = Anchor(anchor.about)
    with torch.no_grad():
        for batch in question_batches(folder, 48, 48, 0, "cpu"):
            with policy.capture(range(policy.num_layers)) as captured:
                mask = policy.language(batch, through="vlm").mask
            for group, rows in token_groups(captured, "apart", mask).items():
                for layer, hidden in captured.hidden.items():
                    moments = type(next(iter(anchor.moments.values()))).empty(hidden.shape[-1])
                    moments.add(hidden[rows])
                    alone.moments[layer, group] = moments
    acting = build(policy, [frames], about(policy))
    assert anchor.gap(acting) < 2 and alone.gap(acting) > 10 * anchor.gap(acting)


def test_a_base_that_disagrees_is_refused_with_the_reason(policy, tmp_path, monkeypatch):
    folder = fake.make_questions(tmp_path / "q", count=160)
    original, calls = forward, []

    def drifting(policy, batch, layers):
        captured, answers = original(policy, batch, layers)
        calls.append(1)
        if len(calls) > 8:  # the questions that were kept aside
            captured.hidden = {layer: 1.5 * states for layer, states in captured.hidden.items()}
        return captured, answers

    monkeypatch.setattr("burnish.methods.isolate.anchor.forward", drifting)
    with pytest.raises(BurnishError, match=r"do not agree: on 32 held-out questions.*at most 0\.1; try:"):
        build_from_questions(policy, folder, 3000, 16, about(policy), "cpu")


@pytest.mark.parametrize("source", ["built", "file"])
def test_a_run_says_how_far_its_base_is_from_the_anchor(dataset, tiny_smolvla, tmp_path, caplog, source):
    folder = fake.make_questions(tmp_path / "q", count=160)
    inside = f"method: question_anchor, questions: {folder}"
    if source == "file":
        from burnish.cli.main import main

        file = tmp_path / "a.safetensors"
        assert main(["method", "isolate", "anchor", str(tiny_smolvla), str(folder), "-o", str(file)]) == 0
        inside += f", anchor: {file}"
    run = Run(recipe(dataset, tiny_smolvla, tmp_path / "r", inside), progress=False)
    said = re.search(r"anchor loss is (\S+) of the anchor's variance on questions and (\S+) on the robot", caplog.text)
    gaps = run.objectives["isolate"].source.gaps
    assert 0 < gaps["questions"] <= 0.1 < gaps["robot"]
    assert [float(x) for x in said.groups()] == pytest.approx([gaps["questions"], gaps["robot"]], rel=1e-2)
    figures = run.objectives["isolate"].metrics()
    assert (figures["isolate_gap_questions"], figures["isolate_gap_robot"]) == tuple(gaps.values())


def test_an_anchor_of_other_pictures_under_the_same_name_is_refused(dataset, tiny_smolvla, tmp_path):
    import numpy as np

    folder = fake.make_questions(tmp_path / "q", count=160)
    policy = load_policy(tiny_smolvla)
    from burnish.core.provenance import weights_hash

    made = replace(about(policy), base_hash=weights_hash(policy), source="q")
    build_from_questions(policy.float(), folder, 3000, 16, made, "cpu").save(tmp_path / "a.safetensors")
    np.save(folder / "images.npy", np.zeros((5, 32, 32, 3), np.uint8))
    objective = f"method: question_anchor, questions: {folder}, anchor: {tmp_path / 'a.safetensors'}"
    with pytest.raises(BurnishError, match="do not agree: on 64 held-out questions"):
        Run(recipe(dataset, tiny_smolvla, tmp_path / "r", objective), progress=False)
