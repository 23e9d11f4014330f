"""The objective `retrieve`: the head's losses (CrossVLA, arXiv:2605.21854) on a policy's own vision tower."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed, generator
from burnish.core.types import Batch, PolicyLoss
from burnish.data.loader import to_device
from burnish.methods.objective import OBJECTIVES, Extra, Objective, Run
from burnish.methods.retrieve.head import Head, Moments, all_ranks, one_rank, partner_frames
from burnish.methods.retrieve.options import make_config
from burnish.policies.base import Policy, require


@OBJECTIVES.register("retrieve")
class Retrieve(Objective):
    """Pulls the tower's views of one moment, and moments of one episode near in time, together.

    The head is trained and saved with the run and never exported; where the tower is frozen it learns alone.

    Args:
        preset: default or paper.
        **options: fields of options.RetrieveConfig; those of training alone (batch, frames, epochs, lr) are not read.
    """

    def __init__(self, preset: str = "default", **options: Any):
        super().__init__()
        self.config = make_config(preset, options)
        self._figures: dict[str, Tensor] = {}

    def cost(self, recipe: RecipeConfig, policy: Policy) -> Extra:
        """The partners in time, which go through the tower beside the batch."""
        return Extra(samples=recipe.train.batch_size if self.config.time_weight else 0)

    def setup(self, run: Run) -> None:
        config, data = self.config, run.data
        require(run.policy, "language", "retrieve")
        lacking = {key for source in getattr(data, "sources", ()) for key in source.absent}  # black pictures there
        self.keys = [key for key in data.cameras[: config.cameras or None] if key not in lacking]
        between = config.view_weight if len(self.keys) > 1 else 0.0
        rest = self.keys and (config.time_weight or config.sentence_weight or config.progress_weight)
        if not (between or rest):
            raise BurnishError("retrieve: no loss is left", "cameras that all data sets have: one, or two for the "
                               "loss between views")  # fmt: skip
        tasks, which = np.unique(data.task_index, return_inverse=True)
        self.texts, self.which = [data.tasks.get(int(task), "") for task in tasks], which
        # Episodes of several data sets have the same numbers; their first frames do not.
        self.episodes, self.times = data.starts, np.arange(len(data.starts)) - data.starts
        probe = torch.zeros(1, 3, *data.frames.arrays[self.keys[0]].shape[1:3], device=run.device)
        with torch.no_grad():
            width = run.policy.view_tokens(probe).shape[-1]
        self.head = Head(width, config, generator(run.recipe.train.seed, "retrieve")).to(run.device)

    def loss(self, run: Run, batch: Batch, out: PolicyLoss) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        frames = batch["index"].cpu().numpy()
        others = frames
        vectors = partners = self._vectors(run, batch)
        if self.config.time_weight:
            rng = np.random.default_rng(derive_seed(run.recipe.train.seed, "retrieve", run.number))
            others = partner_frames(rng, frames, run.data.starts[frames], run.data.ends[frames], self.config)
            seen = to_device(run.data.observations(others), run.device)
            # With draws of its own: the same shift and colours on both sides would give the partner away.
            partners = self._vectors(run, run.data.finish(seen, derive_seed("partners", run.number)))
        several = run.accelerator.num_processes > 1
        remaining = torch.from_numpy(run.data.ends[frames] - frames).to(run.device)
        terms = self.head.losses(
            vectors, partners, self._moments(run, frames), self._moments(run, others), remaining,
            torch.from_numpy(self.which[frames]).to(run.device), self.texts,
            gather=all_ranks if several else one_rank, rank=run.accelerator.process_index,
        )  # fmt: skip
        self._figures = {f"retrieve_{name}": term.detach() for name, term in terms.items()}
        self._figures["retrieve_temperature"] = 1 / self.head.scale.detach()
        return {"retrieve": self.config.weight * torch.stack(list(terms.values())).sum()}

    def _vectors(self, run: Run, batch: Batch) -> Tensor:
        """[B, V, width] of the present views of a batch."""
        views = [batch[key] if batch[key].ndim == 4 else batch[key][:, -1] for key in self.keys]
        means = [run.policy.view_tokens(view).float().mean(1) for view in views]
        features = torch.stack(means, 1)
        return self.head(F.layer_norm(features, features.shape[-1:]) if self.config.standardise else features)

    def _moments(self, run: Run, frames: np.ndarray) -> Moments:
        pair = (self.episodes[frames], self.times[frames])
        return Moments(*(torch.from_numpy(one.astype(np.int64)).to(run.device) for one in pair))

    def metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._figures.items()}
