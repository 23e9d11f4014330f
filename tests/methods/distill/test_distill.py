"""Distillation: divergences against closed forms, the teacher really is the teacher, and the loop trains with it."""

import math
from types import SimpleNamespace

import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.seeding import generator
from burnish.methods.distill.objective import Distill, divergence, inverse_share
from burnish.policies import load_policy
from burnish.train.optim import add_adapters
from workshop.tiny import make_tiny


def test_divergence_in_both_directions():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert divergence(p.log() + 3, q.log(), "forward").item() == pytest.approx(forward, abs=1e-6)
    assert divergence(p.log() + 3, q.log(), "reverse").item() == pytest.approx(reverse, abs=1e-6)
    noise = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0))
    for direction in ("forward", "reverse"):
        assert (divergence(noise, noise * 0.5, direction) >= 0).all()
        assert divergence(noise, noise, direction).abs().max() < 1e-6


def test_inverse_share_counts_within_blocks():
    hidden = torch.tensor([[True, False, False, True, True, True]])
    assert inverse_share(hidden, 3).tolist() == [[3, 3, 3, 1, 1, 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny("burnish_discrete", tmp_path_factory.mktemp("distill") / "p", cameras=("top",))


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(7)
    return {
        "observation.images.top": torch.rand(4, 3, 32, 32, generator=g),
        "observation.state": torch.randn(4, 7, generator=g),
        "action": torch.randn(4, 8, 7, generator=g),
        "task": ["pick up the red cube"] * 4,
    }


def started(folder, adapters=True, block=14, **options):
    """A run as objectives see it, with a student of `block` tokens."""
    policy = load_policy(folder, overrides={"block_size": block, "noise": "pipeline"})
    if adapters:
        peft = SimpleNamespace(method="lora", rank=4, alpha=8, target_modules=r".*text_model.*\.(q|k|v|o)_proj")
        add_adapters(policy, peft)
    recipe = SimpleNamespace(policy=SimpleNamespace(path=str(folder)))
    run = SimpleNamespace(policy=policy, generator=generator(0), recipe=recipe)
    method = Distill(**options)
    method.setup(run)
    return run, method


def terms(run, method, batch):
    with method.watch(run):
        out = run.policy.loss(batch, run.policy.draw(4, run.generator))
    return method.loss(run, batch, out)["distill"]


@pytest.mark.parametrize("teacher", ["adapters_off", "copy"])
def test_equal_attention_is_no_loss_and_blocks_are_one(folder, batch, teacher):
    run, method = started(folder, teacher=teacher)
    method.teacher_block = 14
    assert terms(run, method, batch).abs() < 1e-6, "the same weights, the same attention"
    run, method = started(folder, teacher=teacher)
    loss = terms(run, method, batch)
    assert loss > 1e-4 and 0 <= method.metrics()["distill_agreement"] <= 1
    loss.backward()
    moved = [n for n, p in run.policy.named_parameters() if p.grad is not None and p.grad.any()]
    assert moved and all("lora_" in name for name in moved), "gradients reach the adapters alone"


def test_the_teacher_stays_what_it_was(folder, batch):
    """After a step the teacher without adapters still equals the frozen copy of the start."""
    run, method = started(folder)
    kept, copied = started(folder, adapters=False, teacher="copy")
    optimizer = torch.optim.SGD([p for p in run.policy.parameters() if p.requires_grad], lr=5.0)
    for _ in range(2):
        terms(run, method, batch).backward()
        optimizer.step()
    with run.policy.watch_tokens() as seen:
        run.policy.loss(batch, run.policy.draw(4, generator(1)))
    forward = seen[0]
    without = method._ask_teacher(run.policy, batch, forward)
    torch.testing.assert_close(without, copied._ask_teacher(kept.policy, batch, forward))
    assert not without.allclose(run.policy.token_logits(batch, forward, 56), atol=1e-4)
    assert not without.requires_grad


def test_a_few_steps_bring_the_student_nearer(folder, batch):
    run, method = started(folder)
    optimizer = torch.optim.Adam([p for p in run.policy.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(20):
        run.generator.manual_seed(3)
        loss = terms(run, method, batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_without_imitation_it_runs_its_own_forward(folder, batch):
    run, method = started(folder, weights="inverse_share", direction="reverse", weight=2.0)
    assert method.loss(run, batch, None)["distill"] > 0


def test_what_cannot_be_distilled_is_refused(folder, tiny_smolvla):
    with pytest.raises(BurnishError, match="sideways"):
        Distill(direction="sideways")
    for options in ({"weight": -1.0}, {"weight": math.nan}):
        with pytest.raises(BurnishError, match=f"distill: {next(iter(options))} is"):
            Distill(**options)
    with pytest.raises(BurnishError, match="sees all 56 tokens at once"):
        started(folder, block=0)
    with pytest.raises(BurnishError, match="adapters"):
        started(folder, adapters=False)
    with pytest.raises(BurnishError, match="masked tokens"):
        Distill(teacher="copy").setup(SimpleNamespace(policy=load_policy(tiny_smolvla)))


def test_a_teacher_with_an_open_prompt_keeps_it(tmp_path, batch):
    folder = make_tiny("burnish_discrete", tmp_path / "p", cameras=("top",), overrides={"prompt_sees_actions": True})
    policy = load_policy(folder, overrides={"block_size": 14, "noise": "pipeline", "prompt_sees_actions": False})
    recipe = SimpleNamespace(policy=SimpleNamespace(path=str(folder)))
    run = SimpleNamespace(policy=policy, generator=generator(0), recipe=recipe)
    method = Distill(teacher="copy")
    method.setup(run)
    with policy.watch_tokens() as seen:
        policy.loss(batch, policy.draw(4, generator(1)))
    parent = load_policy(folder)
    torch.testing.assert_close(method._ask_teacher(policy, batch, seen[0]), parent.token_logits(batch, seen[0]))
    assert not torch.allclose(policy.token_logits(batch, seen[0], 56), parent.token_logits(batch, seen[0]), atol=1e-4)


def test_the_loop_distils_and_exports_merged_weights(tmp_path):
    import importlib.util
    from pathlib import Path

    from burnish.train.loop import train

    spec = importlib.util.spec_from_file_location("distill_fake", Path(__file__).parents[2] / "train" / "fake.py")
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    base = make_tiny("burnish_discrete", tmp_path / "base", cameras=("front",), state_dim=4, action_dim=3,
                     overrides={"chunk_size": 4, "n_action_steps": 4})  # fmt: skip
    recipe = fake.recipe(
        fake.make_dataset(tmp_path / "data"), tmp_path / "run", f"--policy.path={base}", "--train.steps=3",
        "--policy.overrides={block_size: 3, noise: pipeline}", "--train.batch_size=3", "--train.log_every=1",
        "--train.imitation_weight=0", "--train.peft.method=lora", "--train.peft.rank=2",
        "--objectives=[{name: distill}]",
    )  # fmt: skip
    result = train(recipe, progress=False)
    assert result.final["loss_distill"] > 0 and "distill_agreement" in result.final
    student = load_policy(result.policy)
    assert student.config.block_size == 3 and student.config.decoder_name == "d2f"


def test_a_copied_teacher_shares_what_is_not_trained(folder):
    run, method = started(folder, teacher="copy")
    mine, copied = (dict(policy.named_parameters()) for policy in (run.policy, method._copy[0]))
    assert any(p.requires_grad for p in mine.values()) and not any(p.requires_grad for p in copied.values())
    for name, p in mine.items():
        assert (copied[name] is p) == (not p.requires_grad), name
