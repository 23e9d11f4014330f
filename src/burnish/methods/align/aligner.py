"""Student states of several layers against teacher tokens: losses, projectors, masks. Knows no run and no policy.

The projector is one small MLP for all pairs, pair i using a prefix of its hidden units (Sun et al. 2026, ROCKET, arXiv
2602.17951, Eq. 12 to 15). Two traps of the released code are avoided: independent projectors have their full width, and
so has the only projector of a single pair.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.methods.align.layers import Pairs
from burnish.methods.align.options import AlignConfig
from burnish.policies.base import Captured
from burnish.teachers.placing import Placement


def alignment_loss(predicted_BTD: Tensor, target_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """1 minus the mean cosine over valid tokens, in float32; zero where no token is valid.

    Args:
        predicted_BTD: projected student states [B, T, D].
        target_BTD: teacher features [B, T, D].
        mask_BT: bool [B, T], False on tokens of absent cameras.
    """
    # A masked target may be NaN, and NaN times a zero gradient is NaN: it must not enter the cosine at all.
    target_BTD = target_BTD.float().masked_fill(~mask_BT[..., None], 0.0)
    cosine_BT = F.cosine_similarity(predicted_BTD.float(), target_BTD, dim=-1)
    return ((1 - cosine_BT) * mask_BT).sum() / mask_BT.sum().clamp_min(1)


def shift_grid(features_BHWD: Tensor, offsets_B2: Tensor, bounds: tuple[int, int, int, int] | None = None) -> Tensor:
    """Move token grids as the student's images were moved: place (r, c) reads place (r + rows, c + columns).

    Between tokens it is linear, at the border the outermost token is repeated.

    Args:
        features_BHWD: [B, H, W, D].
        offsets_B2: rows and columns in units of tokens, float [B, 2].
        bounds: first and last row, first and last column of the view, where it is padded; the padding does not move.
    """

    def weights(size: int, offset_B: Tensor, first: int, last: int) -> Tensor:
        """[B, size, size]: row r holds the two weights that read position r + offset."""
        place = torch.arange(size, device=offset_B.device)
        wanted = (place + offset_B[:, None]).clamp(first, last)
        return (1 - (wanted[:, :, None] - place).abs()).clamp_min(0)

    height, width = features_BHWD.shape[1:3]
    top, bottom, left, right = bounds or (0, height - 1, 0, width - 1)
    offsets = offsets_B2.to(features_BHWD)
    moved = torch.einsum("brh,bhwd->brwd", weights(height, offsets[:, 0], top, bottom), features_BHWD)
    return torch.einsum("bcw,brwd->brcd", weights(width, offsets[:, 1], left, right), moved)


def pairwise_cosine(gradients: list[Tensor]) -> Tensor:
    """[N, N] cosines of N gradients of equal shape; a zero gradient has cosine 0 with everything."""
    flat = torch.stack([g.detach().flatten().float() for g in gradients])
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return unit @ unit.T


def coherence(gradients: list[Tensor]) -> Tensor:
    """|sum of g| / sum of |g|: 1 all one way, 1 / sqrt(N) orthogonal, below that in conflict."""
    flat = torch.stack([g.detach().flatten().float() for g in gradients])
    return flat.sum(0).norm() / flat.norm(dim=1).sum().clamp_min(torch.finfo(flat.dtype).tiny)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two gradients of equal shape, 0 where one is zero."""
    return pairwise_cosine([a, b])[0, 1]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor  # not saved: it may still be set before the gradient comes
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor.to(grad), None


def scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """`value` itself, whose gradient is multiplied by what `factor`, a scalar tensor, holds when the gradient comes."""
    return _Scale.apply(value, factor)


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


class Aligner(nn.Module):
    """The alignment losses of all pairs.

    Args:
        pairs: (student layer, teacher layer), ascending.
        student_width: D_s.
        teacher_widths: D_t of every teacher layer.
        cameras: views, in the order of the targets.
        shown: bool [V, h, w], tokens that show their view and no padding.
        generator: draws the projectors' weights.
    """

    def __init__(
        self, config: AlignConfig, pairs: Pairs, student_width: int, teacher_widths: Sequence[int],
        cameras: Sequence[str], shown: Tensor, generator: torch.Generator,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("shown", shown.flatten(), persistent=False)
        self.pairs, self.cameras, self.late_tokens = pairs, tuple(cameras), config.late_tokens
        outputs = [teacher_widths[t] for _, t in pairs]
        if config.sharing == "shared" and len(set(outputs)) > 1:
            raise BurnishError(f"align: teacher layers of widths {outputs} under one shared projector", "equal widths",
                               "sharing: trunk")  # fmt: skip
        hidden = config.hidden or max(student_width, *outputs)
        share_first = config.sharing in ("shared", "trunk")
        if config.released_widths and not share_first:
            # Each projector is built for one pair, whose width by the code's formula is the lowest share.
            widths = prefix_widths(1, hidden, config.nested_low, truncate=True) * len(pairs)
        elif config.nested and share_first:
            widths = prefix_widths(
                len(pairs), hidden, config.nested_low, config.nested_high, truncate=config.released_widths,
                reverse=config.nested_reverse,
            )  # fmt: skip
        else:
            widths = [hidden] * len(pairs)
        given = config.pair_weights or [1.0] * len(pairs)
        if len(given) != len(pairs) or min(given) < 0 or not sum(given):
            raise BurnishError(f"align: pair_weights {given}", f"{len(pairs)} numbers from 0 on, not all 0")
        self.shares = [value / sum(given) for value in given]
        self.projectors = Projectors(student_width, outputs, hidden, widths, config.sharing, config.norm, generator)

    def tokens(self, hidden_BSD: Tensor, captured: Captured) -> Tensor:
        """[B, V * T, D]: the rows of the image tokens of all views, in the order of `cameras`."""
        late, rows = self.late_tokens, [captured.cameras[camera] for camera in self.cameras]
        return torch.cat([hidden_BSD[:, r.start + late : r.stop + late] for r in rows], 1)

    def mask(self, captured: Captured) -> Tensor:
        """bool [B, V * T]: False on the tokens of cameras that are absent, and on those of padding."""
        present = torch.cat([captured.layout["image"][:, captured.cameras[camera]] for camera in self.cameras], 1)
        if present.shape[1] != len(self.shown):
            raise BurnishError(f"align: {present.shape[1]} student tokens but {len(self.shown)} of the teacher",
                               "equal grids")  # fmt: skip
        return present & self.shown

    def forward(self, captured: Captured, targets: dict[int, Tensor]) -> list[Tensor]:
        """The loss of each pair, a scalar with gradient.

        Args:
            captured: a forward's states at all student layers.
            targets: {teacher layer: [B, V, h, w, D_t]}.
        """
        mask_BT, losses = self.mask(captured), []
        for pair, (student, teacher) in enumerate(self.pairs):
            target_BTD = targets[teacher].flatten(1, 3)
            states_BTD = self.tokens(captured.hidden[student], captured)
            if states_BTD.shape[:2] != target_BTD.shape[:2]:
                raise BurnishError(
                    f"align: {states_BTD.shape[1]} student tokens but {target_BTD.shape[1]} of the teacher",
                    "equal grids",
                )
            losses.append(alignment_loss(self.projectors(pair, states_BTD), target_BTD, mask_BT))
        return losses

    def total(self, losses: list[Tensor]) -> Tensor:
        return sum(share * loss for share, loss in zip(self.shares, losses, strict=True))


def token_grid(captured: Captured, cameras: Sequence[str], placements: Sequence[Placement] = ()) -> tuple[int, int]:
    """The token grid of a policy's views: the shape of its pictures, and equal for all.

    Args:
        placements: of each view; none means square pictures.
    """
    counts = {camera: captured.cameras[camera].stop - captured.cameras[camera].start for camera in cameras}
    grids = set()
    for v, count in enumerate(counts.values()):
        height, width = (placements[v].picture_height, placements[v].picture_width) if placements else (1, 1)
        rows = max(1, round((count * height / width) ** 0.5))
        columns = count // rows
        fits = rows * columns == count and abs(rows * width - columns * height) < max(height, width)
        grids.add((rows, columns) if fits else (0, 0))
    if len(grids) != 1 or (0, 0) in grids:
        raise BurnishError(f"align: views with {counts} tokens",
                           "one grid for all views, of the shape of their pictures")  # fmt: skip
    return grids.pop()
