"""On the real policies with tiny weights: tokens, masks, layers, gradients; and on the vision-language model alone."""

import pytest
import torch

from burnish.core.seeding import generator
from burnish.methods.align.aligner import Aligner, token_grid
from burnish.methods.align.options import make_config
from burnish.policies import load_policy

TASKS = ["pick up the red cube", "open", "put the green ball on the plate"]


@pytest.fixture(params=["smolvla", "pi0", "pi05"])
def policy(request):
    return load_policy(request.getfixturevalue(f"tiny_{request.param}"))


@pytest.fixture
def batch():
    draws = generator("align batch")
    return {
        "observation.images.top": torch.rand(3, 3, 32, 32, generator=draws),
        "observation.images.wrist": torch.rand(3, 3, 32, 32, generator=draws),
        "observation.state": torch.randn(3, 7, generator=draws),
        "action": torch.randn(3, 8, 7, generator=draws),
        "action_is_pad": torch.zeros(3, 8, dtype=torch.bool),
        "task": list(TASKS),
    }


def make_aligner(captured, cameras, shown=None, **options):
    width = captured.hidden[0].shape[-1]
    config = make_config("default", {"nested": False, **options})
    if shown is None:
        shown = torch.ones(len(cameras), *token_grid(captured, cameras), dtype=torch.bool)
    return Aligner(config, [(0, 0), (1, 1)], width, (6, 6), cameras, shown, generator("aligner"))


def make_targets(captured, cameras):
    side = token_grid(captured, cameras)
    shape = (len(captured.hidden[0]), len(cameras), *side, 6)
    return {layer: torch.randn(shape, generator=generator("targets", layer)) for layer in (0, 1)}


def test_alignment_trains_the_backbone_of_every_policy(policy, batch):
    with policy.capture([0, 1]) as captured:
        out = policy.loss(batch, policy.draw(3, generator("draw")))
    aligner = make_aligner(captured, policy.cameras)
    losses = aligner(captured, make_targets(captured, policy.cameras))
    assert all(0 <= loss.item() <= 2 for loss in losses)
    (out.total + aligner.total(losses)).backward()
    trained = [n for n, p in policy.backbone_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("vision" in name for name in trained) and any("layers.1." in name for name in trained)
    assert all(p.grad is not None for p in aligner.parameters())


def test_tokens_are_those_of_the_image_rows_in_the_order_of_the_cameras(policy, batch):
    with policy.capture([0, 1]) as captured, torch.no_grad():
        policy.loss(batch, policy.draw(3, generator("draw")))
    aligner = make_aligner(captured, policy.cameras)
    tokens = aligner.tokens(captured.hidden[0], captured)
    by_row = torch.stack([captured.hidden[0][b, captured.layout["image"][b]] for b in range(3)])
    assert torch.equal(tokens, by_row) and aligner.mask(captured).all()
    late = make_aligner(captured, policy.cameras, late_tokens=1)
    count = tokens.shape[1] // len(policy.cameras)
    assert torch.equal(late.tokens(captured.hidden[0], captured)[:, : count - 1], tokens[:, 1:count])


def test_an_absent_camera_counts_nothing(policy, batch):
    with policy.capture([0, 1]) as captured, torch.no_grad():
        policy.loss(batch, policy.draw(3, generator("draw")))
    targets = make_targets(captured, policy.cameras)
    whole = make_aligner(captured, policy.cameras)
    wrist = captured.cameras["wrist"]
    captured.layout["image"][:, wrist] = False
    for target in targets.values():
        target[:, 1] = torch.nan
    losses = [loss.item() for loss in whole(captured, targets)]
    alone = make_aligner(captured, ("top",))
    expected = [loss.item() for loss in alone(captured, {k: t[:, :1] for k, t in targets.items()})]
    assert losses == pytest.approx(expected, abs=1e-6)


def test_tokens_of_padding_count_nothing(policy, batch):
    with policy.capture([0, 1]) as captured, torch.no_grad():
        policy.loss(batch, policy.draw(3, generator("draw")))
    targets = make_targets(captured, policy.cameras)
    shown = torch.ones(2, *token_grid(captured, policy.cameras), dtype=torch.bool)
    shown[0, 0] = False  # the first camera is padded at the top, the second at the left
    shown[1, :, 0] = False
    for target in targets.values():
        target[:, ~shown] = torch.nan
    aligner = make_aligner(captured, policy.cameras, shown)
    losses = aligner(captured, targets)
    for (student, teacher), loss in zip(aligner.pairs, losses, strict=True):
        states = aligner.tokens(captured.hidden[student], captured)[:, shown.flatten()]
        projected = aligner.projectors(student, states)
        cosine = torch.cosine_similarity(projected, targets[teacher].flatten(1, 3)[:, shown.flatten()], dim=-1)
        assert loss.item() == pytest.approx(1 - cosine.mean().item(), abs=1e-5)


def test_layers_are_outputs_of_blocks(tiny_smolvla):
    """capture(k) is hidden_states[k + 1] of the plain language model, and the last one is before the final norm."""
    policy = load_policy(tiny_smolvla)
    question = {
        "observation.images.top": torch.rand(2, 3, 32, 32, generator=generator("q")),
        "question": ["what colour is the cube?", "how many?"],
        "answer": ["red", "12"],
    }
    text_model, seen = policy.backbone.text_model, {}
    original = text_model.forward

    def watched(*args, **named):
        out = original(*args, **{**named, "output_hidden_states": True})
        seen["states"] = out.hidden_states
        return out

    text_model.forward = watched
    try:
        with policy.capture(range(policy.num_layers)) as captured, torch.no_grad():
            policy.language(question)
    finally:
        del text_model.forward
    for layer in range(policy.num_layers - 1):
        torch.testing.assert_close(captured.hidden[layer], seen["states"][layer + 1])
    normed = text_model.norm(captured.hidden[policy.num_layers - 1])
    torch.testing.assert_close(normed, seen["states"][-1])


def test_the_vision_language_model_alone_can_be_aligned(tiny_smolvla):
    policy = load_policy(tiny_smolvla)
    question = {
        "observation.images.top": torch.rand(2, 3, 32, 32, generator=generator("q")),
        "question": ["what colour is the cube?", "how many?"],
        "answer": ["red", "12"],
    }
    with policy.capture([0, 1]) as captured:
        answer = policy.language(question).mean
    aligner = make_aligner(captured, ("top",))
    (answer + aligner.total(aligner(captured, make_targets(captured, ("top",))))).backward()
    assert all(p.grad is not None for p in aligner.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in policy.backbone_parameters() if "vision" in n)
