"""What a training will take of memory, by part, before anything is loaded."""

import gc
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from burnish.core import renames
from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.options import home
from burnish.core.reading import read_object, read_text
from burnish.core.types import Batch
from burnish.methods.objective import Objective
from burnish.policies.keys import ACTION, CONFIG, STATE, TASK, TOKEN_MASK, TOKENS
from burnish.policies.load import ASSETS, kind_of, resolve
from burnish.policies.wrapper import PolicyWrapper
from burnish.train.optim import prepare, state_bytes
from burnish.train.setup import dataset_features, make_objectives

aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Bytes that are alive, and the most that ever were.

    What depends on values takes the largest shape that it could have: a mask counts as true everywhere.

    Attributes:
        now, peak: bytes; `peak` may be set back to `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        known = _of_values(func, args)
        out = known[0] if known else func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, out)
        return out

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, storage.nbytes())
        return tensor

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Inside, tensors are made without memory, on a pretended CPU, and counted."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        # Statistics beside a policy are real: they are looked at. peft copies them with its config, which cannot be.
        # Seeds are taken from the bits of noise, and there are none.
        stack.enter_context(patch("burnish.policies.lerobot.drawn", lambda noise: nullcontext()))
        stack.enter_context(patch.object(Tensor, "__deepcopy__", lambda tensor, _memo: tensor))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        counted = stack.enter_context(Ledger())
        yield counted


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `module.to` and its like do; torch's own exchanges fake parameters, which nothing else may refer to then."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = function(parameter.data)
    module._buffers |= {name: function(buffer) for name, buffer in module._buffers.items() if buffer is not None}
    return module


def _of_values(func: Any, args: tuple) -> tuple | None:
    """(result,) of an operation whose result depends on values, as if all masks were true; None for any other one."""
    if func is aten._local_scalar_dense.default:
        kind = args[0].dtype
        return (True if kind is torch.bool else 1.0 if kind.is_floating_point else 1,)
    if func is aten.equal.default:
        return (True,)
    if func is aten.nonzero.default:
        return (args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64),)
    if func is aten.masked_select.default:
        return (args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape).numel()),)
    indices = args[1] if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) else ()
    masks = [index for index in indices if index is not None and index.dtype is torch.bool]
    if not masks:
        return None
    if func is not aten.index.Tensor:
        return (args[0] if func is aten.index_put_.default else args[0].clone(),)
    first, mask = next((place, index) for place, index in enumerate(indices) if index is not None)
    shape = args[0].shape
    return (args[0].new_empty((*shape[:first], mask.numel(), *shape[first + mask.ndim :])),)


GB = 1_000_000_000
EFFICIENCY = 0.3
"""Share of the speed of a large matrix product that a training reaches, about."""
CUDA_CONTEXT = 700_000_000
"""What the driver and its libraries take of a card before the first tensor, about."""
CUDA_SLACK = 0.05
"""Share that PyTorch's allocator holds beyond what tensors need, about."""
AHEAD = 4
"""Batches that are prepared ahead of the step, and the one in it."""


@dataclass(frozen=True)
class Cost:
    """The peak of a training.

    Attributes:
        parts: bytes by part. "not at once" is below zero: gradients come into being as activations go.
        trained, parameters: how many numbers are trained, and of how many.
        batch_size: samples in a forward pass.
        assumed: what stands in for files that are not there, in words.
    """

    parts: dict[str, int]
    trained: int
    parameters: int
    batch_size: int
    assumed: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass
class Prediction:
    """A recipe whose training is computed on shapes alone. Made by `predicting`."""

    recipe: RecipeConfig
    gpu: bool
    policy: PolicyWrapper
    objectives: dict[str, Objective]
    counted: Ledger
    assumed: tuple[str, ...]
    _peaks: dict[int, tuple[int, int]] = field(default_factory=dict)

    def cost(self, batch_size: int) -> Cost:
        """With so many samples in a forward pass."""
        recipe, policy = self.recipe, self.policy
        trained = [p for p in policy.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        held = [*policy.parameters(), *policy.buffers()]
        weights = sum(t.numel() * t.element_size() for t in held)
        extra = [objective.cost(recipe, policy) for objective in self.objectives.values()]
        samples = batch_size if recipe.train.imitation_weight > 0 else 0
        samples += round(sum(one.samples for one in extra) * batch_size / recipe.train.batch_size)
        samples += sum(one.fixed for one in extra)
        samples += recipe.language.batch_size if recipe.language.weight > 0 else 0
        graph, most = self._step(max(1, samples))
        step = 0 if self.gpu or recipe.train.memory.optimizer == "adamw" else 6 * 4 * max(p.numel() for p in trained)
        parts = {
            "weights": weights,
            "optimiser": state_bytes(trained, recipe.train),
            "average": gradients if recipe.train.ema_decay > 0 else 0,
            "method": sum(one.kept for one in extra),
            "gradients": gradients,
            "activations": graph,
            "not at once": max(most, gradients + step) - gradients - graph,
            "batches": AHEAD * sum(t.nbytes for t in empty_batch(policy, batch_size).values() if torch.is_tensor(t)),
        }
        parts |= self._around(sum(parts.values()), sum(4 * p.numel() for p in policy.parameters()))
        return Cost({name: size for name, size in parts.items() if size}, sum(p.numel() for p in trained),
                    sum(p.numel() for p in policy.parameters()), batch_size, self.assumed)  # fmt: skip

    def work(self, batch_size: int) -> float:
        """Floating-point operations of a forward and backward pass over so many samples."""
        from torch.utils.flop_counter import FlopCounterMode

        self._peaks.pop(batch_size, None)
        with FlopCounterMode(display=False) as counter:
            self._step(batch_size)
        return float(counter.get_total_flops())

    def _around(self, step: int, whole: int) -> dict[str, int]:
        """What is there beside the tensors of a step."""
        if self.gpu:
            slack = round(CUDA_SLACK * step)
            return {"CUDA context": CUDA_CONTEXT, "allocator": slack, "loading": max(0, whole - step - slack)}
        return {"process": psutil.Process().memory_info().rss, "loading": max(0, 2 * whole - step)}

    def _step(self, samples: int) -> tuple[int, int]:
        """Bytes that a loss of so many samples leaves to its backward pass; and the most until its gradients are."""
        if samples not in self._peaks:
            policy, counted = self.policy, self.counted
            batch, draws = empty_batch(policy, samples), policy.draw(samples, torch.Generator().manual_seed(0))
            policy.zero_grad(set_to_none=True)
            gc.collect()
            before = counted.peak = counted.now
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.train.precision != "no"):
                total = policy.loss(batch, draws).total
            graph = counted.now - before
            total.backward()
            self._peaks[samples] = graph, counted.peak - before
            policy.zero_grad(set_to_none=True)
        return self._peaks[samples]


@contextmanager
def predicting(recipe: RecipeConfig, gpu: bool = False) -> Iterator[Prediction]:
    """The training of a recipe on shapes alone; nothing is loaded, and nothing as large as a policy is made.

    Args:
        recipe: see core.config. Where policy.path is no folder yet, the published sizes of policy.type stand in.
        gpu: on a GPU, not in the memory of this machine.
    """
    recipe = deepcopy(recipe)
    logging.getLogger("burnish").info("predicting what a step takes, on shapes alone")
    features, assumed = dataset_features(recipe)
    objectives = make_objectives(recipe)
    with ledger() as counted:
        policy = empty_policy(recipe.policy.path, recipe.policy.type, recipe.policy.overrides, features)
        prepare(policy, recipe, objectives.values())
        policy.train()
        yield Prediction(recipe, gpu, policy, objectives, counted, assumed)


def predict(recipe: RecipeConfig, gpu: bool = False) -> Cost:
    """The peak of a training as the recipe stands, on a GPU where `gpu` is true; errors as of `predicting`."""
    with predicting(recipe, gpu) as prediction:
        return prediction.cost(recipe.train.batch_size)


def memory(gpu: float = 0.0) -> tuple[float, bool]:
    """Bytes that a training may take, and whether on a card: one of `gpu` GB, the first one here, or this machine's."""
    if gpu or torch.cuda.is_available():
        return gpu * GB or float(torch.cuda.get_device_properties(0).total_memory), True
    lines = read_text(Path("/proc/meminfo")).splitlines() if Path("/proc/meminfo").is_file() else []
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0.0)
    return free or 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), False


def seconds(operations: float, gpu: bool) -> float:
    """How long so many floating-point operations of a training take here, roughly: by a timed matrix product."""
    device, size = ("cuda", 4096) if gpu else ("cpu", 768)
    one = torch.ones(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        float((one @ one)[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - begin)
    return operations * min(times) / (2 * size**3) / EFFICIENCY


def pieces(recipe: RecipeConfig, limit: float, gpu: bool) -> int | None:
    """In how many equal pieces a batch is to be taken for a step to fit into `limit` bytes; None: no number will do."""
    size = recipe.train.batch_size
    with predicting(recipe, gpu) as prediction:
        for count in (count for count in range(1, size + 1) if size % count == 0):
            if prediction.cost(size // count).peak <= limit:
                return count
    return None


def in_pieces(recipe: RecipeConfig, count: int) -> RecipeConfig:
    """The recipe with as many frames in a step, `count` times as many forward passes, and smaller ones."""
    recipe = deepcopy(recipe)
    recipe.train.batch_size //= count
    recipe.train.grad_accumulation *= count
    return recipe


def fitted(recipe: RecipeConfig) -> RecipeConfig:
    """The recipe with its batches in as many pieces as `train.memory.fit_gb` asks for; itself where that is 0.

    The count follows from the recipe alone, so that a run goes on as it began.

    Raises:
        BurnishError: not even single samples fit.
    """
    limit = recipe.train.memory.fit_gb
    if limit == 0:
        return recipe
    count = pieces(recipe, limit * GB, torch.cuda.is_available())
    if count is None:
        raise BurnishError(f"train.memory.fit_gb is {limit:g}, and even a step of single samples is predicted to take "
                           "more", "a step that takes less", "burnish method cost --help")  # fmt: skip
    return recipe if count == 1 else in_pieces(recipe, count)


def advise(recipe: RecipeConfig, limit: float, gpu: bool) -> Iterator[tuple[list[str], Cost]]:
    """What to switch on, one thing after the other, and the peak then, until a step fits into `limit` bytes or the end.

    Yields:
        Overrides as `burnish train` takes them, and the cost with all of them.
    """
    recipe, said = deepcopy(recipe), []
    train, found = recipe.train, predict(recipe, gpu)
    for name, owner, key, value in (
        ("train.precision", train, "precision", "bf16"),
        ("train.memory.checkpointing", train.memory, "checkpointing", True),
        ("train.memory.frozen_dtype", train.memory, "frozen_dtype", "bf16"),
        ("train.memory.optimizer", train.memory, "optimizer", "adamw8bit"),
    ):
        if getattr(owner, key) == value or (key == "frozen_dtype" and found.trained == found.parameters):
            continue
        setattr(owner, key, value)
        said.append(f"--{name}={str(value).lower()}")
        found = predict(recipe, gpu)
        yield list(said), found
        if found.peak <= limit:
            return
    count = pieces(recipe, limit, gpu) or train.batch_size
    if count > 1:
        recipe = in_pieces(recipe, count)
        said += [f"--train.batch_size={recipe.train.batch_size}",
                 f"--train.grad_accumulation={recipe.train.grad_accumulation}"]  # fmt: skip
        yield list(said), (found := predict(recipe, gpu))
    if found.peak > limit and train.peft.method == "none":
        recipe.train.peft.method = "lora"
        yield [*said, "--train.peft.method=lora"], predict(recipe, gpu)


WORDS = 48
"""Tokens of an instruction where the config of a policy names no limit."""


def empty_policy(path: str, kind: str, overrides: Mapping[str, Any], features: dict[str, Any] | None) -> PolicyWrapper:
    """The policy that a recipe trains. Call it where tensors are fake (see burnish.train.cost).

    Args:
        path: its folder, of which config.json and the files of its VLM are read. Where there is none, LeRobot's own
            sizes of `kind` stand in.
        features: LeRobot PolicyFeatures by key; None keeps those of the folder.
    """
    changes, found = dict(overrides), Path(home(path))
    there = bool(path) and ((found / CONFIG).is_file() or (len(found.parts) == 1 and (ASSETS / found).is_dir()))
    folder = resolve(path) if there else None
    raw = {"type": kind} if folder is None else read_object(folder / CONFIG, folder)
    kind = raw.get("type") or raw.get("model_type")
    old = renames.POLICY_FIELDS.get(kind, {})
    return kind_of(kind).empty(folder, renames.rename(raw, old), renames.rename(changes, old), features, Tokens)


class Tokens:
    """Stands in for a preprocessor: as many text tokens as the policy takes at most, values as they come."""

    def __init__(self, config: Any):
        from lerobot.processor import TokenizerProcessorStep

        step = TokenizerProcessorStep.__new__(TokenizerProcessorStep)
        self.length = getattr(config, "tokenizer_max_length", WORDS)
        step.input_tokenizer = self.tokenizer = _Tokenizer(self.length)
        self.steps = [step]

    def __call__(self, batch: Batch) -> Batch:
        shape = len(batch[STATE]), self.length
        return {**batch, TOKENS: torch.zeros(shape, dtype=torch.long), TOKEN_MASK: torch.ones(shape, dtype=torch.bool)}


class _Tokenizer:
    """Stands in for a tokenizer: every text has as many tokens, all of them the first."""

    bos_token = eos_token = ""
    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, length: int):
        self.length = length

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * self.length for _ in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def convert_tokens_to_ids(self, _token: str) -> int:
        return 0


def empty_batch(policy: PolicyWrapper, size: int) -> Batch:
    """A training batch of `size` samples as the policy's loss takes it."""
    moments = len(policy.window.observations)
    lead = (size, moments) if moments > 1 else (size,)
    shapes = policy.config.image_features
    return {
        **{key: torch.zeros(*lead, *shapes[key].shape) for key in policy.camera_keys},
        STATE: torch.zeros(*lead, policy.state_dim), TASK: ["pick it up"] * size,
        ACTION: torch.zeros(size, policy.chunk_size, policy.action_dim),
        "action_is_pad": torch.zeros(size, policy.chunk_size, dtype=torch.bool),
    }  # fmt: skip
