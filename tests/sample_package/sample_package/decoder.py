"""A decoder: the likeliest token at every position, in one forward pass over all masked ones."""

import torch

from burnish.sampling.token_model import Decoded


def argmax(model):
    """Decode(prompt, ...) for `model`."""

    def decode(prompt, *, prefix=None, until=None, stream=None):
        batch, length = prompt.states.shape[:2]
        ids = torch.full((batch, model.length), model.mask_id, dtype=torch.long)
        seen = torch.ones(batch, model.length, length + model.length, dtype=torch.bool)
        seen[..., :length] = prompt.valid[:, None]
        logits = model.whole(prompt, ids, seen, model.empty(prompt))
        ids = logits.argmax(-1)
        if prefix is not None:
            ids[:, : prefix.shape[1]] = prefix
        return Decoded(ids, 1, length + model.length, torch.ones_like(ids))

    return decode
