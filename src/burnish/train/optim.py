"""What is trained and how: patterns, adapters, AdamW, the learning-rate curve, the moving average of weights."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from burnish.core.config import PeftConfig, RecipeConfig, TrainConfig
from burnish.core.errors import BurnishError
from burnish.core.reading import fullmatch, search
from burnish.core.seeding import derive_seed, seeded
from burnish.methods.gradients import local
from burnish.methods.objective import Objective
from burnish.policies.base import Policy, require
from burnish.train.sharded import exchange

_ADAPTER = "default"
_BLOCK = 256
"""Numbers that share a scale in 8-bit moments, and the values that 8 bits stand for."""


def choose_trained(policy: nn.Module, freeze: Sequence[str], train_only: Sequence[str]) -> None:
    """Set `requires_grad` by patterns (searched in parameter names); a pattern without a match is an error."""
    parameters = dict(policy.named_parameters())
    _matches("train.train_only", train_only, parameters)
    _matches("train.freeze", freeze, parameters)
    for name, parameter in parameters.items():
        if train_only and not any(search(p, name, "train.train_only") for p in train_only):
            parameter.requires_grad_(False)
        if any(search(p, name, "train.freeze") for p in freeze):
            parameter.requires_grad_(False)


def _matches(field: str, patterns: Sequence[str], names: Iterable[str]) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(search(pattern, name, field) for name in names):
            near = get_close_matches(pattern, names, 1, 0.1) or names[:1]
            raise BurnishError(f"{field}: '{pattern}' matches no parameter", f"names such as '{near[0]}'")


def add_adapters(policy: Policy, config: PeftConfig, seed: int = 0, whole: Sequence[str] = ()) -> None:
    """Put LoRA or DoRA layers into `policy`; everything else is frozen. `method: none` does nothing.

    `target_modules` is searched in full module names; empty means `Policy.adapter_targets`. peft draws the
    start of A from torch's global generator, which is seeded by `seed` for this and put back. Modules named
    in `whole` get no adapters and are trained themselves: heads that a fine-tune begins with nothing.
    """
    if config.method == "none":
        return
    from peft import LoraConfig, inject_adapter_in_model

    pattern, field = config.target_modules or policy.adapter_targets, "train.peft.target_modules"
    linear = [name for name, module in policy.named_modules() if _is_called(module)
              and not name.startswith(tuple(f"{part}." for part in whole))]  # fmt: skip
    targets = [name for name in linear if fullmatch(pattern, name, field)]
    if not targets:
        raise BurnishError(f"{field}: '{pattern}' matches no linear layer", f"names such as {linear[-1]}")
    widest = max(max(policy.get_submodule(name).weight.shape) for name in targets)
    if config.rank > widest:
        raise BurnishError(f"train.peft.rank is {config.rank}", f"at most {widest}, the width of the widest layer")
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, use_dora=config.method == "dora",
                      lora_dropout=0.0)  # fmt: skip
    with seeded(derive_seed(seed, "adapters"), next(policy.parameters()).device):
        inject_adapter_in_model(lora, policy, adapter_name=_ADAPTER)
    for part in whole:
        policy.get_submodule(part).requires_grad_(True)
    if lora.use_dora:
        from burnish.train.dora import use_closed_form

        use_closed_form(policy)  # the same numbers, sooner


def _is_called(module: nn.Module) -> bool:
    """Whether it is a linear layer that is called; torch's attention takes the weights of its last one by hand."""
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def adapter_layers(policy: nn.Module) -> dict[str, nn.Module]:
    """peft's layers by module name; empty without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in policy.named_modules() if isinstance(module, BaseTunerLayer)}


@contextmanager
def merged(policy: nn.Module) -> Iterator[None]:
    """Inside, adapters are folded into their layers and the policy has its ordinary modules and names.

    Layers kept in half precision are merged in float32. Afterwards the weights are the very same memory as before.
    """
    layers = adapter_layers(policy)
    originals = {name: layer.get_base_layer().weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            weight = layer.get_base_layer().weight
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            layer.merge()
            _place(policy, name, layer.get_base_layer())
        yield
    finally:
        for name, layer in layers.items():
            layer.get_base_layer().weight.data = originals[name]
            layer.merged_adapters.clear()
            _place(policy, name, layer)


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def adamw(trained: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, fused where the device offers it; weight decay on matrices only, not on biases, norms and scales.

    With `memory.optimizer: adamw8bit` it is torchao's, which keeps the moments of tensors of 4,096 numbers and more in
    8 bits with a float32 scale for each 256 of them (Dettmers et al. 2022, arXiv:2110.02861).
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas)}
    if config.memory.optimizer == "adamw8bit" and config.shard:
        raise BurnishError("train.memory.optimizer adamw8bit with train.shard", "one of them: shards are small already",
                           "--train.memory.optimizer=adamw")  # fmt: skip
    if config.memory.optimizer == "adamw8bit":
        return _adamw8bit()(_groups(trained, config), **options)
    fused = all(p.device.type in ("cuda", "cpu") and p.dtype == torch.float32 for p in trained.values())
    return torch.optim.AdamW(_groups(trained, config), **options, **({"fused": True} if fused else {"foreach": True}))


def _adamw8bit() -> type[torch.optim.Optimizer]:
    """torchao's AdamW8bit that takes a learning rate as a plain number, and needs no compiler on a CPU."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise BurnishError("train.memory.optimizer is adamw8bit, and torchao is not installed", "adamw",
                           "pip install 'burnish[low-memory]'") from None  # fmt: skip

    class Optimizer(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
            on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
            with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
                return super().step(closure)

    return Optimizer


def add_parameters(optimizer: torch.optim.Optimizer, more: dict[str, nn.Parameter], config: TrainConfig) -> None:
    """Let the AdamW of `adamw` train `more` as well."""
    for group in _groups(more, config):
        optimizer.add_param_group(group)


def _groups(trained: dict[str, nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step 0, 1, ...: a linear rise over `warmup_steps`, then a half cosine down to `min_lr_ratio`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    share = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * share


class Average:
    """Exponential moving average of the trained parameters. Early on the decay is smaller: (1 + step) / (10 + step).

    Where parameters are sharded, `live` and `shadow` are this rank's rows.
    """

    def __init__(self, trained: dict[str, nn.Parameter], decay: float):
        self.decay = decay
        self.live = {name: local(p) for name, p in trained.items()}
        self.shadow = {name: tensor.clone() for name, tensor in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (1 is the first)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the policy has the averaged weights."""
        pairs = [(self.live[name], shadow) for name, shadow in self.shadow.items()]
        exchange(pairs)
        try:
            yield
        finally:
            exchange(pairs)


def optimizer_tensors(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state as "<parameter>/<field>" to tensor; parameters without a step yet have none.

    A moment in 8 bits is stored as what it consists of: "<parameter>/<field>.codes" and so on.
    """
    return {
        f"{name}/{field}{part}": tensor.detach()
        for name, parameter in trained.items()
        for field, value in optimizer.state.get(parameter, {}).items()
        for part, tensor in _inside(value).items()
    }


def empty_optimizer_tensors(trained: dict[str, nn.Parameter], keys: Iterable[str]) -> dict[str, Tensor]:
    """Room for the state called `keys`, as `optimizer_tensors` names it, sharded as the parameters are."""
    found = {}
    for key in keys:
        name, _, field = key.rpartition("/")
        if name not in trained:
            raise BurnishError(f"the checkpoint's optimiser has the state of '{name}', which is not trained",
                               "exactly the tensors of this run")  # fmt: skip
        like = trained[name]
        part = field.partition(".")[2]
        if part == "codes":
            found[key] = torch.empty(like.shape, dtype=torch.uint8, device=like.device)
        elif part:
            found[key] = torch.empty(_BLOCK if part == "qmap" else like.numel() // _BLOCK, device=like.device)
        else:
            found[key] = torch.zeros(()) if field == "step" else torch.empty_like(like).detach()
    return found


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`."""
    fused, quantised = optimizer.defaults.get("fused"), {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        parameter = trained[name]
        field, _, part = field.partition(".")
        if part:
            quantised.setdefault((name, field), {})[part] = value.to(parameter.device, copy=True)
            continue
        # AdamW keeps its step count on the CPU unless it is fused.
        device = parameter.device if field != "step" or fused else torch.device("cpu")
        optimizer.state.setdefault(parameter, {})[field] = value.to(device, copy=True)
    for (name, field), parts in quantised.items():
        optimizer.state.setdefault(trained[name], {})[field] = _in_8_bits(name, field, parts, trained[name])


def _inside(value: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a moment in 8 bits consists of, by "." and their name; any other tensor by ""."""
    names = getattr(value, "tensor_attrs", None)
    return {"": value} if names is None else {f".{name}": getattr(value, name) for name in names}


def _in_8_bits(name: str, field: str, parts: dict[str, Tensor], parameter: Tensor) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    blocks = parts["scale"].numel() if parts.keys() == set(OptimState8bit.tensor_attrs) else 0
    if not blocks or parameter.numel() % blocks or parts["qmap"].numel() != _BLOCK:
        raise BurnishError(f"the 8-bit state of '{name}' is damaged", "what `burnish train` wrote",
                           "another --output, or --fresh (train, run) to start over")  # fmt: skip
    return OptimState8bit(*(parts[part] for part in OptimState8bit.tensor_attrs), field == "exp_avg", parameter.dtype)


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
    if not any(p.requires_grad for p in policy.parameters()):
        raise BurnishError("nothing is left to train", "at least one parameter",
                           "--train.freeze='[]'" if train.freeze else "another method")  # fmt: skip
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
