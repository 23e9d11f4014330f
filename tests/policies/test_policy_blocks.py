"""What sharding and checkpointing wrap: parts that hold most of the weights, each called as a module."""

import pytest
import torch

from burnish.policies import load_policy
from workshop.tiny import make_tiny


@pytest.fixture(params=["smolvla", "pi0", "pi05", "pi0_fast", "burnish_discrete", "act", "openvla"])
def policy(request, tmp_path):
    if request.param in ("burnish_discrete", "act"):
        return load_policy(make_tiny(request.param, tmp_path / "p", cameras=("top", "wrist")))
    return load_policy(request.getfixturevalue(f"tiny_{request.param}"))


def test_every_block_is_called_with_its_hooks(policy, batch):
    blocks, called = policy.blocks(), set()
    assert len(blocks) == len(set(blocks))
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not inside & {id(block) for block in blocks}, "one block lies inside another"
    policy.train()  # ACT's encoder of actions works in training alone
    handles = [block.register_forward_pre_hook(lambda module, _: called.add(module)) for block in blocks]
    policy.loss(batch, policy.draw(3, torch.Generator().manual_seed(0))).total.backward()
    for handle in handles:
        handle.remove()
    assert called == set(blocks)


def test_blocks_hold_most_of_what_layers_hold(policy):
    names = {id(p): name for name, p in policy.named_parameters()}
    held = {id(p) for block in policy.blocks() for p in block.parameters()}
    left = [name for at, name in names.items() if at not in held and ".layers." in name and "norm" not in name]
    assert left == [], "a matrix of a layer is in no block"
