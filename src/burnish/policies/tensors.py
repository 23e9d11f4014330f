"""Weights of a policy folder: one file or shards, finite, and written by ourselves."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish.core.errors import BurnishError, one_line
from burnish.core.reading import inside, read_object, regular_file
from burnish.policies.keys import CONFIG, INDEX, WEIGHTS
from burnish.weights.tensorfile import TensorInfo, make_header

_STORED = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.float64: "F64",
    torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
"""Types as safetensors names and ranks them."""
_OLD = ("normalize_inputs.", "unnormalize_outputs.", "normalize_targets.")
"""Where LeRobot kept statistics among the weights before it had processors."""


_SIZES = {
    False: ("the shapes of config.json", "the config.json that belongs to the weights"),
    True: ("data whose state, actions and views have the policy's own sizes", ""),
}
"""What is said where tensors have other shapes, by whether the sizes are those of new data."""


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names, all inside the folder."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        try:
            return [regular_file(folder / WEIGHTS, folder)]
        except BurnishError as error:
            raise BurnishError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    shards = read_object(folder / INDEX, folder).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise BurnishError(f"{folder / INDEX} has no weight_map", "tensor name to file name")
    return [regular_file(inside(folder, name), folder) for name in sorted(set(shards.values()))]


def size(folder: Path) -> int:
    """Bytes of all safetensors of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name."""
    files = weight_files(folder)
    if files == [folder / WEIGHTS]:
        return read_file(files[0], folder)
    index, state = read_object(folder / INDEX, folder)["weight_map"], {}
    for file in files:
        for name, tensor in read_file(file, folder).items():
            if index.get(name) is None or folder / index[name] != file:
                raise BurnishError(f"{file} holds '{name}', which {INDEX} does not place there", "shards that fit it")
            state[name] = tensor
    lost = sorted(set(index) - set(state))
    if lost:
        raise BurnishError(f"{folder / INDEX} names '{lost[0]}', which is in no shard", "shards that fit their index")
    return state


def read_file(file: Path, folder: Path) -> dict[str, Tensor]:
    """The tensors of one file of `folder`; raises BurnishError where it is missing, damaged, or no file."""
    regular_file(file, folder)
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise BurnishError(f"{file} cannot be read: {one_line(error)}", "whole safetensors of the policy") from error


def old_statistics(state: dict[str, Tensor], keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Take statistics of LeRobot's earlier layout out of `state`; by feature and name, empty where there are none.

    Args:
        state: tensors by name; loses those of normalisation modules.
        keys: features that the config declares; in a buffer's name each dot is an underscore.
    """
    found: dict[str, dict[str, Tensor]] = {}
    known = {key.replace(".", "_"): key for key in keys}
    for name in [name for name in state if name.startswith(_OLD)]:
        value = state.pop(name)
        buffer, _, statistic = name.split(".", 1)[1].removeprefix("buffer_").rpartition(".")
        if buffer in known:
            found.setdefault(known[buffer], {})[statistic] = value
    return found


def load_tensors(
    module: nn.Module, state: dict[str, Tensor], source: str, extra_allowed: bool = False, new_data: bool = False
) -> None:
    """Copy `state` into `module`: each of its tensors must be there, in its shape, and (unless allowed) no other.

    `new_data` says that the module was built for the sizes of data that the tensors were not made for.

    A tensor that shares its memory with one that is there (tied weights) may be absent. NaN and infinity are refused.
    """
    own = module.state_dict()
    present = {own[key].data_ptr() for key in own if key in state}
    missing = [k for k in own if k not in state and own[k].data_ptr() not in present]
    extra = [] if extra_allowed else [k for k in state if k not in own]
    if missing or extra:
        kinds = ((missing, "missing"), (extra, "unknown"))
        said = [f"{len(keys)} {what} ({first(keys)})" for keys, what in kinds if keys]
        raise BurnishError(f"tensors of {source} do not match the config: {', '.join(said)}",
                           f"exactly the {len(own)} tensors of the model",
                           "the config.json that belongs to the weights")  # fmt: skip
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
        raise BurnishError(f"{len(wrong)} tensors of {source} have other shapes ({wrong[0]}: {shapes})",
                           *_SIZES[new_data])  # fmt: skip
    for name, tensor in own.items():
        if name in state and tensor.is_floating_point() != state[name].is_floating_point():
            raise BurnishError(f"tensor {name} of {source} is {state[name].dtype}", f"a kind of {tensor.dtype}")
    check_finite({name: state[name] for name in own if name in state}, source)
    module.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def check_finite(state: dict[str, Tensor], source: str) -> None:
    """Raise BurnishError that names the tensors of `state` with NaN or infinity; one pass over the numbers."""

    def broken(tensor: Tensor) -> bool:
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            return False
        return not bool(torch.isfinite(tensor.float()).all())  # a sum of finite numbers may overflow

    wrong = [name for name, tensor in state.items() if broken(tensor)]
    if wrong:
        raise BurnishError(f"{len(wrong)} of {len(state)} tensors of {source} hold NaN or infinity ({first(wrong)})",
                           "finite weights, e.g. of an earlier checkpoint")  # fmt: skip


class Streamed(Mapping[str, Tensor]):
    """Finite tensors that are made as they are asked for, in `order`; none is there twice.

    Args:
        about: a tensor of the same shape and type for each.
        make: the tensor of a name, on the CPU.
    """

    def __init__(self, about: Mapping[str, Tensor], make: Callable[[str], Tensor]):
        self.about, self._make = about, make

    @property
    def order(self) -> list[str]:
        """As safetensors lays them out: the widest types first, then by name."""
        return sorted(self.about, key=lambda name: (-list(_STORED).index(self.about[name].dtype), name))

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.about)

    def __len__(self) -> int:
        return len(self.about)


def write_weights(
    folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype | None = None, exact: Iterable[str] = ()
) -> None:
    """Write model.safetensors beside config.json: finite tensors, each memory once (under the first of its names).

    LeRobot's own writer takes the live weights whatever it is given, from its version 0.6.2 on.

    Args:
        state: tensors by LeRobot's names; those of a `Streamed` are never in memory together, and the file is the same.
        dtype: floating tensors are stored so; None keeps them.
        exact: tensors that keep their type: in half precision the edges of bins would move.
    """
    if isinstance(state, Streamed):
        _stream(folder / WEIGHTS, state)
        return
    kept = set(exact)
    check_finite(dict(state), "the policy to store")
    seen: dict[Any, str] = {}
    stored: dict[str, Tensor] = {}
    for name in sorted(state):
        tensor = state[name]
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device)
        if tensor.numel() and seen.setdefault(place, name) != name:
            continue
        narrow = dtype is not None and tensor.is_floating_point() and name not in kept
        cast = tensor.to(dtype) if narrow else tensor
        stored[name] = cast.detach().cpu().contiguous()
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})


def _stream(path: Path, state: Streamed) -> None:
    infos = {name: TensorInfo(_STORED[t.dtype], tuple(t.shape)) for name, t in state.about.items()}
    header, _ = make_header({name: infos[name] for name in state.order}, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(header)
        for name in state.order:
            file.write(state[name].contiguous().view(-1).view(torch.uint8).numpy())


def share_mode(folder: Path) -> None:
    """Give the folder's tensors the rights of config.json; safetensors writes them for their owner alone."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG, file)


def first(keys: Iterable[str], count: int = 3) -> str:
    """The first of some names."""
    keys = list(keys)
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
