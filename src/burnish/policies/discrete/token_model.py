"""The network as decoders see it; see burnish.sampling.token_model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from burnish.policies.discrete.network import TokenNet
from burnish.sampling.kept import Kept
from burnish.sampling.token_model import Prompt, TokenCache, TokenModel


class Slots:
    """A transformers cache that writes keys and values into given slots and hands out the first ones.

    Args:
        cache: its tensors are written in place.
        slots: long [B, R] where the tokens of this pass go; None means the first ones.
        used: how many slots attention looks at.
    """

    is_compileable = True

    def __init__(self, cache: TokenCache, slots: Tensor | None, used: int):
        self.cache, self.used = cache, used
        self.index = None if slots is None else slots[:, None, :, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by every attention layer with [B, H_kv, R, D_h]."""
        kept = self.cache.keys[layer], self.cache.values[layer]
        for place, new in zip(kept, (keys, values), strict=True):
            new = new.to(place.dtype)  # under autocast keys and values differ
            if self.index is None:
                place[:, :, : new.shape[2]] = new
            else:
                place.scatter_(2, self.index.expand_as(new), new)
        return kept[0][:, :, : self.used], kept[1][:, :, : self.used]


class NetTokenModel(TokenModel):
    """A TokenNet behind the protocol of decoders.

    Args:
        embed: batch to prompt; None for batches that went through the preprocessor.
    """

    def __init__(self, net: TokenNet, embed: Callable[[Any], Prompt] | None = None):
        config = net.config
        self.net, self._embed = net, embed or net.prompt
        self._learn: tuple[bytes, int] | None = None
        self.length, self.vocabulary = config.length, net.tokens.vocabulary
        self.time_ordered = net.tokens.time_ordered
        self.executed = config.n_action_steps * config.action_dim if self.time_ordered else 0
        self.step_length = config.action_dim if self.time_ordered else self.length
        self.mask_id = None if config.training == "autoregressive" else net.mask_id
        self.shift, self.block, self.prompt_sees_actions = config.shift, config.block, config.prompt_sees_actions

    def embed(self, batch: Any) -> Prompt:
        return self._embed(batch)

    def empty(self, prompt: Prompt) -> TokenCache:
        text = self.net.text_model.config
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        B, P, _ = prompt.states.shape
        shape = (B, text.num_key_value_heads, P + self.length + 1, dim)
        layers = range(text.num_hidden_layers)
        return TokenCache(keys=[prompt.states.new_zeros(shape) for _ in layers],
                          values=[prompt.states.new_zeros(shape) for _ in layers], valid=prompt.valid,
                          prompt_logits=prompt.states.new_zeros(B, self.vocabulary))  # fmt: skip

    def prefill(self, prompt: Prompt) -> TokenCache:
        """A cache after a forward pass over the prompt alone."""
        cache, batch = self.empty(prompt), len(prompt.valid)
        ids = torch.zeros(batch, 0, dtype=torch.long, device=prompt.valid.device)
        self.whole(prompt, ids, prompt.valid.new_zeros(batch, 0, prompt.valid.shape[1]), cache)
        return cache

    def whole(
        self, prompt: Prompt, ids: Tensor, visible: Tensor, cache: TokenCache, *, read: Tensor | None = None,
        see_actions: bool = False,
    ) -> Tensor:  # fmt: skip
        P, R = prompt.states.shape[1], ids.shape[1]
        positions = torch.arange(R, device=ids.device).expand_as(ids)
        start = self._known(prompt, cache, see_actions)
        slots = torch.arange(start, P + R, device=ids.device).expand(len(ids), -1) if start else None
        hidden = self.net.joint(prompt, ids, positions, visible, Slots(cache, slots, P + R), see_actions, start)
        if self._learn is not None:
            key, end = self._learn
            self.net.kept.store("prompt", key, [rows[:, :, :end].clone() for rows in (*cache.keys, *cache.values)])
        cache.prompt_logits.copy_(self.net.head(hidden[:, P - 1 - start]))
        return self.net.head(_chosen(hidden[:, P - start :], read))

    def keep(self, kept: Kept | None) -> None:
        self.net.kept = kept

    def _known(self, prompt: Prompt, cache: TokenCache, see_actions: bool) -> int:
        """Positions at the front of the prompt whose keys are known, now in the cache; at least its last one runs."""
        self._learn = None
        capturing = prompt.states.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.net.kept is None or see_actions or capturing or torch.is_grad_enabled():
            return 0
        end = prompt.states.shape[1] - max(1, self.net.state_positions)
        front = prompt.states[:, :end].contiguous()
        self.net.kept.begin(self.net)
        key = self.net.kept.key(front, prompt.valid)
        found = self.net.kept.find("prompt", key)
        if found is None:
            self._learn = key, end
            return 0
        for rows, known in zip((*cache.keys, *cache.values), found, strict=True):
            rows[:, :, :end] = known
        return end

    def extend(
        self, ids: Tensor, positions: Tensor, visible: Tensor, cache: TokenCache, *, read: Tensor | None = None
    ) -> Tensor:
        slots = Slots(cache, cache.valid.shape[1] + positions, visible.shape[2])
        return self.net.head(_chosen(self.net.extend(ids, positions, visible, cache.valid, slots), read))


def _chosen(hidden: Tensor, read: Tensor | None) -> Tensor:
    if read is None:
        return hidden
    return hidden.gather(1, read[..., None].expand(-1, -1, hidden.shape[-1]))
