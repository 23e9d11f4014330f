"""The loop on a real (tiny) SmolVLA with everything switched on."""

import fake
import pytest
import torch

from burnish.train import loop
from burnish.train.loop import train


class Stop(Exception):
    pass


def options(root, questions, tiny, output, *more):
    return fake.recipe(
        root, output, f"--policy.path={tiny}", "--train.steps=2", "--train.save_every=1", "--train.batch_size=3",
        "--train.log_every=1", "--train.lr=1e-3", f"--language.root={questions}", "--language.weight=0.1",
        "--language.batch_size=3", "--train.ema_decay=0.9", *more,
    )  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--train.peft.method=lora", "--train.peft.rank=2"]], ids=["full", "lora"])
def test_train_resume_and_load_the_export(dataset, questions, tiny_smolvla, tmp_path, monkeypatch, more):
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from burnish.policies import load_policy

    result = train(options(dataset, questions, tiny_smolvla, tmp_path / "whole", *more), progress=False)
    with monkeypatch.context() as patch:
        original = loop.train_step

        def dying(run, *args, **named):
            if run.step == 1:
                raise Stop
            return original(run, *args, **named)

        patch.setattr(loop, "train_step", dying)
        with pytest.raises(Stop):
            train(options(dataset, questions, tiny_smolvla, tmp_path / "cut", *more), progress=False)
    train(options(dataset, questions, tiny_smolvla, tmp_path / "cut", *more), progress=False)
    fake.assert_same_weights(result.policy, tmp_path / "cut" / "policy")
    assert fake.figures(result.metrics) == fake.figures(tmp_path / "cut" / "metrics.jsonl")

    ours, theirs = load_policy(result.policy), SmolVLAPolicy.from_pretrained(result.policy)
    assert ours.action_dim == 3 and ours.cameras == ("front",)
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.policy.state_dict().items())
    checkpoint = load_policy(tmp_path / "whole/checkpoints/last")
    assert all(torch.equal(v, state[n]) for n, v in checkpoint.policy.state_dict().items())
    assert any("loss_language" in row for row in fake.figures(result.metrics))
