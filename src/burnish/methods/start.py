"""What a run starts from, to compare with while it is trained, without a second policy in memory."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from burnish.core.files import disk_errors, make_folder
from burnish.methods.gradients import parts
from burnish.methods.reference import without_adapters
from burnish.policies.base import Policy


class Start:
    """Parameters as they are now.

    Args:
        folder: keep them there, in a file without a name that goes with the process, and read them when they are asked
            for. None keeps them in memory, in bfloat16 where that loses nothing, as it does for most published weights.
    """

    def __init__(self, parameters: Mapping[str, Tensor], folder: Path | None = None):
        self._like = {name: (p.shape, p.dtype, p.device) for name, p in parameters.items()}
        self._kept = {} if folder is not None else _copies(parameters)
        if folder is not None:
            make_folder(folder)
            with disk_errors(folder):
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  open as long as this lives
                for parameter in parameters.values():
                    self._file.write(_bytes(parameter.detach().cpu().contiguous()).numpy())
                self._file.flush()

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, in the type and on the device of the parameters."""
        if self._kept:
            return {name: self._kept[name].to(dtype, copy=True) for name, (_, dtype, _) in self._like.items()}
        self._file.seek(0)
        return {name: self._read(*like) for name, like in self._like.items()}

    def away(self, name: str, parameter: Tensor) -> Iterator[Tensor]:
        """Parts (see gradients.parts) of `parameter` minus its start, where that is in memory."""
        for now, start in zip(parts([parameter.detach()]), parts([self._kept[name]]), strict=True):
            yield now - start

    def kept(self, name: str) -> Tensor:
        """The start of a parameter that is in memory, in a type in which it is exact."""
        return self._kept[name]

    def _read(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        found = torch.empty(shape, dtype=dtype)
        self._file.readinto(_bytes(found).numpy())
        return found.to(device)


class Frozen(nn.Module):
    """A policy as it is now, whatever is trained later.

    Where adapters alone are trained, they are switched off for a call; otherwise the trained weights of the backbone
    are put back for it. Everything else is shared.

    Args:
        trained: its trained backbone parameters by name; sharded, this rank's rows of them.
        holding: how sharded parameters hold other values, see Run.holding; None where they are whole.
    """

    def __init__(
        self, policy: Policy, trained: Mapping[str, Tensor], folder: Path | None,
        holding: Callable[[Mapping[str, Tensor]], AbstractContextManager[Any]] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.policy, self._holding = policy, holding
        self._start = None if all(".lora_" in name for name in trained) else Start(trained, folder)

    @torch.no_grad()
    def call[T](self, ask: Callable[..., T], *args: Any) -> T:
        """`ask(policy, *args)`, in eval mode and without gradients."""
        with evaluating(self.policy):
            if self._start is None:
                with without_adapters(self.policy):
                    return ask(self.policy, *args)
            if self._holding is not None:
                with self._holding(self._start.tensors()):
                    return ask(self.policy, *args)
            weights = {f"policy.{name}": tensor for name, tensor in self._start.tensors().items()}
            return functional_call(self, weights, (ask, *args))

    def forward(self, ask: Callable[..., Any], *args: Any) -> Any:
        return ask(self.policy, *args)


@contextmanager
def evaluating(policy: Policy) -> Iterator[None]:
    """Inside, the policy is in eval mode; afterwards in the mode that it was in."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


@torch.no_grad()
def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, in bfloat16 where that is exact; all of a type in one tensor, or the heap would be left in pieces."""
    kinds = {}
    for name, parameter in parameters.items():
        exact = torch.equal(parameter.to(torch.bfloat16).to(parameter.dtype), parameter)
        kinds[name] = torch.bfloat16 if exact else parameter.dtype, parameter.device
    sizes = dict.fromkeys(kinds.values(), 0)
    for name, parameter in parameters.items():
        sizes[kinds[name]] += parameter.numel()
    rooms = {kind: torch.empty(size, dtype=kind[0], device=kind[1]) for kind, size in sizes.items()}
    used, kept = dict.fromkeys(rooms, 0), {}
    for name, parameter in parameters.items():
        kind, size = kinds[name], parameter.numel()
        kept[name] = rooms[kind][used[kind] : used[kind] + size].view(parameter.shape).copy_(parameter)
        used[kind] += size
    return kept


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
