"""First phase of `python -m workshop pretrain`: the vision tower learns what is where, without a language model.

Located names ("red cube" at x 40, y 62), as the `where` questions hold them, label every patch: which words apply
to it and how far the object's centre is. At the same time the first attention layer of the language model learns to
look from a word at the image tokens it applies to: its own scores, with their rotary positions, are trained. Without
this a small model stays blind for thousands of steps, since nothing is gained by looking before it knows where.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

OTHERS = 40
"""Indifferent text tokens that a word might look at instead of the image."""


def located_names(rows: list[dict[str, Any]]) -> list[tuple[tuple[str, ...], float, float]]:
    """(words, u, v) of every `where` row of one image; u and v in [0, 1]."""
    found = []
    for row in rows:
        if row["kind"] == "where":
            words = row["question"].removeprefix("where is the ").removesuffix("?").split()
            numbers = [int(w) for w in row["answer"].split() if w.isdigit()]
            found.append((tuple(words), (numbers[0] + 0.5) / 100, (numbers[1] + 0.5) / 100))
    return found


def grid_targets(
    located: list[tuple[tuple[str, ...], float, float]], words: dict[str, int], side: int, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a side x side grid, row by row.

    Args:
        located: from `located_names`.
        words: word to column.
        side: cells along an edge.
        reach: an object labels the cells whose centre is nearer than this, in cells (larger coordinate counts).

    Returns:
        labels [side * side, W] float32, 1 where a word applies, and offsets [side * side, 2] float32 from the
        cell's centre to the nearest object's in cells, NaN where there is none.
    """
    labels = np.zeros((side * side, len(words)), np.float32)
    offsets = np.full((side * side, 2), np.nan, np.float32)
    if not located:
        return labels, offsets
    centres = np.stack(np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5), -1).reshape(-1, 1, 2)
    gaps = np.array([(u * side, v * side) for _, u, v in located])[None] - centres
    distance = np.abs(gaps).max(-1)
    for k, (names, _, _) in enumerate(located):
        for word in names:
            labels[distance[:, k] < reach, words[word]] = 1
    nearest = distance.argmin(1)
    near = distance.min(1) < reach
    offsets[near] = gaps[np.arange(side * side), nearest][near]
    return labels, offsets


def _centres(side: int) -> Tensor:
    """[side * side, 2] centres of the cells, in cells from the upper left corner."""
    at = torch.arange(side) + 0.5
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).reshape(-1, 2)


def attention_loss(scores: Tensor, text_scores: Tensor, applies: Tensor) -> Tensor:
    """Minus the log of the attention that falls where it should.

    A word that applies to some image token should look there, neither at itself nor at other words; one that
    applies to none should not look at the image.

    Args:
        scores: [B, heads, W, n] attention scores of W words on n image tokens.
        text_scores: [B, heads, W, W] on the words; as many tokens again (OTHERS) count with score 0.
        applies: [B, 1, W, n] bool.
    """
    others = torch.cat([text_scores, scores.new_full((*scores.shape[:-1], 1), math.log(OTHERS))], -1)
    present = applies.any(-1, keepdim=True)
    right = torch.cat([scores.masked_fill(~applies, -torch.inf), others.masked_fill(present, -torch.inf)], -1)
    return (torch.cat([scores, others], -1).logsumexp(-1) - right.logsumexp(-1)).mean()


class VisionPhase(nn.Module):
    """The trainable parts of a SmolVLM in this phase, with heads that are thrown away afterwards.

    Args:
        vlm: SmolVLMForConditionalGeneration.
        word_tokens: [W] id of each word's first token.
    """

    def __init__(self, vlm: nn.Module, word_tokens: list[int]):
        super().__init__()
        text = vlm.model.text_model
        self.vision, self.connector = vlm.model.vision_model, vlm.model.connector
        self.embeddings, self.rotary = text.get_input_embeddings(), text.rotary_emb
        self.norm, self.attention = text.layers[0].input_layernorm, text.layers[0].self_attn
        self.register_buffer("word_tokens", torch.tensor(word_tokens))
        self.head = nn.Linear(vlm.config.vision_config.hidden_size, len(word_tokens) + 2)
        self.place = nn.Linear(vlm.config.text_config.hidden_size, 2)

    def scores(self, tokens: Tensor, word_position: Tensor) -> tuple[Tensor, Tensor]:
        """Attention scores of every word, were it at `word_position` [] behind the image tokens [B, n, D].

        Returns:
            on the image [B, heads, W, n], and on itself and the other words [heads, W, W].
        """
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:-1], -1, self.attention.head_dim).transpose(-3, -2)

        words, n = self.norm(self.embeddings(self.word_tokens))[None], tokens.shape[1]
        at = torch.cat([torch.arange(n), word_position.expand(words.shape[1])])[None]
        cos, sin = self.rotary(tokens, at)
        q, text = apply_rotary_pos_emb(
            heads(self.attention.q_proj(words)), heads(self.attention.k_proj(words)), cos[:, n:], sin[:, n:]
        )
        image = heads(self.attention.k_proj(self.norm(tokens)))
        image, _ = apply_rotary_pos_emb(image, image, cos[:, :n], sin[:, :n])
        image, text = (repeat_kv(k, self.attention.num_key_value_groups).mT for k in (image, text))
        return q @ image * self.attention.scaling, (q @ text * self.attention.scaling)[0]

    def forward(
        self,
        pixels: Tensor,
        patch_labels: Tensor,
        patch_offsets: Tensor,
        token_labels: Tensor,
        token_offsets: Tensor,
        word_position: Tensor,
    ) -> dict[str, Tensor]:
        """Loss of a batch: pixels [B, 3, H, W] in [-1, 1]; labels and offsets as `grid_targets` makes them."""
        patches = self.vision(pixel_values=pixels, patch_attention_mask=None).last_hidden_state
        out = self.head(patches)
        naming = F.binary_cross_entropy_with_logits(out[..., :-2], patch_labels) * patch_labels.shape[-1]
        near = ~patch_offsets[..., 0].isnan()
        pointing = F.smooth_l1_loss(out[..., -2:][near], patch_offsets[near], beta=0.1)
        tokens = self.connector(patches)
        side = round(tokens.shape[1] ** 0.5)
        near = ~token_offsets[..., 0].isnan()
        placing = F.smooth_l1_loss(
            self.place(F.rms_norm(tokens, tokens.shape[-1:]))[near], (token_offsets + _centres(side))[near], beta=0.1
        )
        scores, text_scores = self.scores(tokens, word_position)
        reading = attention_loss(scores, text_scores.expand(len(scores), -1, -1, -1), token_labels.mT[:, None] > 0)
        return {"loss": naming + 2 * pointing + reading + 2 * placing}
