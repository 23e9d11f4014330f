"""SmolVLA by the executor. LeRobot 0.6.1 projects the prefix's keys through the expert at every step, rebuilds masks,
positions and rotations at every layer, and lets its cache grow and be cut; none of it depends on the noisy actions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.runtime.family import Encoded, Family, columns, extend, with_room

TAIL = 15
"""A single row is multiplied by another routine than several, with other last bits: text makes them more."""
WAVELENGTH = 10_000
"""Of rotary positions; LeRobot has it built in, whatever the language model's config says."""


@dataclass
class Prompt:
    """A prefix as its state's rows see it, for another state.

    Args:
        start: where the rows that are run again begin: the state's and up to TAIL tokens before it.
        tail: embeddings of those tokens [B, n, D].
        mask, rope: of these rows.
        keys, values: of the language model, for each layer the whole prefix.
    """

    start: int
    tail: Tensor
    mask: Tensor | None
    rope: tuple[Tensor, Tensor]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class SmolVLA(Family):
    """Layers by hand, as in LeRobot's SmolVLMWithExpertModel, on a stream [B * S, W], as linear layers want it. Buffers
    are [B, P + T, heads, D] in the exact tier, the very layout (and strides) that LeRobot's attention reads, and
    [B, KV, P + T, D] in fused ones.
    """

    exact_axis = 1

    def sources(self) -> list[nn.Module]:
        if not self.fused:
            return []
        found = [*self.parts.text_layers, *(layer for layer in self.parts.expert_layers if layer is not None)]
        return [*found, self.parts.action_in, self.parts.time_in]

    @torch.no_grad()
    def encode(self, inputs: Sequence[Any]) -> Encoded:
        parts = self.parts
        x, pad, order = self._embed(*inputs)
        if self.drops and (kept := columns(pad)) is not None:
            x, pad, order = x[:, kept], pad[:, kept], order[:, kept]
        B, P, T = x.shape[0], x.shape[1], parts.chunk_size
        steps = torch.cumsum(order, dim=1)
        mask = (steps[:, None, :] <= steps[:, :, None]) & (pad[:, None, :] & pad[:, :, None])
        seen = pad[:, None, :].expand(B, T, P)
        causal = torch.ones(T, T, dtype=torch.bool, device=pad.device).tril().expand(B, T, T)
        count, ahead = torch.arange(T, device=pad.device)[None], pad.sum(-1)[:, None]
        masks = self._mask(torch.cat([seen, causal], 2)), self._mask(seen)
        ropes = rotation(ahead + count, parts.head_dim), rotation(count, parts.head_dim)
        encoded = Encoded(B, P, masks=masks, rope=ropes)
        rope = rotation(torch.cumsum(pad, dim=1) - 1, parts.head_dim)
        if self.keeps:
            end = P - self._filled
            start = max(0, end - self._states - TAIL)
            rows, tail = slice(start, end), x[:, start : end - self._states]
            encoded.prompt = Prompt(start, tail, self._mask(mask[:, rows]), (rope[0][:, rows], rope[1][:, rows]))
        self.prefill(encoded, x, self._mask(mask), rope)
        return encoded

    @torch.no_grad()
    def restate(self, old: Encoded, state: Tensor) -> Encoded:
        """The state stands behind pictures and text, which do not see it: its rows alone run."""
        prompt, before = old.prompt, (old.prompt.keys, old.prompt.values)
        encoded = replace(old, keys=[], values=[], prompt=replace(prompt, keys=[], values=[]))
        x = torch.cat([prompt.tail, self._states_of(state)], dim=1)
        self.prefill(encoded, x, prompt.mask, prompt.rope, (old, *before))
        return encoded

    def condition(self, time: float, width: int) -> Tensor:
        def make() -> Tensor:
            a_in, t_in = self.parts.action_in, self.parts.time_in
            size = t_in.out_features
            made = self.time_embedding(time, width, size, a_in.weight.device).type(a_in.weight.dtype)[:, None]
            if not self._folds():
                return made
            weight = t_in.weight
            return F.linear(made, weight[:, size:], t_in.bias + weight[:, :size] @ a_in.bias)

        return self.timed(time, width, make)

    def velocity(self, encoded: Encoded, points: Tensor, condition: Tensor) -> Tensor:
        parts, (own_mask, cross_mask), (own, cross) = self.parts, encoded.masks, encoded.rope
        x, B = parts.time_out(F.silu(self._actions(points, condition))).flatten(0, 1), len(points)
        for i, layer in enumerate(parts.expert_layers):
            if layer is None:
                continue
            keys, values = encoded.keys[i], encoded.values[i]
            if parts.crosses[i]:
                y = norm(layer.input_layernorm, x).to(layer.self_attn.q_proj.weight.dtype)
                q = layer.self_attn.q_proj(y).view(B, -1, parts.heads, parts.head_dim)
                seen = self._attend(rotate(q, cross), keys, values, cross_mask)
            else:
                q, k, v = self._project(layer, x, B)
                keys = extend(keys, encoded.length, self._keys(rotate(k, own)), self.axis)
                values = extend(values, encoded.length, self._heads(v), self.axis)
                seen = self._attend(rotate(q, own), keys, values, own_mask)
            x = self._rest(layer, x, seen)
        return parts.action_out(norm(parts.expert_norm, x).unflatten(0, points.shape[:2]).to(torch.float32))

    # The prefix.

    def _embed(
        self, images: list[Tensor], image_masks: list[Tensor], tokens: Tensor, token_mask: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, P, D] of images, text and state, bool [B, P] that are no padding, and the block of each."""
        parts, B, device = self.parts, len(tokens), tokens.device
        embedded: list[Tensor] = []
        pads: list[Tensor] = []

        def marks(ids: tuple[int, ...]) -> None:
            if ids:
                embedded.append(parts.embed_text(self.constant(ids, torch.long, device))[None].expand(B, -1, -1))
                pads.append(torch.ones(B, len(ids), dtype=torch.bool, device=device))

        before, after = parts.image_marks
        for image, mask in zip(images, image_masks, strict=False):
            if self.drops and not bool(mask.any()):  # a camera that no row has; its marks are seen all the same
                marks(before)
                marks(after)
                continue
            marks(before)
            seen = self.embed_image(image)
            embedded.append(seen * self.constant((seen.shape[-1] ** 0.5,), seen.dtype, device)[0])
            pads.append(mask[:, None].expand(B, seen.shape[1]))
            marks(after)
        text = parts.embed_text(tokens)
        state = self._states_of(state)
        embedded += [text * text.shape[-1] ** 0.5, state]
        pads += [token_mask, torch.ones(B, state.shape[1], dtype=torch.bool, device=device)]
        x, pad = torch.cat(embedded, dim=1), torch.cat(pads, dim=1)
        order = [0] * (x.shape[1] - state.shape[1]) + [1] * state.shape[1]
        missing = 0 if self.fused else max(0, parts.prefix_length - x.shape[1])
        self._states, self._filled = state.shape[1], missing
        if missing:
            x, pad = F.pad(x, (0, 0, 0, missing)), F.pad(pad, (0, missing))
            order += [0] * missing
        return x, pad, self.constant(order, torch.long, device).expand(B, -1)

    def _states_of(self, state: Tensor) -> Tensor:
        """[B, n, D]."""
        state = self.parts.state_in(state)
        return state[:, None] if state.ndim == 2 else state

    def prefill(self, encoded: Encoded, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor],
                before: Any = None) -> None:  # fmt: skip
        """Run the language model and keep what the expert reads; behind the last keys nothing is ever read.

        With `before`, an encoding and its language model's keys and values, x are its rows from `prompt.start` on, and
        what stands there in copies of those is written anew.
        """
        parts, last, where = self.parts, len(self.parts.text_layers) - 1, self.axis

        def put(old: Tensor, new: Tensor) -> Tensor:
            old = old.clone()
            old.narrow(where, encoded.prompt.start, new.shape[where]).copy_(new)
            return old

        x, B = x.flatten(0, 1), len(x)
        for i, (layer, expert) in enumerate(zip(parts.text_layers, parts.expert_layers, strict=True)):
            q, k, v = self._project(layer, x, B)
            k = rotate(k, rope)
            keys, values = self._keys(k), self._heads(v)
            kept: tuple[Tensor | None, Tensor | None] = (None, None)
            if expert is not None:
                kept = self._through(expert.self_attn, k, v) if parts.crosses[i] else (keys, values)
            if before:
                old, old_keys, old_values = before
                keys, values = put(old_keys[i], keys), put(old_values[i], values)
                if expert is not None:
                    kept = put(old.keys[i], kept[0]), put(old.values[i], kept[1])
            elif expert is not None and not parts.crosses[i]:
                kept = with_room(keys, parts.chunk_size, where), with_room(values, parts.chunk_size, where)
            if self.keeps:
                encoded.prompt.keys.append(keys)
                encoded.prompt.values.append(values)
            encoded.keys.append(kept[0])
            encoded.values.append(kept[1])
            if i < last:
                x = self._rest(layer, x, self._attend(rotate(q, rope), keys, values, mask))

    def _through(self, attention: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The language model's keys and values as a cross layer of the expert reads them."""

        def pass_on(tensor: Tensor, module: Any) -> Tensor:
            flat = tensor.to(module.weight.dtype).reshape(*tensor.shape[:2], -1)
            return module(flat).view(*tensor.shape[:2], -1, self.parts.head_dim)

        keys, values = pass_on(keys, attention.k_proj), pass_on(values, attention.v_proj)
        return self._keys(keys).contiguous(), self._heads(values).contiguous()

    # Pieces of a layer.

    def _folds(self) -> bool:
        return self.fused and all(type(m) is nn.Linear for m in (self.parts.action_in, self.parts.time_in))

    def _actions(self, points: Tensor, condition: Tensor) -> Tensor:
        """Noisy actions and time through the first layer of their MLP."""
        a_in, t_in = self.parts.action_in, self.parts.time_in
        if self._folds():
            weight = self.folded("actions", lambda: t_in.weight[:, : t_in.out_features] @ a_in.weight)
            return F.linear(points, weight) + condition
        actions = a_in(points)
        return t_in(torch.cat([actions, condition.expand_as(actions)], dim=2))

    def _project(self, layer: Any, x: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, H, D], keys and values [B, S, KV, D] of x [B * S, W]."""
        attention, y = layer.self_attn, norm(layer.input_layernorm, x)
        y = y.to(attention.q_proj.weight.dtype)
        found = self.linears(id(layer), y, attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (one.reshape(width, -1, one.shape[-1] // self.parts.head_dim, self.parts.head_dim) for one in found)
        return q, k, v

    def _heads(self, tensor: Tensor) -> Tensor:
        """Keys or values [B, S, KV, D] in the layout of the buffers."""
        if self.fused:
            return tensor.transpose(1, 2)
        return tensor[:, :, :, None].expand(-1, -1, -1, self.groups, -1).flatten(2, 3)

    def _keys(self, tensor: Tensor) -> Tensor:
        """As `_heads`; the exact tier multiplies keys in float32, as LeRobot does."""
        return self._heads(tensor) if self.fused else self._heads(tensor).to(torch.float32)

    def _mask(self, mask: Tensor) -> Tensor | None:
        """bool [B, S, L] as `_attend` takes it; in the exact tier the most that a weight may be, which gives LeRobot's
        bits (its torch.where takes ten times as long on a CPU).
        """
        if self.fused:
            return self.fused_mask(mask)
        return torch.where(mask[:, None], torch.inf, torch.finfo(torch.float32).min)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[B * S, H * D]. The exact tier multiplies in float32 and averages in the values' type, as LeRobot does."""
        B, S, H, D = queries.shape
        if self.fused:
            return self.attend_fused(queries.transpose(1, 2), keys, values, mask).transpose(1, 2).reshape(B * S, H * D)
        weights = torch.matmul(queries.to(torch.float32).transpose(1, 2), keys.permute(0, 2, 3, 1))
        weights *= self.constant((D**-0.5,), torch.float32, weights.device)
        shares = F.softmax(weights.to(torch.float32).clamp_(max=mask), dim=-1).to(values.dtype)
        return torch.matmul(shares, values.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).reshape(B * S, H * D)

    def _rest(self, layer: Any, x: Tensor, seen: Tensor) -> Tensor:
        """A layer behind its attention. Sums are in place: the stream takes o_proj's type, as in LeRobot, where a + b
        would go up to float32 when the state's projection is in that.
        """
        out = layer.self_attn.o_proj(seen.to(layer.self_attn.o_proj.weight.dtype))
        out += x
        y = self.mlp(layer, norm(layer.post_attention_layernorm, out))
        y += out
        return y


def norm(module: Any, x: Tensor) -> Tensor:
    """A Llama norm. On a CPU PyTorch's own gives the bits of the module's six operations in half the time."""
    if x.is_cpu and x.dtype == module.weight.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
    return module(x)


def rotation(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines [B, S, 1, size] of rotary positions [B, S], operation for operation as LeRobot's; for all of a
    head, the first half of the sines with the sign that `rotate` wants.
    """
    exponents = (2.0 / size) * torch.arange(size // 2, dtype=torch.float32, device=positions.device)
    scale = WAVELENGTH**exponents
    angles = (positions[..., None].to(torch.float32) / scale[None, None, :])[..., None, :]
    sin, cos = torch.sin(angles), torch.cos(angles)
    return torch.cat([-sin, sin], -1), torch.cat([cos, cos], -1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, S, H, D] at the positions of `table`, in float32 and back."""
    (sin, cos), kind = table, x.dtype
    x = x.to(torch.float32)
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(kind)
