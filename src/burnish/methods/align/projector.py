"""The projector between student and teacher: one small MLP for all pairs, pair i using a prefix of its hidden units.

Sun et al. 2026 (ROCKET, arXiv 2602.17951), Eq. 12 to 15. Two traps of the released code are avoided: independent
projectors have their full width, and so has the only projector of a single pair.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARING = ("shared", "trunk", "independent", "same_start")


def prefix_widths(
    count: int, hidden: int, low: float = 0.2, high: float = 1.0, *, truncate: bool = False, reverse: bool = False
) -> list[int]:
    """Hidden units that each of `count` pairs may use, shallow to deep (Eq. 13).

    Exact rational arithmetic: rounding errors of floats give 2049 of 2048 units for four pairs. A single pair gets
    the full width, where the formula as printed gives `low`.

    Args:
        low, high: share of the first and of the last pair.
        truncate: round down as the released code does, and give a single pair `low`; otherwise round up.
        reverse: shallow pairs get the most.

    Returns:
        N widths between 1 and `hidden`.
    """
    first, last = Fraction(str(low)), Fraction(str(high))
    if count == 1:
        shares = [first if truncate else last]
    else:
        shares = [first + (last - first) * i / (count - 1) for i in range(count)]
    rounded = [math.floor(share * hidden) if truncate else math.ceil(share * hidden) for share in shares]
    widths = [min(max(width, 1), hidden) for width in rounded]
    return widths[::-1] if reverse else widths


class Projector(nn.Module):
    """LayerNorm, linear, exact GELU, linear; `width` cuts the hidden units to a prefix.

    Args:
        student: width D_s of the student's states.
        teacher: width D_t of the teacher's features.
        norm: normalise the student's states first (the released code does, Eq. 12 does not).
        generator: draws the weights (Xavier uniform; biases are zero).
    """

    def __init__(self, student: int, hidden: int, teacher: int, norm: bool, generator: torch.Generator):
        super().__init__()
        self.norm = nn.LayerNorm(student) if norm else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(student, hidden), nn.Linear(hidden, teacher)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden_BTD: Tensor, width: int | None = None, fc2: nn.Linear | None = None) -> Tensor:
        """[B, T, D_s] to [B, T, D_t] with the first `width` hidden units (None: all) and the output layer `fc2`."""
        fc1, fc2 = self.fc1, fc2 or self.fc2
        inner = F.gelu(F.linear(self.norm(hidden_BTD), fc1.weight[:width], fc1.bias[:width]))
        return F.linear(inner, fc2.weight[:, :width], fc2.bias)


class Projectors(nn.Module):
    """The projectors of all pairs, under one of four ways of sharing.

    Args:
        student: width D_s of the student's states.
        teacher: width D_t for each pair; all equal where the output layer is shared.
        widths: hidden units of each pair, see `prefix_widths`.
        sharing: "shared" one for all; "trunk" first layer shared, output layer of its own for each pair;
            "independent" one each; "same_start" one each, starting from equal weights.
    """

    def __init__(
        self, student: int, teacher: Sequence[int], hidden: int, widths: Sequence[int], sharing: str, norm: bool,
        generator: torch.Generator,
    ):  # fmt: skip
        super().__init__()
        self.widths, self.sharing = list(widths), sharing
        first = Projector(student, hidden, teacher[0], norm, generator)
        members = [first]
        for width in teacher[1:] if sharing != "shared" else ():
            member = Projector(student, hidden, width, norm, generator)
            if sharing == "trunk":
                del member.norm, member.fc1
            elif sharing == "same_start":
                member.load_state_dict(first.state_dict())
            members.append(member)
        self.members = nn.ModuleList([nn.ModuleList(members)])  # stored checkpoints name them members.0.<pair>

    def forward(self, pair: int, hidden_BTD: Tensor) -> Tensor:
        """Student states [B, T, D_s] of one pair as the teacher's features [B, T, D_t]."""
        members, width = self.members[0], self.widths[pair]
        if self.sharing == "trunk":
            return members[0](hidden_BTD, width, members[pair].fc2)
        return members[0 if self.sharing == "shared" else pair](hidden_BTD, width)

    def similarity(self) -> Tensor:
        """Mean cosine of the flattened weights of different projectors (of equal shape); 1 where one is shared.

        Near zero says nothing about training: it is what two random vectors of this length have from the start.
        """
        members = self.members[0]
        layers = [[m.fc2.weight for m in members]]
        if self.sharing != "trunk":
            layers.append([m.fc1.weight for m in members])
        comparable = [row for row in layers if len({weight.shape for weight in row}) == 1]
        if len(members) < 2 or not comparable:
            return torch.ones((), device=members[0].fc1.weight.device)
        flat = torch.cat([torch.stack([weight.detach().flatten() for weight in row]) for row in comparable], 1)
        flat = F.normalize(flat, dim=1)
        count = len(flat)
        return ((flat @ flat.T).sum() - count) / (count * (count - 1))
