"""Second phase of `python -m workshop pretrain`: the language model learns to find what a name means in the image.

At each word of a name ("red cube, then the blue ball") the hidden state of every layer must tell where that object
is, by a linear head that is thrown away afterwards. A regression for every object of an image is a far denser signal
than the few answer tokens of a question, and small models otherwise stay blind for a long time.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BEFORE = ("", " the", " where is the", " reach the", " push the", " is the", " which is nearer, the", " on the")
AFTER = ("", "?", ",", "\n", " to the left", " away", " or", " and")


def match_rms(vlm: nn.Module, pixels: Tensor, rms: float = 0.06) -> None:
    """Give image tokens and word embeddings the same size.

    SmolVLA multiplies both by sqrt(D), and larger ones would outweigh what the layers add. The layers' norms hide the
    change from the first attention.

    Args:
        pixels: [B, 3, H, W] sample images to measure the connector's output with.
        rms: root mean square of every embedding afterwards.
    """
    with torch.no_grad():
        patches = vlm.model.vision_model(pixel_values=pixels, patch_attention_mask=None).last_hidden_state
        found = vlm.model.connector(patches).pow(2).mean().sqrt()
        for parameter in vlm.model.connector.parameters():
            parameter.mul_(rms / found)
        table = vlm.model.text_model.get_input_embeddings().weight
        table.mul_(rms / table.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-6))


def name_texts(
    located: list[tuple[tuple[str, ...], float, float]], tokenizer: Any, rng: np.random.Generator
) -> tuple[list[int], list[int], list[tuple[float, float]]]:
    """Token ids of a text that names every object in random order, the indices of all names' tokens, their (u, v)."""
    ids: list[int] = []
    named: list[int] = []
    points: list[tuple[float, float]] = []
    for k in rng.permutation(len(located)):
        words, u, v = located[k]
        for text, is_name in ((rng.choice(BEFORE), False), (" " + " ".join(words), True), (rng.choice(AFTER), False)):
            tokens = tokenizer(str(text), add_special_tokens=False)["input_ids"] if text else []
            if is_name:
                named += range(len(ids), len(ids) + len(tokens))
                points += [(u, v)] * len(tokens)
            ids += tokens
    return ids, named, points


class GroundingPhase(nn.Module):
    """A SmolVLM with one pointing head for each layer of its language model."""

    def __init__(self, vlm: nn.Module):
        super().__init__()
        self.vlm = vlm.model
        width = vlm.config.text_config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in self.vlm.text_model.layers)

    def forward(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, names: Tensor, points: Tensor, scaled: Tensor
    ) -> dict[str, Tensor]:
        """Mean pointing loss over layers and words.

        Args:
            pixels: [B, 3, H, W] in [-1, 1].
            input_ids, attention_mask: [B, S] text, right-padded.
            names: [B, K] indices of the names' tokens, -1 where there are fewer.
            points: [B, K, 2] in [0, 1].
            scaled: [] bool; multiply embeddings by sqrt(D) as SmolVLA's joint forward does, so that the same layers
                serve both forwards.
        """
        patches = self.vlm.vision_model(pixel_values=pixels, patch_attention_mask=None).last_hidden_state
        image = self.vlm.connector(patches)
        text = self.vlm.text_model.get_input_embeddings()(input_ids)
        embeddings = torch.cat([image, text], 1)
        embeddings = torch.where(scaled, embeddings * embeddings.shape[-1] ** 0.5, embeddings)
        mask = torch.cat([attention_mask.new_ones(image.shape[:2]), attention_mask], 1)
        states = self.vlm.text_model(
            inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states[1:]
        positions = (names.clamp_min(0) + image.shape[1])[..., None].expand(-1, -1, image.shape[-1])
        real = names >= 0
        losses = []
        for head, state in zip(self.heads, states, strict=True):
            pointed = head(F.rms_norm(state.gather(1, positions), state.shape[-1:]))
            losses.append(F.smooth_l1_loss(pointed[real], points[real], beta=0.02))
        return {"loss": torch.stack(losses).mean() * 10, "last": losses[-1].detach()}
