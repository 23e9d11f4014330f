"""Gradient checkpointing of a part of a policy (Chen et al. 2016, arXiv:1604.06174)."""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(owner: nn.Module, name: str = "forward") -> None:
    """From now on calls of `owner.name` keep their inputs alone; the backward pass runs them again for the rest.

    Values and gradients stay the same. A call that fills a cache of keys and values is left as it is: run twice, it
    would fill it twice.
    """
    plain = getattr(type(owner), name)

    def again(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
            return plain(self, *args, **kwargs)
        return checkpoint(partial(plain, self), *args, use_reentrant=False, **kwargs)

    setattr(owner, name, MethodType(again, owner))  # a bound method, so that a deep copy runs its own weights
