"""pi0 and pi05 by the executor. LeRobot 0.6.1 clones the keys of the whole prefix at every step, repeats its one key
head for all query heads, and computes pi05's modulation of every norm anew, though it follows from the time alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.runtime.family import Encoded, Family, columns, extend, with_room

HIDDEN = -2.3819763e38
"""What LeRobot adds to the scores of hidden positions."""


class Pi(Family):
    """Layers by hand, as transformers' Gemma runs them with eager attention. Buffers are [B, heads, P + S, D] in the
    exact tier and [B, KV, P + S, D] in fused ones; S is the chunk, for pi0 with the state's row before it.
    """

    def sources(self) -> list[nn.Module]:
        parts = self.parts
        found = [*parts.text_layers, *parts.expert_layers] if self.fused else []
        if parts.adaptive:
            found += [parts.time_in, parts.time_out, *self._norms()]
        return [*found, parts.action_in, parts.time_in] if self.fused and not parts.adaptive else found

    @torch.no_grad()
    def encode(self, inputs: Sequence[Any]) -> Encoded:
        parts = self.parts
        images, image_masks, tokens, token_mask, *state = inputs
        x, pad = self._embed(images, image_masks, tokens, token_mask)
        if self.drops and (kept := columns(pad)) is not None:
            x, pad = x[:, kept], pad[:, kept]
        first = [] if parts.adaptive else [self._state(state[0])]
        B, P, S = x.shape[0], x.shape[1], parts.chunk_size + len(first)
        order = self.constant([1] * (1 + len(first)) + [0] * (parts.chunk_size - 1), torch.long, pad.device).cumsum(0)
        among = (order[None, :] <= order[:, None]).expand(B, S, S)
        mask = torch.cat([pad[:, None, :].expand(B, S, P), among], 2)
        count = torch.arange(1, S + 1, device=pad.device)[None].expand(B, S)
        kind, device = parts.expert_layers[0].self_attn.q_proj.weight.dtype, pad.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else kind
        empty = torch.empty(0, dtype=kind, device=pad.device)
        rope = rotation(parts.rotary[1](empty, pad.sum(-1)[:, None] + count - 1))
        encoded = Encoded(B, P, masks=(self._mask(mask), None), rope=(rope,), state=first[0] if first else None)
        if parts.text_layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16:
            x = x.to(torch.bfloat16)
        there = rotation(parts.rotary[0](x, torch.cumsum(pad, dim=1) - 1))
        self.prefill(encoded, x, self._mask(pad[:, None, :] & pad[:, :, None]), there)
        return encoded

    def restate(self, old: Encoded, state: Tensor) -> Encoded:
        """pi0's state stands among the actions."""
        return replace(old, state=self._state(state))

    def condition(self, time: float, width: int) -> Tensor:
        """pi0: the embedding of time [B, 1, W]. pi05: 1 + scale, shift and gate of every norm [3 (2 L + 1), B, 1, W],
        made for this very width: one row is multiplied by another routine than several, and last bits differ.
        """

        def make() -> Tensor:
            parts = self.parts
            device = parts.action_in.weight.device
            made = self.time_embedding(time, width, parts.action_in.out_features, device).type(torch.float32)
            if not parts.adaptive:
                return made[:, None]
            made = F.silu(parts.time_out(F.silu(parts.time_in(made))))
            modulations = (norm.dense(made).unsqueeze(1).float().chunk(3, dim=-1) for norm in self._norms())
            return torch.stack([part for scale, shift, gate in modulations for part in (1 + scale, shift, gate)])

        return self.timed(time, width, make)

    def velocity(self, encoded: Encoded, points: Tensor, condition: Tensor) -> Tensor:
        parts, kind = self.parts, self.parts.expert_layers[0].self_attn.q_proj.weight.dtype
        actions = parts.action_in(points)
        if not parts.adaptive:
            both = torch.cat([actions, condition.expand_as(actions)], dim=2)
            actions = parts.time_out(F.silu(parts.time_in(both)))
            actions = torch.cat([encoded.state, actions], dim=1)
        x = actions.to(torch.bfloat16) if kind == torch.bfloat16 else actions
        rows = condition.unbind(0) if parts.adaptive else ()
        for i, layer in enumerate(parts.expert_layers):
            y, gate = normed(layer.input_layernorm, x, rows[6 * i : 6 * i + 3])
            q, k, v = self._project(layer, y, encoded.rope[0])
            keys = extend(encoded.keys[i], encoded.length, self._heads(k), 2)
            values = extend(encoded.values[i], encoded.length, self._heads(v), 2)
            x = self._rest(layer, x, self._attend(layer, q, keys, values, encoded.masks[0]), gate,
                           rows[6 * i + 3 : 6 * i + 6])  # fmt: skip
        x, _ = normed(parts.expert_norm, x, rows[-3:])
        return parts.action_out(x[:, -parts.chunk_size :].to(torch.float32))

    # The prefix.

    def _embed(
        self, images: list[Tensor], image_masks: list[Tensor], tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, P, D] of images and text, and bool [B, P] that are no padding."""
        embedded, pads = [], []
        for image, mask in zip(images, image_masks, strict=True):
            if self.drops and not bool(mask.any()):  # a camera that no row has
                continue
            embedded.append(self.embed_image(image))
            pads.append(mask[:, None].expand(embedded[-1].shape[:2]))
        return torch.cat([*embedded, self.parts.embed_text(tokens)], dim=1), torch.cat([*pads, token_mask], dim=1)

    def _state(self, state: Tensor) -> Tensor:
        module = self.parts.state_in
        return module(state.to(torch.float32) if module.weight.dtype == torch.float32 else state)[:, None]

    def prefill(self, encoded: Encoded, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor]) -> None:
        parts, room = self.parts, self.parts.chunk_size + (encoded.state is not None)
        for layer in parts.text_layers:
            y, _ = normed(layer.input_layernorm, x)
            q, k, v = self._project(layer, y, rope)
            keys, values = self._heads(k), self._heads(v)
            encoded.keys.append(with_room(keys, room, 2))
            encoded.values.append(with_room(values, room, 2))
            if layer is not parts.text_layers[-1]:
                x = self._rest(layer, x, self._attend(layer, q, keys, values, mask), None)

    # Pieces of a layer.

    def _norms(self) -> list[Any]:
        """pi05's norms in the order that they are met, each with a layer `dense` from time to its modulation."""
        pairs = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in self.parts.expert_layers]
        return [*(norm for pair in pairs for norm in pair), self.parts.expert_norm]

    def _project(self, layer: Any, y: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, S, D], rotated keys and values [B, KV, S, D]."""
        attention, shape = layer.self_attn, (*y.shape[:2], -1, self.parts.head_dim)
        found = self.linears(id(layer), y, attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (one.view(shape).transpose(1, 2) for one in found)
        return rotate(q, rope), rotate(k, rope), v

    def _heads(self, tensor: Tensor) -> Tensor:
        """Keys or values [B, KV, S, D] in the layout of the buffers."""
        return tensor if self.fused else tensor.repeat_interleave(self.groups, 1)

    def _mask(self, mask: Tensor) -> Tensor | None:
        """bool [B, S, L] as `_attend` takes it: in the exact tier as numbers to add."""
        return self.fused_mask(mask) if self.fused else torch.where(mask[:, None], 0.0, HIDDEN)

    def _attend(self, layer: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[B, S, H * D]."""
        if self.fused:
            seen = self.attend_fused(queries, keys, values, mask)
        else:
            weights = torch.matmul(queries, keys.transpose(2, 3)) * layer.self_attn.scaling
            shares = F.softmax(weights + mask, dim=-1, dtype=torch.float32).to(queries.dtype)
            seen = torch.matmul(shares, values)
        return seen.transpose(1, 2).reshape(len(queries), queries.shape[2], -1)

    def _rest(self, layer: Any, x: Tensor, seen: Tensor, gate: Tensor | None, now: Sequence[Tensor] = ()) -> Tensor:
        """A layer behind its attention; `now` is the modulation of its second norm."""
        out = layer.self_attn.o_proj(seen)
        x = x + (out if gate is None else out * gate)
        y, gate = normed(layer.post_attention_layernorm, x, now)
        y = self.mlp(layer, y)
        return x + (y if gate is None else y * gate)


def normed(norm: Any, x: Tensor, now: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor | None]:
    """LeRobot's PiGemmaRMSNorm: x [B, S, W] and its gate; plain without the three rows [B, 1, W] of its modulation."""
    if not now:
        return norm(x)
    scale, shift, gate = now
    variance = torch.mean(torch.square(x.float()), dim=-1, keepdim=True)
    y = x * torch.rsqrt(variance + norm.eps)
    return (y * scale + shift).to(x.dtype), gate.to(x.dtype)


def rotation(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gemma's cosines and sines [B, S, D], for all heads; sines of the first half with the sign that `rotate` wants."""
    cos, sin = (part.unsqueeze(1) for part in table)
    half = sin.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, H, S, D] at the positions of `table`: the same products and sums as transformers'."""
    cos, sin = table
    half = x.shape[-1] // 2
    return x * cos + torch.cat([x[..., half:], x[..., :half]], dim=-1) * sin
