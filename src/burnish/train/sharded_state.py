"""Sharded weights on disk: checkpoints by torch.distributed.checkpoint, and whole policies without whole memory."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError, one_line
from burnish.core.files import disk_errors
from burnish.methods.gradients import sharded, whole
from burnish.policies.tensors import Streamed
from burnish.train.optim import adapter_layers

State = dict[str, dict[str, Tensor]]
"""Parts of a training state, see train.checkpoint, by name."""


def write(folder: Path, state: State) -> None:
    """Write a file of this rank's rows; what is whole on every rank is written by one. All ranks call this."""
    from torch.distributed import checkpoint

    # In safetensors: the other form of the library is pickled.
    storage = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with disk_errors(folder):
        checkpoint.save(_flat(state), storage_writer=storage)


def read(folder: Path, state: State, no_dist: bool) -> None:
    """Fill the tensors of `state`, sharded over any number of ranks or whole, with what `write` wrote."""
    from safetensors import SafetensorError
    from torch.distributed import checkpoint

    flat, remedy = _flat(state), f"rm -r '{folder.parents[1]}'"
    try:
        storage = checkpoint.HuggingFaceStorageReader(str(folder))
        found = storage.read_metadata().state_dict_metadata
        _check(folder, flat, found)
        with warnings.catch_warnings():  # that one process reads is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            checkpoint.load(flat, storage_reader=storage, no_dist=no_dist)
    except (SafetensorError, OSError, KeyError, ValueError, checkpoint.CheckpointException) as error:
        raise BurnishError(f"{folder} is unreadable ({one_line(error)})", "a whole checkpoint", remedy) from error


def _flat(state: State) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor.detach() for part, tensors in state.items() for name, tensor in tensors.items()}


def _check(folder: Path, wanted: dict[str, Tensor], found: dict) -> None:
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    for what, names in (("lacks", missing), ("has the extra tensor", extra)):
        if names:
            raise BurnishError(f"{folder} {what} '{min(names)}' ({len(names)} in all)", "the tensors of this run")
    for name, tensor in wanted.items():
        shape, held = tuple(found[name].size), sum(prod(chunk.sizes) for chunk in found[name].chunks)
        if shape != tuple(tensor.shape) or held != prod(shape):
            raise BurnishError(f"{folder}: '{name}' has shape {shape} and {held} numbers", f"{tuple(tensor.shape)}",
                               f"rm -r '{folder.parents[1]}'")  # fmt: skip


class Whole(Streamed):
    """The state of a sharded module by its ordinary names, adapters merged: gathered one tensor at a time.

    All ranks take part in each: one asks for everything in `order`, and the others `follow`.
    """

    def __init__(self, module: nn.Module):
        layers = adapter_layers(module)
        state, about, seen = module.state_dict(keep_vars=True), {}, set()
        self._layers = {f"{name}.weight": layer for name, layer in layers.items()}
        self._sources: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if not any(name.startswith(f"{layer}.") and ".base_layer." not in name for layer in layers):
                self._sources[name.replace(".base_layer.", ".")] = tensor
        for name in sorted(self._sources):
            if id(self._sources[name]) not in seen:  # tied weights have one name
                seen.add(id(self._sources[name]))
                about[name] = self._sources[name]
        super().__init__(about, self._gather)

    def follow(self) -> None:
        """Take part in what another rank gathers."""
        for name in self.order:
            self._gather(name)

    @torch.no_grad()
    def _gather(self, name: str) -> Tensor:
        layer = self._layers.get(name)
        if layer is None:
            return whole(self._sources[name]).cpu()
        with _whole_parameters(layer):
            layer.merge()
            layer.merged_adapters.clear()
            return layer.get_base_layer().weight.detach().cpu()


@contextmanager
def _whole_parameters(module: nn.Module) -> Iterator[None]:
    """Inside, the sharded parameters of one module are whole copies."""
    kept = [(part, name, p) for part in module.modules() for name, p in part._parameters.items() if p is not None]
    for part, name, parameter in kept:
        if sharded(parameter):
            part._parameters[name] = nn.Parameter(whole(parameter), requires_grad=False)
    try:
        yield
    finally:
        for part, name, parameter in kept:
            part._parameters[name] = parameter
