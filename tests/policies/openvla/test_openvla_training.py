"""OpenVLA and OFT under the loop; methods on them are in tests/methods/test_matrix.py."""

import fake
import pytest

from burnish.policies import load_policy
from burnish.train.loop import train
from workshop.tiny import make_tiny

LORA = ["--train.peft.method=lora", "--train.peft.rank=2"]


def options(root, policy, output, *more):
    return fake.recipe(
        root, output, f"--policy.path={policy}", "--train.steps=2", "--train.save_every=2", "--train.batch_size=2",
        "--train.log_every=1", "--train.lr=1e-3", *more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["openvla", "openvla_oft"])
def test_lora_trains_and_exports_a_published_folder(dataset, request, tmp_path, kind):
    """Adapters reach every linear layer of the vision towers and the language model, as in the released recipe."""
    base = request.getfixturevalue("tiny_openvla")  # of another robot, which OpenVLA's tokens do not mind
    if kind == "openvla_oft":
        base = make_tiny(kind, tmp_path / "base", cameras=("front",), state_dim=4, action_dim=3)
    result = train(options(dataset, base, tmp_path / "run", *LORA), progress=False)
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
    whole = {name for name in before if name.startswith(("action_head.", "proprio_projector."))}
    assert whole <= changed and bool(whole) == (kind == "openvla_oft")  # OFT's own parts are trained themselves
    assert after.cameras == ("front",) and after.action_dim == 3 and after.name == kind
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
