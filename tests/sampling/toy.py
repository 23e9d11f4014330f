"""A small random transformer behind TokenModel: action rows see the prompt and blocks up to their own."""

import math

import torch
from torch import nn

from burnish.sampling.token_model import Prompt, TokenCache, TokenModel


class ToyModel(TokenModel):
    """Pre-norm transformer with drawn positions; `sharp` spreads the confidences."""

    time_ordered = True

    def __init__(
        self, length=56, step_length=7, block=7, shift=False, prompt_sees_actions=False, vocabulary=16, prompt=9,
        width=32, layers=2, heads=4, sharp=3.0, dtype=torch.float64, seed=0,
    ):  # fmt: skip
        self.length, self.step_length, self.block, self.shift = length, step_length, block, shift
        self.prompt_sees_actions, self.vocabulary, self.mask_id = prompt_sees_actions, vocabulary, vocabulary
        self.heads, self.dtype = heads, dtype
        draws = torch.Generator().manual_seed(seed)

        def weight(rows, columns, scale=1.0):
            return (torch.randn(rows, columns, generator=draws, dtype=torch.float64) * scale / math.sqrt(rows)).to(
                dtype
            )

        self.embedding = weight(vocabulary + 1, width, math.sqrt(vocabulary + 1))
        self.places = weight(prompt + length + 1, width, 0.5 * math.sqrt(prompt + length))
        self.layers = [
            {
                "qkv": weight(width, 3 * width, 1.5), "out": weight(width, width),
                "up": weight(width, 4 * width), "down": weight(4 * width, width),
            }
            for _ in range(layers)
        ]  # fmt: skip
        self.head = weight(width, vocabulary, sharp)
        self.prompt_size, self.width = prompt, width

    def to(self, device):
        """Move the weights."""
        for name in ("embedding", "places", "head"):
            setattr(self, name, getattr(self, name).to(device))
        self.layers = [{name: w.to(device) for name, w in layer.items()} for layer in self.layers]

    def embed(self, batch):
        states = batch["states"].to(self.dtype)
        return Prompt(states, batch.get("valid", torch.ones(states.shape[:2], dtype=torch.bool)))

    def prompts(self, num, seed=1, ragged=False):
        draws = torch.Generator().manual_seed(seed)
        states = torch.randn(num, self.prompt_size, self.width, generator=draws, dtype=torch.float64)
        valid = torch.ones(num, self.prompt_size, dtype=torch.bool)
        if ragged:
            for b in range(num):
                valid[b, self.prompt_size - b % 3 : self.prompt_size] = False
        return self.embed({"states": states, "valid": valid})

    def empty(self, prompt):
        num, size = prompt.valid.shape
        shape = (num, self.heads, size + self.length + 1, self.width // self.heads)
        device = prompt.valid.device
        buffers = [torch.zeros(shape, dtype=self.dtype, device=device) for _ in range(2 * len(self.layers))]
        logits = torch.zeros(num, self.vocabulary, dtype=self.dtype, device=device)
        return TokenCache(buffers[::2], buffers[1::2], prompt.valid.clone(), logits)

    def whole(self, prompt, ids, visible, cache, *, read=None, see_actions=False):
        num, size = prompt.valid.shape
        rows = ids.shape[1]
        cache.valid.copy_(prompt.valid)
        inside = prompt.valid[:, None].expand(-1, size, -1)
        actions = torch.full((num, size, rows), see_actions, device=ids.device)
        visible = torch.cat((torch.cat((inside, actions), 2), visible), 1)
        hidden = torch.cat((prompt.states, self.embedding[ids]), 1) + self.places[: size + rows]
        slots = torch.arange(size + rows, device=ids.device).expand(num, -1)
        hidden = self._layers(hidden, slots, visible, cache)
        last = (prompt.valid * torch.arange(1, size + 1, device=ids.device)).argmax(1)
        cache.prompt_logits.copy_(self._logits(_pick(hidden, last[:, None])[:, 0]))
        return self._logits(_pick(hidden[:, size:], read))

    def extend(self, ids, positions, visible, cache, *, read=None):
        slots = positions + self.prompt_size
        return self._logits(_pick(self._layers(self.embedding[ids] + self.places[slots], slots, visible, cache), read))

    def _layers(self, hidden, slots, visible, cache):
        num, rows, width = hidden.shape
        for weights, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            parts = (_norm(hidden) @ weights["qkv"]).view(num, rows, 3, self.heads, -1).transpose(1, 3)
            query, key, value = parts.unbind(2)  # each [B, H, R, D]
            index = slots[:, None, :, None].expand_as(key)
            keys.scatter_(2, index, key)
            values.scatter_(2, index, value)
            seen = visible.shape[2]
            mixed = nn.functional.scaled_dot_product_attention(
                query, keys[:, :, :seen], values[:, :, :seen], attn_mask=visible[:, None]
            )
            hidden = hidden + mixed.transpose(1, 2).reshape(num, rows, width) @ weights["out"]
            hidden = hidden + (_norm(hidden) @ weights["up"]).relu() @ weights["down"]
        return hidden

    def _logits(self, hidden):
        return _norm(hidden) @ self.head


def _pick(hidden, read):
    return hidden if read is None else hidden.gather(1, read[..., None].expand(-1, -1, hidden.shape[2]))


def _norm(hidden):
    return nn.functional.layer_norm(hidden, hidden.shape[-1:])
