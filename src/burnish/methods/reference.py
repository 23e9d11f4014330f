"""The reference's scores: computed once and kept on disk, or by the policy itself with its adapters switched off.

Either way policy and reference never sit in memory twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.files import new_file
from burnish.core.options import number
from burnish.core.reading import search
from burnish.policies.base import Policy

_NO_MATTER = (
    "device", "decoder", "n_action_steps", "optimizer", "scheduler", "pretrained_path", "push", "repo", "tags",
    "license", "private", "vlm_model_name", "num_steps", "num_inference_steps", "compile",
)  # fmt: skip
"""Beginnings of config fields that no score depends on."""


@contextmanager
def without_adapters(policy: nn.Module) -> Iterator[None]:
    """Inside, peft's layers are their base layers, bit for bit; no weight moves."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in policy.modules() if isinstance(m, BaseTunerLayer)]
    # Not layer.enable_adapters(): that also sets requires_grad, and would thaw a magnitude that is to stay frozen.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def without_dropout(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, the given dropout modules (see `dropouts`) do nothing: policy and reference must be one function."""
    before = [m.training for m in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def dropouts(policy: nn.Module) -> list[nn.Module]:
    """All modules inside `policy` that drop something: dropout modules, and attention with a rate of its own."""
    kinds = (nn.modules.dropout._DropoutNd,)

    def drops(module: nn.Module) -> bool:
        return any("dropout" in name and number(rate) and rate > 0 for name, rate in vars(module).items())

    return [m for m in policy.modules() if isinstance(m, kinds) or drops(m)]


def settings(policy: Policy) -> str:
    """A policy's config as far as scores may depend on it, in words."""
    return str({k: v for k, v in sorted(policy.settings().items()) if not k.startswith(("_", *_NO_MATTER))})


def check_adapters(policy: nn.Module) -> None:
    """Raise BurnishError unless adapters, and nothing else, are trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = {
        id(p)
        for m in policy.modules()
        if isinstance(m, BaseTunerLayer)
        for name, p in m.named_parameters()
        if not name.startswith("base_layer.")
    }
    if not inside:
        raise BurnishError("reference: adapter_off, but the policy has no adapters", "train.peft.method lora or dora",
                           "reference: cached")  # fmt: skip
    other = [n for n, p in policy.named_parameters() if p.requires_grad and id(p) not in inside]
    if other:
        raise BurnishError(
            f"reference: adapter_off, but {len(other)} parameters outside the adapters are trained, such as {other[0]}",
            "adapters alone", "reference: cached",
        )  # fmt: skip


def train_around_adapters(recipe: RecipeConfig, policy: Policy) -> None:
    """Let the action expert, new to the task, learn in full where adapters of the backbone have frozen everything else.

    A recipe that adapts what lies outside of the backbone, or says what is trained, stays as it is.
    """
    inside = {name for name, _ in policy.backbone_parameters()}
    adapted = [name for name, _ in policy.named_parameters() if ".lora_" in name and name not in inside]
    if adapted or recipe.train.train_only:
        return
    for name, parameter in policy.named_parameters():
        if name not in inside and not any(search(p, name, "train.freeze") for p in recipe.train.freeze):
            parameter.requires_grad_(True)


def check_precision(policy: nn.Module) -> None:
    """Raise BurnishError when a trained parameter is kept in half precision.

    AdamW at the published rate of 5e-5 moves a bf16 number above 0.02 by less than half its last digit, so it stays
    for ever: a DoRA magnitude would be frozen without a word.
    """
    half = [n for n, p in policy.named_parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if half:
        raise BurnishError(f"{len(half)} trained parameters are in half precision, such as {half[0]}", "float32",
                           "--train.memory.frozen_dtype=float32")  # fmt: skip


def cached(path: Path, about: dict[str, str], compute: Callable[[], Tensor]) -> Tensor:
    """The tensor stored at `path`, or computed now and stored.

    Args:
        about: what the scores depend on (weights, data, draws, chunk); stored beside them.

    Raises:
        BurnishError: the file belongs to something else, or is damaged.
    """
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                found, scores = file.metadata() or {}, file.get_tensor("scores")
        except (SafetensorError, OSError) as error:
            raise BurnishError(f"the reference scores in {path} cannot be read ({error})", fix=f"rm '{path}'") from None
        other = [key for key in about if found.get(key) != about[key]]
        if other:
            raise BurnishError(f"the reference scores in {path} are stale: made for other {', '.join(other)} "
                               f"({found.get(other[0])} there, {about[other[0]]} now)", "the same",
                               f"rm '{path}'")  # fmt: skip
        return scores
    scores = compute()
    with new_file(path) as file:
        save_file({"scores": scores.contiguous()}, file, metadata=about)
    return scores
