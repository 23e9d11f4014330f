"""A policy without a language model: burnish's verbs over `sample_linear`."""

import torch

from burnish.core.types import Chunk, Draws, PolicyLoss
from burnish.policies.wrapper import PolicyWrapper
from sample_package import configuration_sample_linear  # noqa: F401  makes the type known to LeRobot


class Linear(PolicyWrapper):
    """It acts and trains; asked for language it says that it has none."""

    def loss(self, batch, draws=None):
        prepared = self._prepare(batch, batch["action"])
        errors = (self.policy.chunk(prepared) - prepared["action"]).square().mean(-1)
        valid = ~batch["action_is_pad"] if "action_is_pad" in batch else torch.ones_like(errors, dtype=torch.bool)
        total = (errors * valid).sum() / valid.sum().clamp_min(1)
        return PolicyLoss(total, (errors * valid).sum(1) / valid.sum(1).clamp_min(1), {"squared": total})

    @torch.no_grad()
    def act(self, batch, draws=None, prefix=None):
        return Chunk(self.postprocessor(self.policy.chunk(self._prepare(batch, None))))

    def draw(self, batch_size, generator):
        return Draws(torch.zeros(batch_size, self.chunk_size, self.action_dim), torch.ones(batch_size))
