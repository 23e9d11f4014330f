"""Gradient checkpointing of a part of a policy (Chen et al. 2016, arXiv:1604.06174)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(owner: nn.Module, name: str = "forward") -> Callable[[], None]:
    """From now on calls of `owner.name` keep their inputs alone; the backward pass runs them again for the rest.

    Values and gradients stay the same. A call that fills a cache of keys and values is left as it is: run twice, it
    would fill it twice. What is returned takes it back.
    """
    plain, before = getattr(type(owner), name), vars(owner).get(name)

    def again(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
            return plain(self, *args, **kwargs)
        return checkpoint(partial(plain, self), *args, use_reentrant=False, **kwargs)

    setattr(owner, name, MethodType(again, owner))  # a bound method, so that a deep copy runs its own weights
    return partial(delattr, owner, name) if before is None else partial(setattr, owner, name, before)


@contextmanager
def recomputing(policy: Any) -> Iterator[None]:
    """Inside, `policy.recompute()` holds, and afterwards what held before."""
    undo = policy.recompute()
    try:
        yield
    finally:
        for one in undo:
            one()
