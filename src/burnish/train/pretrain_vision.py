"""First phase of `burnish pretrain`: the vision tower learns what is where, before any language model listens.

Located names ("red cube" at x 40, y 62), as the `where` questions hold them, label every patch: which words apply
to it and how far the object's centre is. At the same time the connector's tokens are pulled towards the embeddings
of those words by a sigmoid loss (as SigLIP pairs images and texts, here for each token), so that the language model
starts with image tokens it can read.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class VisionPhase(nn.Module):
    """The trainable parts of a SmolVLM in this phase, with heads that are thrown away afterwards.

    Args:
        vlm: SmolVLMForConditionalGeneration.
        word_tokens: [W] id of each word's first token.
    """

    def __init__(self, vlm: nn.Module, word_tokens: list[int]):
        super().__init__()
        self.vision, self.connector = vlm.model.vision_model, vlm.model.connector
        self.embeddings = vlm.model.text_model.get_input_embeddings()
        self.register_buffer("word_tokens", torch.tensor(word_tokens))
        self.head = nn.Linear(vlm.config.vision_config.hidden_size, len(word_tokens) + 2)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def forward(
        self, pixels: Tensor, patch_labels: Tensor, patch_offsets: Tensor, token_labels: Tensor
    ) -> dict[str, Tensor]:
        """Loss of a batch: pixels [B, 3, H, W] in [-1, 1]; labels and offsets as `grid_targets` makes them."""
        patches = self.vision(pixel_values=pixels, patch_attention_mask=None).last_hidden_state
        out = self.head(patches)
        naming = F.binary_cross_entropy_with_logits(out[..., :-2], patch_labels) * patch_labels.shape[-1]
        near = ~patch_offsets[..., 0].isnan()
        pointing = F.smooth_l1_loss(out[..., -2:][near], patch_offsets[near], beta=0.1)
        tokens = F.normalize(self.connector(patches), dim=-1)
        words = F.normalize(self.embeddings(self.word_tokens), dim=-1)
        logits = tokens @ words.T * self.scale.exp() + self.bias
        reading = F.binary_cross_entropy_with_logits(logits, token_labels) * token_labels.shape[-1]
        return {"loss": naming + 2 * pointing + reading, "naming": naming, "pointing": pointing, "reading": reading}
