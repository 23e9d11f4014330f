"""Randomness of a network that draws by itself: inside `drawn`, torch's draws come from the caller's noise, row by row.

LeRobot's policies call `torch.randn` and the like wherever they need noise, from torch's global generators. So neither
could two forwards share their draws, nor would a sample be the same alone and among others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from burnish.core.types import Draws
from burnish.sampling.token_model import noise_seeds

_SHAPED = {torch.randn, torch.rand, torch.randint}
"""Draw a tensor of a given shape."""
_LIKE = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}
_IN_PLACE = {Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_, Tensor.random_}
_OF_ROWS = {
    torch.normal, torch.multinomial, torch.bernoulli, torch.poisson, torch._sample_dirichlet, torch._standard_gamma,
}  # fmt: skip
"""Draw for each row of their first argument."""


@contextmanager
def drawn(noise: Tensor) -> Iterator[None]:
    """Inside, sample b of a batch draws from a generator that its own `noise[b]` [B, ...] seeds.

    What is drawn for all samples together is drawn from one more, seeded by the first sample. Draws are made on the CPU
    and moved, so they are the same on every device. Dropout stays with torch's global generators.
    """
    with _Drawn([torch.Generator().manual_seed(int(seed)) for seed in noise_seeds(noise)]):
        yield


def seeds(batch_size: int, generator: torch.Generator) -> Draws:
    """Noise [B, 1, 4] that seeds whatever a network draws; it has no time."""
    noise = torch.randn(batch_size, 1, 4, generator=generator, device=generator.device)
    return Draws(noise, torch.ones(batch_size, device=generator.device))


class _Drawn(TorchFunctionMode):
    def __init__(self, generators: list[torch.Generator]):
        super().__init__()
        self.generators = generators
        self.shared = torch.Generator().manual_seed(generators[0].initial_seed() ^ 1)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is None:
            kwargs.pop("generator", None)
            if function in _LIKE:
                like = {"dtype": args[0].dtype, "device": args[0].device} | kwargs
                return self.shaped(_LIKE[function], tuple(args[0].shape), (), like)
            if function in _SHAPED or (function is torch.normal and (len(args) > 2 or "size" in kwargs)):
                before, shape, after = _shape(function, args, kwargs)
                return self.shaped(function, shape, before, after)
            if function is torch.randperm:
                return function(*args, generator=self.shared, **kwargs)
            if function in _IN_PLACE:
                return self.in_place(function, args[0], args[1:], kwargs)
            if function in _OF_ROWS:
                return self.of_rows(function, args, kwargs)
        return function(*args, **kwargs)

    def shaped(self, function: Callable, shape: tuple[int, ...], before: tuple, options: dict[str, Any]) -> Tensor:
        device = options.pop("device", None)
        parts = [function(*before, part, generator=one, **options) for part, one in self.split(shape)]
        found = torch.cat(parts) if len(parts) > 1 else parts[0]
        return found if device is None else found.to(device)

    def in_place(self, function: Callable, target: Tensor, args: tuple, options: dict[str, Any]) -> Tensor:
        made = torch.empty(target.shape, dtype=target.dtype)
        start = 0
        for part, one in self.split(tuple(target.shape)):
            place = made[start : start + part[0]] if part else made
            function(place, *args, generator=one, **options)
            start += part[0] if part else 0
        return target.copy_(made)

    def of_rows(self, function: Callable, args: tuple, options: dict[str, Any]) -> Tensor:
        rows, device = args[0].cpu(), args[0].device
        others = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in args[1:]]
        pieces, start = [], 0
        for part, one in self.split(tuple(rows.shape)):
            place = slice(start, start + part[0]) if part else ...
            own = [arg[place] if isinstance(arg, Tensor) and arg.shape[:1] == rows.shape[:1] else arg for arg in others]
            pieces.append(function(rows[place], *own, generator=one, **options))
            start += part[0] if part else 0
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).to(device)

    def split(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], torch.Generator]]:
        """The shape of each sample's part, samples outermost, and its generator; one part where it has none."""
        count = len(self.generators)
        if not shape or not shape[0] or shape[0] % count:
            yield shape, self.shared
            return
        for one in self.generators:
            yield (shape[0] // count, *shape[1:]), one


def _shape(function: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, tuple[int, ...], dict[str, Any]]:
    """What stands before the shape, the shape, and the other options of a call such as torch.randint(0, 9, (2, 3))."""
    if function is torch.randint:
        names = [name for name in ("low", "high") if name in kwargs]
        bounds = [kwargs.pop(name) for name in names]
        plain = [arg for arg in args if isinstance(arg, int)]
        shape = kwargs.pop("size", None) or next(arg for arg in args if not isinstance(arg, int))
        low, high = ([0, *plain] + bounds)[-2:]
        return (low, high), tuple(shape), kwargs
    if function is torch.normal:
        given = dict(zip(("mean", "std", "size"), args, strict=False)) | kwargs
        options = {name: value for name, value in given.items() if name not in ("mean", "std", "size")}
        return (given.get("mean", 0.0), given.get("std", 1.0)), tuple(given["size"]), options
    shape = kwargs.pop("size", None) or (args[0] if args and not isinstance(args[0], int) else args)
    return (), tuple(shape), kwargs
