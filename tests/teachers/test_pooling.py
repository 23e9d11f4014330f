"""Pooling a teacher's grid to the student's, and the positional term."""

import math

import pytest
import torch

from burnish.core.seeding import generator
from burnish.teachers.placing import pool_grid, positional_term


@pytest.mark.parametrize("pooling", ["area", "bilinear"])
def test_a_constant_field_stays_and_places_are_kept(pooling):
    constant = torch.full((2, 1, 37, 37, 3), 0.7)
    torch.testing.assert_close(pool_grid(constant, (16, 16), pooling), torch.full((2, 1, 16, 16, 3), 0.7))

    # A teacher that holds its place in the image, and a student that does too: nearest places must match.
    def places(side):
        line = (torch.arange(side) + 0.5) / side
        return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)

    pooled = pool_grid(places(37)[None], (16, 16), pooling)[0].flatten(0, 1)
    nearest = torch.cdist(pooled, places(16).flatten(0, 1)).argmin(1)
    assert torch.equal(nearest, torch.arange(256))


def test_bilinear_keeps_a_ramp_and_its_corners():
    ramp = torch.linspace(-1, 2, 37)[:, None].expand(37, 37)[..., None]
    pooled = pool_grid(ramp[None], (16, 16), "bilinear")[0, :, :, 0]
    torch.testing.assert_close(pooled, torch.linspace(-1, 2, 16)[:, None].expand(16, 16), atol=1e-5, rtol=1e-5)


def test_area_is_the_mean_of_what_a_token_covers():
    fine = torch.randn(1, 8, 8, 3, generator=generator("area"))
    by_hand = torch.stack(
        [fine[0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1)) for r in range(4) for c in range(4)]
    )
    torch.testing.assert_close(pool_grid(fine, (4, 4), "area")[0].flatten(0, 1), by_hand)


def test_the_positional_term_is_that_of_the_released_codes():
    """Written out from VGGT's grid and embedding, channel by channel; its size is a third of ours once."""
    height, width, channels, aspect = 5, 7, 16, 640 / 480
    term = positional_term((height, width), channels, aspect)
    diagonal = math.hypot(aspect, 1)
    for r in range(height):
        for c in range(width):
            x = aspect / diagonal * (width - 1) / width * (2 * c / (width - 1) - 1)
            y = 1 / diagonal * (height - 1) / height * (2 * r / (height - 1) - 1)
            expected = []
            for place in (x, y):
                angles = [place / 100 ** (i / 4) for i in range(4)]
                expected += [*map(math.sin, angles), *map(math.cos, angles)]
            assert term[r, c].tolist() == pytest.approx(expected, abs=1e-6)
    square = positional_term((37, 37), 2048)
    assert square.flatten(0, 1).std(0).mean() == pytest.approx(0.0473, abs=0.0005)  # not 0.156


def test_positional_term_tells_every_place():
    term = positional_term((5, 7), 16)
    assert term.shape == (5, 7, 16) and term.abs().max() <= 1
    flat = term.flatten(0, 1)
    assert torch.pdist(flat).min() > 1e-3
    # columns in the first half, rows in the second
    assert torch.equal(term[0, :, :8], term[4, :, :8]) and torch.equal(term[:, 0, 8:], term[:, 6, 8:])
