"""How the policy of a run is kept: what is trained in float32, the rest as small as the recipe says."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from burnish.core.config import RecipeConfig, TrainConfig
from burnish.core.errors import BurnishError
from burnish.methods.objective import Objective
from burnish.policies.base import Policy, require
from burnish.train.optim import add_adapters, choose_trained


def prepare(policy: Policy, recipe: RecipeConfig, objectives: Iterable[Objective]) -> None:
    """Delays, adapters, which parameters are trained, master weights in float32, and all else as a recipe asks."""
    train = recipe.train
    policy.rtc_training_max_delay = most = train.rtc_training_max_delay
    if most:
        require(policy, "steering", "train.rtc_training_max_delay")
    if most and most >= policy.chunk_size:
        raise BurnishError(f"train.rtc_training_max_delay {most} with chunks of {policy.chunk_size} steps",
                           "a number below that")  # fmt: skip
    policy.float()  # precision below that is autocast's
    add_adapters(policy, train.peft, train.seed, policy.whole_parts)
    choose_trained(policy, train.freeze, train.train_only)
    for objective in objectives:
        objective.choose_trained(recipe, policy)
        if objective.reads_moments and train.memory.optimizer != "adamw":
            raise BurnishError(f"train.memory.optimizer is adamw8bit with {type(objective).__name__}, which "
                               "reads the moments", "adamw", "--train.memory.optimizer=adamw")  # fmt: skip
    if train.memory.frozen_dtype == "bf16":
        halve_frozen(policy, train)
    if train.memory.checkpointing:
        policy.recompute()


def halve_frozen(policy: nn.Module, train: TrainConfig) -> None:
    """Keep frozen matrices in bfloat16. Vectors (norms, biases) stay as they are: layer norms take one type alone.

    Raises:
        BurnishError: without autocast to bfloat16, where a matrix product takes one type alone too; or sharded.
    """
    if train.precision != "bf16":
        raise BurnishError(f"train.memory.frozen_dtype is bf16 with train.precision {train.precision}",
                           "bf16 for both", "--train.precision=bf16")  # fmt: skip
    if train.shard:
        raise BurnishError("train.memory.frozen_dtype bf16 with train.shard, which wants one type", "float32",
                           "--train.memory.frozen_dtype=float32")  # fmt: skip
    for parameter in policy.parameters():
        if not parameter.requires_grad and parameter.ndim >= 2:
            parameter.data = parameter.data.to(torch.bfloat16)


def mixed(train: TrainConfig, accelerator: Any) -> AbstractContextManager:
    """Around every call of a policy outside of the step: autocast, where its weights are of two types."""
    return accelerator.autocast() if train.memory.frozen_dtype == "bf16" else nullcontext()


def state_bytes(trained: Iterable[nn.Parameter], train: TrainConfig) -> int:
    """Bytes of the optimiser's state: two moments of every number, in float32 or in 8 bits (see optim.adamw)."""
    total = 0
    for p in trained:
        small = p.numel() < 4096 or p.numel() % 256
        plain = train.memory.optimizer == "adamw" or small
        total += 8 * p.numel() if plain else 2 * (p.numel() + p.numel() // 64 + 1024)
    return total
