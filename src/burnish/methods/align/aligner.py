"""Student states of several layers against teacher tokens: projectors, pairs, masks. Knows no run and no policy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.methods.align.layers import Pairs
from burnish.methods.align.loss import alignment_loss
from burnish.methods.align.options import AlignConfig
from burnish.methods.align.projector import Projectors, prefix_widths
from burnish.policies.base import Captured
from burnish.teachers.placing import Placement


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
