"""Count the bytes of a computation that does not take place: tensors are fake, only their storages are written down."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

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
