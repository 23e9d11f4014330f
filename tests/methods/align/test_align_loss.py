"""The loss, masks, and token grids that must lie over one another (specification 4.1, numbers 1, 2, 8 and 9)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.seeding import generator
from burnish.data.augment import shift_by
from burnish.methods.align.aligner import alignment_loss, shift_grid

ALL = torch.ones(2, 5, dtype=torch.bool)


def tokens(seed=0, width=6):
    return torch.randn(2, 5, width, generator=generator("loss", seed))


def test_is_one_minus_the_mean_cosine_between_zero_and_two():
    h, y = tokens(1), tokens(2)
    by_hand = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(h.flatten(0, 1), y.flatten(0, 1), strict=True)]
    assert alignment_loss(h, y, ALL).item() == pytest.approx(sum(by_hand) / 10, abs=1e-6)
    assert alignment_loss(3.7 * y, y, ALL).item() == pytest.approx(0, abs=1e-6)
    assert alignment_loss(-0.2 * y, y, ALL).item() == pytest.approx(2, abs=1e-6)


@given(st.integers(0, 99))
def test_scaling_a_teacher_token_changes_nothing(seed):
    scale = torch.rand(2, 5, 1, generator=generator("scale", seed)) * 9 + 0.1
    a, b = alignment_loss(tokens(1), tokens(2), ALL), alignment_loss(tokens(1), tokens(2) * scale, ALL)
    assert a.item() == pytest.approx(b.item(), abs=1e-5)


def test_masked_tokens_count_nothing_even_when_they_are_not_numbers():
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
    h, y = tokens(1).requires_grad_(), tokens(2)
    broken = torch.where(mask[..., None], y, torch.nan)
    loss = alignment_loss(h, broken, mask)
    loss.backward()
    compact = alignment_loss(tokens(1)[mask][None], y[mask][None], torch.ones(1, 5, dtype=torch.bool))
    assert loss.item() == pytest.approx(compact.item(), abs=1e-6)
    assert (h.grad[~mask] == 0).all() and (h.grad[mask] != 0).any()


def test_nothing_valid_gives_zero():
    h = tokens(1).requires_grad_()
    loss = alignment_loss(h, tokens(2), torch.zeros_like(ALL))
    loss.backward()
    assert loss.item() == 0 and (h.grad == 0).all()


def test_tokens_move_as_the_pixels_do():
    """Whole tokens exactly; and every move in between lies on the line between two tokens."""
    side, pixels = 6, 4
    grid = torch.randn(3, side, side, 2, generator=generator("move"))
    image = (
        (grid[..., :1] * 50 + 128)
        .byte()
        .repeat_interleave(pixels, 1)
        .repeat_interleave(pixels, 2)
        .expand(-1, -1, -1, 3)
    )
    offsets = torch.tensor([[pixels, -pixels], [0, 2 * pixels], [-pixels, 0]])
    moved_image = shift_by(image.contiguous(), offsets)[:, ::pixels, ::pixels, :1]
    moved_grid = shift_grid((grid[..., :1] * 50 + 128).byte().float(), offsets / pixels)
    assert torch.equal(moved_image.float(), moved_grid)
    half = shift_grid(grid, torch.tensor([[0.5, 0.0]] * 3))
    torch.testing.assert_close(half[:, :-1], (grid[:, :-1] + grid[:, 1:]) / 2)
    torch.testing.assert_close(half[:, -1], grid[:, -1])
    assert torch.equal(shift_grid(grid, torch.zeros(3, 2)), grid)


def test_a_padded_view_moves_inside_its_padding():
    """Rows 1 to 3 and columns 0 to 2 show the view: they read one another and never the padding."""
    grid = torch.full((2, 5, 4, 1), 1e6)
    grid[:, 1:4, :3] = torch.arange(9.0).view(1, 3, 3, 1)
    moved = shift_grid(grid, torch.tensor([[1.0, 0.0], [-0.5, 2.0]]), (1, 3, 0, 2))[..., 0]
    assert moved[0, 1:4, :3].tolist() == [[3, 4, 5], [6, 7, 8], [6, 7, 8]]
    assert moved[1, 1:4, :3].tolist() == [[2, 2, 2], [3.5] * 3, [6.5] * 3]
