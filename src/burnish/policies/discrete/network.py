"""Prompt and action tokens through one language model; keys and values in slots that never move.

The prompt is [images | instruction | state]. Images and instruction see one another and nothing else, the state sees
all of it, as in SmolVLA, so a SmolVLA's backbone serves as it is. Action tokens come last. Any transformers
image-text-to-text model will do whose decoder takes embeddings, a 4-D mask, positions and a cache.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.policies.discrete.tokenizers import Bins, Fast
from burnish.policies.keys import STATE, TOKEN_MASK, TOKENS
from burnish.sampling.kept import Kept
from burnish.sampling.token_model import Prompt, TokenCache, TokenModel

BUCKET = 16
"""Text of a prompt is padded to a multiple of it on a GPU, where passes are graphs of one shape."""
MULTI_IMAGE = ("smolvlm", "idefics3")
"""VLM types that take several images at once, [B, n, 3, H, W]."""
_STATE_RANGE = {"MEAN_STD": 3.0}
"""Normalised states are binned between plus and minus this; 1 for other normalisations."""


class Joint(nn.Module):
    """Prompt and action tokens through `text_model`; a network says how actions are embedded and what a prompt sees."""

    text_model: nn.Module

    def embed_actions(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[B, R] ids at action positions (L and above: padding) to [B, R, D]."""
        raise NotImplementedError

    def prompt_mask(self, valid: Tensor) -> Tensor:
        """bool [B, P, P]: what the positions of a prompt, bool [B, P], see of it."""
        raise NotImplementedError

    def joint(
        self, prompt: Prompt, ids: Tensor, positions: Tensor, visible: Tensor, slots: Any = None,
        see_actions: bool = False, start: int = 0,
    ) -> Tensor:  # fmt: skip
        """Hidden states [B, P + R - start, D] of prompt and action tokens in one forward pass.

        Args:
            ids, positions: long [B, R].
            visible: bool [B, R, P + R], what each action token sees.
            slots: `Slots` that keep keys and values.
            see_actions: the prompt sees all action tokens.
            start: positions at the front that `slots` hold already.
        """
        states = torch.cat([prompt.states, self.embed_actions(ids, positions).to(prompt.states.dtype)], dim=1)
        above = prompt.valid.new_full((*prompt.valid.shape, ids.shape[1]), see_actions)
        mask = torch.cat([torch.cat([self.prompt_mask(prompt.valid), above], dim=2), visible], dim=1)
        at = torch.cat([places(prompt.valid), prompt.valid.sum(1, keepdim=True) + positions], dim=1)
        return self._run(states[:, start:], mask[:, start:], at[:, start:], slots)

    def extend(self, ids: Tensor, positions: Tensor, visible: Tensor, valid: Tensor, slots: Any) -> Tensor:
        """Hidden states [B, R, D] of action tokens on top of the slots; `visible` is bool [B, R, S], `valid` [B, P]."""
        return self._run(self.embed_actions(ids, positions), visible, valid.sum(1, keepdim=True) + positions, slots)

    def _run(self, states: Tensor, mask: Tensor, positions: Tensor, slots: Any) -> Tensor:
        additive = torch.zeros(mask.shape, dtype=states.dtype, device=states.device)
        additive = additive.masked_fill(~mask, torch.finfo(states.dtype).min)[:, None]
        return self.text_model(
            inputs_embeds=states, attention_mask=additive, position_ids=positions, past_key_values=slots,
            use_cache=slots is not None,
        ).last_hidden_state  # fmt: skip


class TokenNet(Joint):
    """The VLM, embeddings of action ids and places, the state's way in, and a head over the legal ids.

    Args:
        config: DiscreteConfig with features.
        vlm: transformers model with `get_image_features`, `get_decoder`, `get_input_embeddings`.

    Attributes:
        state_positions: token positions of the state at the end of the prompt.
        kept: where decoders look for keys of pictures and text, see `TokenModel.keep`.
    """

    kept: Kept | None = None

    def __init__(self, config: Any, vlm: nn.Module):
        super().__init__()
        self.config, self.vlm = config, vlm
        steps, dims = config.chunk_size, config.action_dim
        if config.tokenizer == "fast":
            self.tokens: Bins | Fast = Fast(config.fast_folder, dims, steps, config.fast_length)
        else:
            self.tokens = Bins(dims, steps, config.bins)
        width = self.text_model.config.hidden_size
        self.scale = math.sqrt(width) if config.scale_embeddings else 1.0
        state_dim = config.robot_state_feature.shape[0]
        self.state_positions = state_dim if config.state_as == "tokens" else 1
        if config.state_as == "tokens":
            self.state_embed = nn.Embedding(config.bins, width)
            self.state_place = nn.Parameter(torch.zeros(state_dim, width))
        else:
            self.state_proj = nn.Linear(config.max_state_dim, width)
        self.action_embed = nn.Embedding(self.tokens.vocabulary + 1, width)
        self.action_place = nn.Parameter(torch.zeros(config.length, width))
        self.head = nn.Linear(width, self.tokens.vocabulary)
        self.start()

    @property
    def text_model(self) -> nn.Module:
        return self.vlm.get_decoder()

    @property
    def mask_id(self) -> int:
        return self.tokens.vocabulary

    @torch.no_grad()
    def start(self) -> None:
        """Starting values for what the VLM lacks: near actions get near embeddings and near weights in the head, places
        share step and dimension, and all have the size of word embeddings.
        """
        steps, dims = self.config.chunk_size, self.config.action_dim
        words = self.vlm.get_input_embeddings().weight
        size = words.float().std().item() * self.scale
        vocabulary, width = self.head.weight.shape
        waves = _smooth(vocabulary, width)
        self.action_embed.weight[:vocabulary] = size * waves
        self.action_embed.weight[vocabulary:].normal_(0, size)
        self.head.weight.copy_(waves / math.sqrt(width))
        self.head.bias.zero_()
        if self.tokens.time_ordered:
            step, dim = torch.randn(steps, 1, width), torch.randn(1, dims, width)
            self.action_place.copy_(size * (step + dim).flatten(0, 1) / math.sqrt(2))
        else:
            self.action_place.normal_(0, size)
        if self.config.state_as == "tokens":
            self.state_embed.weight.copy_(size * _smooth(*self.state_embed.weight.shape))
            self.state_place.normal_(0, size)

    # The prompt.

    def prepare_images(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Images as the vision tower takes them, [B, 3, H, W] for each camera of the batch, and whether there [B]."""
        from lerobot.policies.common.vla_utils import resize_with_pad

        images, masks = [], []
        for key in self.config.image_features:
            if key not in batch:
                continue
            size = self.config.image_size
            image = batch[key][:, -1] if batch[key].ndim == 5 else batch[key]
            mean, std = (image.new_tensor(x)[:, None, None] for x in (self.config.image_mean, self.config.image_std))
            images.append((resize_with_pad(image, size, size, pad_value=0) - mean) / std)
            there = batch.get(f"{key}_padding_mask")
            masks.append(image.new_ones(len(image), dtype=torch.bool) if there is None else there.bool())
        return images, masks

    def embed_image(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, n, D]."""
        image = image.to(self.head.weight.dtype)
        several = self.vlm.config.model_type in MULTI_IMAGE
        return self.vlm.get_image_features(pixel_values=image[:, None] if several else image).pooler_output

    def prompt(self, batch: dict[str, Any]) -> Prompt:
        """Embeddings of a batch that went through the preprocessor."""
        images, masks = self.prepare_images(batch)
        if not images:
            raise BurnishError("a batch without images", ", ".join(self.config.image_features))
        parts = [self.embed_image(image) for image in images]
        valid = [mask[:, None].expand(-1, part.shape[1]) for part, mask in zip(parts, masks, strict=True)]
        parts.append(self.vlm.get_input_embeddings()(batch[TOKENS]))
        valid.append(batch[TOKEN_MASK].bool())
        state = self._embed_state(batch[STATE])
        valid.append(valid[-1].new_ones(state.shape[:2]))
        seen = torch.cat(parts, dim=1) * self.scale
        return Prompt(torch.cat([seen, state.to(seen.dtype)], dim=1), torch.cat(valid, dim=1))

    def _embed_state(self, state: Tensor) -> Tensor:
        state = state[:, -1] if state.ndim == 3 else state
        if self.config.state_as == "tokens":
            mode = self.config.normalization_mapping["STATE"].value
            at = (state / _STATE_RANGE.get(mode, 1.0) + 1) / 2 * self.config.bins
            return self.state_embed(at.floor().long().clamp(0, self.config.bins - 1)) + self.state_place
        padded = nn.functional.pad(state, (0, self.config.max_state_dim - state.shape[-1]))
        return self.state_proj(padded.to(self.state_proj.weight.dtype))[:, None]

    # The language model.

    def embed_actions(self, ids: Tensor, positions: Tensor) -> Tensor:
        place = self.action_place[positions.clamp(max=self.config.length - 1)]
        return self.action_embed(ids) + place

    def prompt_mask(self, valid: Tensor) -> Tensor:
        """bool [B, P, P]: images and text see one another, the state sees everything, padding is not seen."""
        late = torch.arange(valid.shape[1], device=valid.device) >= valid.shape[1] - self.state_positions
        return valid[:, None, :] & (late[:, None] | ~late[None, :])


def bucketed(batch: dict[str, Any], multiple: int = 0) -> dict[str, Any]:
    """A preprocessed batch whose text is padded, unseen, to a multiple of tokens: 0 means `BUCKET` on a GPU, else 1."""
    multiple = multiple or (BUCKET if batch[TOKENS].is_cuda else 1)
    more = -batch[TOKENS].shape[1] % multiple
    if not more:
        return batch
    return {**batch, TOKENS: nn.functional.pad(batch[TOKENS], (0, more)),
            TOKEN_MASK: nn.functional.pad(batch[TOKEN_MASK].bool(), (0, more))}  # fmt: skip


def places(valid: Tensor) -> Tensor:
    """[B, P] positions of a prompt whose padding counts none."""
    return (valid.long().cumsum(dim=1) - 1).clamp_min(0)


def _smooth(count: int, width: int) -> Tensor:
    """[count, width] of about unit size in which rows that are near have a large inner product: random waves."""
    at = torch.linspace(-1, 1, count)[:, None]
    frequency = torch.randn(1, width) * 4
    return math.sqrt(2) * torch.cos(at * frequency + 2 * math.pi * torch.rand(1, width))


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
