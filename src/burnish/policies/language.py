"""The language ability of a backbone: answer losses and greedy answers over its own parts.

Embeddings are joined by hand (image first, then text), so nothing depends on an image token id or on how a wrapper
around the language model treats images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from burnish.core.types import LanguageLoss
from burnish.policies import vqa


@dataclass(frozen=True)
class Backbone:
    """The parts of a VLM that speaking needs.

    Args:
        text_model: transformers decoder that takes `inputs_embeds` and a 4-D additive mask.
        head: last hidden states to logits.
        embed_text: [B, L] ids to [B, L, D].
        bos: whether a bos token follows the image.
        see_prompt: whether image and first question attend to one another in both directions, as
            PaliGemma was trained; otherwise everything is causal.
        scale: factor of image and text embeddings.
        around_image: ids of special tokens before and after the image; their embeddings are not scaled.
        run: embeddings [B, S, D], what may be seen (bool [B, S, S]) and positions [B, S] to hidden states [B, S, D]
            after the final norm; None runs `text_model`.
    """

    text_model: nn.Module
    head: Callable[[Tensor], Tensor]
    embed_text: Callable[[Tensor], Tensor]
    tokenizer: Any
    bos: bool = False
    see_prompt: bool = False
    scale: float = 1.0
    around_image: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    run: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


def answer_loss(backbone: Backbone, image: Tensor, questions: list, answers: list) -> LanguageLoss:
    """Next-token losses of `answers`.

    Args:
        image: [B, n, D] image embeddings.
        questions, answers: B strings, or B lists of them (several turns about one image).

    Returns:
        LanguageLoss over [B, n + L]; the first n columns are the image, with the special tokens around it.
    """
    written = vqa.encode(backbone.tokenizer, -1, 0, questions, answers, bos=backbone.bos)
    embeds, real, labels = _join(backbone, image, _moved(written, image.device))
    places = np.argwhere(written.labels.numpy() != vqa.IGNORE) + [0, labels.shape[1] - written.labels.shape[1]]
    at = torch.from_numpy(places).to(image.device, non_blocking=True)
    allowed = _allowed(backbone, real, (labels != vqa.IGNORE).int().argmax(dim=1))
    if backbone.run is not None:
        return vqa.token_losses(backbone.run(embeds, allowed, _positions(real)), labels, backbone.head, at)
    hidden = backbone.text_model(inputs_embeds=embeds, attention_mask=_additive(allowed[:, None], embeds.dtype),
                                 position_ids=_positions(real), use_cache=False).last_hidden_state  # fmt: skip
    return vqa.token_losses(hidden, labels, backbone.head, at)


@torch.no_grad()
def greedy_answers(backbone: Backbone, image: Tensor, questions: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers, the same for a question whatever else is in the batch. Arguments as in `answer_loss`."""
    encoded = encode(backbone, image, questions, None)
    embeds, real, _ = _join(backbone, image, encoded)
    length = real.sum(dim=1)
    seen = _additive(_allowed(backbone, real, length)[:, None], embeds.dtype)
    out = backbone.text_model(inputs_embeds=embeds, attention_mask=seen, position_ids=_positions(real), use_cache=True)
    last = out.last_hidden_state[torch.arange(len(length), device=length.device), length - 1]
    tokens = [backbone.head(last).argmax(dim=-1)]
    eos = backbone.tokenizer.eos_token_id
    done = tokens[0] == eos
    while len(tokens) < max_new_tokens and not bool(done.all()):
        real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
        out = backbone.text_model(inputs_embeds=backbone.embed_text(tokens[-1][:, None]).to(embeds.dtype),
                                  attention_mask=_additive(real[:, None, None, :], embeds.dtype),
                                  position_ids=(length + len(tokens) - 1)[:, None], past_key_values=out.past_key_values,
                                  use_cache=True)  # fmt: skip
        tokens.append(backbone.head(out.last_hidden_state[:, -1]).argmax(dim=-1))
        done |= tokens[-1] == eos
    return [vqa.decode(backbone.tokenizer, row) for row in torch.stack(tokens, dim=1).tolist()]


def encode(backbone: Backbone, image: Tensor, questions: list, answers: list | None) -> vqa.Encoded:
    return _moved(vqa.encode(backbone.tokenizer, -1, 0, questions, answers, bos=backbone.bos), image.device)


def _moved(encoded: vqa.Encoded, device: torch.device) -> vqa.Encoded:
    """On `device`; the host does not wait until it is there."""
    return vqa.Encoded(*(part.to(device, non_blocking=True) for part in encoded))


def _join(backbone: Backbone, image: Tensor, encoded: vqa.Encoded) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, S, D], real positions bool [B, S] and labels [B, S] of image and text together."""
    before, after = (
        backbone.embed_text(torch.tensor([ids] * len(image), dtype=torch.long).to(image.device, non_blocking=True)).to(
            image.dtype
        )
        for ids in backbone.around_image
    )
    text = backbone.embed_text(encoded.input_ids).to(image.dtype)
    scaled = [part if backbone.scale == 1 else part * backbone.scale for part in (image, text)]
    parts = [before, scaled[0], after, scaled[1]]
    batch, tokens = len(image), sum(part.shape[1] for part in parts[:3])
    real = torch.cat([encoded.attention_mask.new_ones(batch, tokens), encoded.attention_mask], dim=1).bool()
    labels = torch.cat([encoded.labels.new_full((batch, tokens), vqa.IGNORE), encoded.labels], dim=1)
    return torch.cat(parts, dim=1), real, labels


def _positions(real: Tensor) -> Tensor:
    return (real.cumsum(dim=1) - 1).clamp_min(0)


def _allowed(backbone: Backbone, real: Tensor, prompt: Tensor) -> Tensor:
    """bool [B, S, S]: causal over real positions, both ways inside the first `prompt` [B] if so trained."""
    index = torch.arange(real.shape[1], device=real.device)
    allowed = (index[None, :] <= index[:, None])[None]
    if backbone.see_prompt:
        allowed = allowed | (index[None, :] < prompt[:, None])[:, None, :]
    return allowed & real[:, None, :]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
