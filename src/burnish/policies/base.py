"""The four verbs that every policy speaks, and `capture`. No method may reach round them into a model."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from burnish.core.types import Batch, Chunk, Draws, LanguageLoss, PolicyLoss


@dataclass
class Captured:
    """Hidden states of the forward that ran inside `capture`.

    Args:
        hidden: layer index to [B, S, D], the output of that backbone layer (0 is the first layer's output).
        rows: token layout of S: "image", "text", "state" to a bool [B, S] (padding False everywhere).
        cameras: camera name to the slice of S that holds its image tokens.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    cameras: dict[str, slice] = field(default_factory=dict)


class Policy(nn.Module, ABC):
    """A policy as the rest of burnish sees it.

    Batches are in environment units with raw instructions (see core.types); a policy normalises and tokenises
    inside its verbs.

    Attributes:
        cameras: names of its cameras.
        chunk_size: T, actions in a chunk.
        n_action_steps: actions of a chunk to execute before asking again.
        image_size: side of the images it was trained on, in pixels.
        action_dim: A.
        num_layers: layers of the backbone.
    """

    cameras: tuple[str, ...]
    chunk_size: int
    n_action_steps: int
    image_size: int
    action_dim: int
    num_layers: int

    @abstractmethod
    def loss(self, batch: Batch, draws: Draws | None = None) -> PolicyLoss:
        """Imitation loss of one forward; without `draws` they are drawn by `draw` with the module's generator."""

    @abstractmethod
    def score(self, batch: Batch, actions: Tensor, draws: Draws) -> Tensor:
        """[B] log-probability of `actions` [B, T, A] or its surrogate (higher is likelier), with gradient."""

    def scores(self, batch: Batch, candidates: Tensor, draws: Draws) -> Tensor:
        """`score` of several chunks for each observation, on several draws, kept apart: [B, C, K], with gradient.

        This one asks `score` C times K times; a policy that can encode the observation once does so instead.

        Args:
            batch: as for `score`; "action_is_pad", where present, is bool [B, C, T].
            candidates: [B, C, T, A] chunks in environment units.
            draws: noise [B, K, ...] and time [B, K], shared by the C candidates; or [B, C, K, ...] and [B, C, K].
        """
        own = draws.time.ndim == 3

        def one(c: int, k: int) -> Tensor:
            at = (slice(None), c, k) if own else (slice(None), k)
            padded = {"action_is_pad": batch["action_is_pad"][:, c]} if "action_is_pad" in batch else {}
            return self.score({**batch, **padded}, candidates[:, c], Draws(draws.noise[at], draws.time[at]))

        columns = [[one(c, k) for k in range(draws.time.shape[-1])] for c in range(candidates.shape[1])]
        return torch.stack([torch.stack(column, dim=1) for column in columns], dim=1)

    @abstractmethod
    def act(self, batch: Batch, draws: Draws | None = None, prefix: Tensor | None = None) -> Chunk:
        """Sample a chunk, without gradient; `prefix` [B, P, A] are committed actions it must continue."""

    @abstractmethod
    def language(self, batch: Batch) -> LanguageLoss:
        """Answer loss of the very backbone that acts.

        The batch holds "observation.images.<camera>" (one image) [B, 3, H, W] and lists "question", "answer".
        """

    @abstractmethod
    def answer(self, batch: Batch, max_new_tokens: int = 8) -> list[str]:
        """Greedy answers to `batch["question"]`."""

    @abstractmethod
    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Noise and time for `batch_size` samples, on the generator's device."""

    @abstractmethod
    def capture(self, layers: Sequence[int]) -> AbstractContextManager[Captured]:
        """Hand out hidden states of the backbone for the forward that runs inside."""

    @abstractmethod
    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that hold the VLM's knowledge: vision tower, connector, language model."""

    @abstractmethod
    def save(self, folder: Path, *, home: Path | None = None) -> None:
        """Write an ordinary LeRobot policy folder (config.json, model.safetensors, processors).

        `home` is where the folder will lie in the end, when it is written elsewhere and renamed.
        """
