"""A decoder: the likeliest token at every position, in one forward pass over all masked ones."""

import torch

from burnish.sampling.token_model import Decoded, Decoder


class Argmax(Decoder):
    """Takes no options."""

    def __init__(self, model):
        self.model = model

    def decode(self, prompt, prefix, goal, stream):
        model, (batch, length) = self.model, prompt.states.shape[:2]
        ids = torch.full((batch, model.length), model.mask_id, dtype=torch.long)
        seen = torch.ones(batch, model.length, length + model.length, dtype=torch.bool)
        seen[..., :length] = prompt.valid[:, None]
        ids = model.whole(prompt, ids, seen, model.empty(prompt)).argmax(-1)
        ids[:, : prefix.shape[1]] = prefix
        return Decoded(ids, passes=1, positions=length + model.length, unmasked=torch.ones_like(ids))
