"""The few types that every room shares.

Shape legend, used as suffixes (`actions_BTA`): B batch, T steps of a chunk, A action dimension, S tokens,
D width, L layers, V views, H and W image height and width, N rows of a dataset.

Flow time: t = 1 is noise, t = 0 is data. A batch is a dict with LeRobot's keys, in environment units:

    observation.images.<camera>   float [B, 3, H, W] in [0, 1]
    observation.state             float [B, state_dim]
    action                        float [B, T, A]           (training only)
    action_is_pad                 bool  [B, T]              (training only)
    task                          list of B instructions

Policies normalise inside their verbs, so nobody else ever sees a normalised action.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

Batch = dict[str, Tensor | list[str]]


@dataclass(frozen=True)
class Draws:
    """The randomness of one policy forward, owned by the caller so that two forwards can share it.

    Args:
        noise: [B, T, A_model] standard normal; A_model is the policy's padded action width.
        time: [B] flow time in (0, 1]; 1 is noise.
        masks: bool [B, L], action tokens that a token policy does not see in `loss`; None for other policies.
        learned: bool [B, L], those that count in its loss.
        delay: long [B], steps of a chunk that a flow-matching policy is shown as they are; None for plain training.
    """

    noise: Tensor
    time: Tensor
    masks: Tensor | None = None
    learned: Tensor | None = None
    delay: Tensor | None = None

    def to(self, device: torch.device | str) -> "Draws":
        """All of them on a device."""
        moved = (None if part is None else part.to(device) for part in (self.masks, self.learned, self.delay))
        return Draws(self.noise.to(device), self.time.to(device), *moved)


@dataclass(frozen=True)
class Window:
    """What a policy is trained on around a moment, in control steps relative to it.

    Args:
        observations: those that it sees, oldest first, the present (0) last. Where there are several, its images are
            [B, n, 3, H, W] and its states [B, n, D]; before an episode's start the first one is repeated.
        first_action: of the first action of a chunk; below 0 where the policy also predicts what was done before.
        drop_last: frames at the end of an episode that no batch starts from.
    """

    observations: tuple[int, ...] = (0,)
    first_action: int = 0
    drop_last: int = 0

    @property
    def reach(self) -> int:
        """How many control steps back it sees."""
        return -min(self.observations)


@dataclass
class PolicyLoss:
    """What `Policy.loss` returns: `total` is a scalar with gradient, `per_sample` is [B]."""

    total: Tensor
    per_sample: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LanguageLoss:
    """What `Policy.language` returns: next-token losses on the answers.

    Args:
        per_token: [B, S] cross-entropy in nats, zero where `mask` is False.
        mask: [B, S] True on answer tokens.
    """

    per_token: Tensor
    mask: Tensor

    @property
    def mean(self) -> Tensor:
        """Scalar: mean over all answer tokens."""
        return self.per_token.sum() / self.mask.sum().clamp_min(1)


@dataclass(frozen=True)
class Chunk:
    """Actions [B, T, A] in environment units; index 0 is to be executed first.

    `raw` are those of a flow-matching policy in the model's own space, [B, T, A_model], for a later `Steering`.
    `tokens` are those of a token policy, long [B, L], MASK where none was needed, for a later `carry`.
    """

    actions: Tensor
    raw: Tensor | None = None
    tokens: Tensor | None = None
