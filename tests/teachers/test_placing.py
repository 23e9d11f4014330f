"""A teacher's tokens lie over the student's where the policy pads its views, whatever the sizes and grids."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.core.seeding import generator
from burnish.policies import load_policy
from burnish.teachers.placing import Placement, place, pool_grid
from workshop.tiny import make_tiny

SIZES = [(480, 640), (640, 480), (32, 32), (90, 31)]


@pytest.fixture(scope="module", params=["smolvla", "pi0", "pi05", "burnish_discrete"])
def policy(request, tmp_path_factory):
    return load_policy(make_tiny(request.param, tmp_path_factory.mktemp("placing") / "policy"))


def smooth(size):
    """A view [1, 3, H, W] that changes slowly, with no black in it."""
    coarse = torch.rand(1, 3, 4, 4, generator=generator("smooth", *size)) * 0.8 + 0.2
    return F.interpolate(coarse, size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_teacher_sees_the_picture_that_the_policy_sees(policy, size):
    view, mask = smooth(size), policy.view_mask(size)
    placement = Placement.of(mask)
    ratio = max(size[1] / mask.shape[1], size[0] / mask.shape[0])
    assert mask.sum() == int(size[0] / ratio) * int(size[1] / ratio) == placement.height * placement.width
    (picture, *_), _ = policy.prepare_images({"observation.images.top": view})
    seen = F.interpolate(place([view], [placement])[:, 0], tuple(mask.shape), mode="bilinear", antialias=True)
    inner = -F.max_pool2d(-mask[None, None].float(), 3, 1, 1)[0, 0] > 0  # at the edge of the padding both blur
    a, b = picture[0][:, inner], seen[0][:, inner]
    # The vision tower's own scale of colours is left out of the comparison: one straight line for each colour.
    for one, other in zip(a, b, strict=True):
        gap = (one - one.mean()) / one.std() - (other - other.mean()) / other.std()
        assert gap.abs().max() < 0.25
    outer = F.max_pool2d(mask[None, None].float(), 3, 1, 1)[0, 0] == 0
    assert (seen[0][:, outer] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(20, 700), st.integers(20, 700)), st.integers(24, 224), st.integers(2, 16), st.integers(2, 40),
    st.sampled_from(["left and top", "both sides"]),
)  # fmt: skip
def test_every_teacher_grid_meets_the_students(size, side, student, teacher, kind):
    """A teacher whose tokens say where they are in the view, pooled: what a student's token says that sees the same."""
    ratio = max(size) / side
    height, width = max(1, int(size[0] / ratio)), max(1, int(size[1] / ratio))
    top, left = (side - height, side - width) if kind == "left and top" else ((side - height) // 2, (side - width) // 2)
    placement = Placement(side, side, top, left, height, width)
    rows = torch.linspace(0, 1, size[0])[:, None].expand(size)
    columns = torch.linspace(0, 1, size[1])[None].expand(size)
    view = torch.stack([rows, columns])[None]
    padded = place([view], [placement], repeat=True)[0, 0]
    assert tuple(padded.shape[1:]) == placement.padded_size(size)
    grid = pool_grid(F.adaptive_avg_pool2d(padded, (teacher, teacher)).movedim(0, -1), (student, student), "area")
    shown = placement.tokens((student, student))
    centres = (torch.arange(student) + 0.5) * side / student
    wanted = torch.stack(torch.meshgrid((centres - top) / height, (centres - left) / width, indexing="ij"), -1)
    inside = shown & (wanted > 0).all(-1) & (wanted < 1).all(-1)
    pixel = max(1 / height, 1 / width) + max(1 / size[0], 1 / size[1])
    token = side / min(student, teacher) / min(height, width)
    assert shown.any()
    gap = (grid - wanted)[inside].abs()
    assert gap.numel() == 0 or gap.max() < token + pixel


def test_tokens_of_the_padding_are_masked():
    smolvla = Placement(512, 512, 128, 0, 384, 512)  # 480x640, padded at the top
    assert torch.equal(smolvla.tokens((8, 8)).any(1), torch.tensor([False] * 2 + [True] * 6))
    pi = Placement(224, 224, 28, 0, 168, 224)  # and on both sides
    assert torch.equal(pi.tokens((16, 16)).all(1), torch.tensor([False] * 2 + [True] * 12 + [False] * 2))
    assert pi.bounds((16, 16)) == (2, 13, 0, 15)
    assert smolvla.padding((480, 640)) == (0, 0, 160, 0) and pi.padding((480, 640)) == (0, 0, 80, 80)
    thin = Placement(64, 64, 31, 0, 2, 64)  # no token of four is half covered
    assert torch.equal(thin.tokens((2, 2)), torch.ones(2, 2, dtype=torch.bool))
    assert Placement.whole((30, 40)).padding((30, 40)) == (0, 0, 0, 0)
    assert Placement(*smolvla.numbers()) == smolvla
    with pytest.raises(BurnishError, match="shows nothing of the view"):
        Placement.of(torch.zeros(4, 4, dtype=torch.bool))


def test_views_of_several_sizes_come_to_one():
    views = [smooth((48, 64)), smooth((24, 24))]
    placements = [Placement(32, 32, 8, 0, 24, 32), Placement.whole((24, 24))]
    both = place(views, placements)
    assert both.shape == (1, 2, 3, 64, 64)
    assert torch.equal(both[0, 0, :, 16:], views[0][0]) and (both[0, 0, :, :16] == 0).all()
    depth = place([v[:, :1] for v in views], placements, repeat=True)
    assert torch.equal(depth[0, 0, :, :16], views[0][0, :1, :1].expand(-1, 16, -1))
