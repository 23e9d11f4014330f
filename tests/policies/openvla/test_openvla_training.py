"""OpenVLA and OFT under the loop; methods on them are in tests/methods/test_matrix.py."""

import fake
import pytest

from burnish.policies import load_policy
from burnish.train.loop import train

LORA = ["--train.peft.method=lora", "--train.peft.rank=2"]


def options(root, policy, output, *more):
    return fake.recipe(
        root, output, f"--policy.path={policy}", "--train.steps=2", "--train.save_every=2", "--train.batch_size=2",
        "--train.log_every=1", "--train.lr=1e-3", *more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["openvla", "openvla_oft"])
def test_lora_trains_and_exports_a_published_folder(dataset, request, tmp_path, kind):
    """Adapters reach every linear layer of the vision towers and the language model, as in the released recipe."""
    base = request.getfixturevalue(f"tiny_{kind}")
    linear = "--train.peft.target_modules=policy\\.(vision_backbone|projector|language_model)\\..*"
    result = train(options(dataset, base, tmp_path / "run", *LORA, linear), progress=False)
    before, after = load_policy(base).policy.state_dict(), load_policy(result.policy)
    changed = {name for name, tensor in after.policy.state_dict().items()
               if tensor.shape == before[name].shape and not tensor.equal(before[name])}  # fmt: skip
    for part in (
        "featurizer.blocks.0.attn.qkv",
        "fused_featurizer.blocks.0.mlp.fc1",
        "projector.fc3",
        "q_proj",
        "down_proj",
    ):
        assert any(part in name for name in changed), part
    assert not any(name.endswith("norm.weight") for name in changed)
    assert after.cameras == ("front",) and after.action_dim == 3 and after.name == kind
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
