"""The teacher's tokens for a batch: kept and computed ones agree, and move as the student's images do."""

import pytest
import torch
from feature_fakes import SPEC, make_data, make_key

from burnish.core.errors import BurnishError
from burnish.methods.align.targets import LiveTargets, make_targets
from burnish.teachers.base import make_teacher


@pytest.fixture(scope="module")
def data(dataset):
    return make_data(dataset)


@pytest.fixture
def key(data, edges):
    return make_key(data)


def test_live_and_kept_targets_agree_without_augmentation(tmp_path, key, data):
    teacher = make_teacher(SPEC, (2, 2))
    kept = make_targets(SPEC, teacher, key, data, cache=str(tmp_path / "c"), device=torch.device("cpu"), progress=False)
    live = make_targets(SPEC, teacher, key, data, cache="off", device=torch.device("cpu"))
    assert isinstance(live, LiveTargets)
    batch = data.raw(0)
    for camera in data.cameras:
        batch[camera] = batch[camera].permute(0, 3, 1, 2).float() / 255
    for layer in key.layers:
        torch.testing.assert_close(kept(batch)[layer], live(batch)[layer], atol=4e-3, rtol=4e-3)


def test_live_values_are_checked_once_and_not_at_every_step(key, data, monkeypatch):
    """The check waits for a GPU."""
    import edges

    live = make_targets(SPEC, make_teacher(SPEC, (2, 2)), key, data, cache="off", device=torch.device("cpu"))
    batch = data.finish(data.raw(0), 0)
    checks, original = [], torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda x: checks.append(x) or original(x))
    for _ in range(3):
        live(batch)
    assert len(checks) == len(key.layers)
    broken = make_targets(SPEC, make_teacher(SPEC, (2, 2)), key, data, cache="off", device=torch.device("cpu"))
    monkeypatch.setattr(
        edges.Edges, "features",
        lambda self, views, layers: {t: torch.full((*views.images.shape[:2], 4, 4, 12), torch.nan) for t in layers},
    )  # fmt: skip
    with pytest.raises(BurnishError, match="not finite at layer 0"):
        broken(batch)


def test_the_students_shift_reaches_the_kept_targets(tmp_path, key, data):
    """A batch that the loader shifted gets the grid moved by as many tokens."""
    teacher = make_teacher(SPEC, (2, 2))
    kept = make_targets(SPEC, teacher, key, data, cache=str(tmp_path / "c"), device=torch.device("cpu"), progress=False)
    batch = data.finish(data.raw(0), 0)
    assert batch["shift.front"].abs().max() > 0
    still = kept({**batch, "shift.front": torch.zeros_like(batch["shift.front"])})
    rows = batch["shift.front"][:, :1].float() * 2 / 32  # tokens
    columns = batch["shift.front"][:, 1:].float() * 2 / 32
    for layer in key.layers:
        grid = still[layer][:, 0]
        # Two tokens a side: a move of s tokens mixes a share |s| of the neighbour in, if there is one that way.
        down, right = (rows.clamp(0, 1), rows.clamp(-1, 0).abs()), (columns.clamp(0, 1), columns.clamp(-1, 0).abs())
        upper, lower = grid[:, 0], grid[:, 1]
        vertical = torch.stack(
            [upper + down[0][..., None] * (lower - upper), lower + down[1][..., None] * (upper - lower)], 1
        )
        left, beside = vertical[:, :, 0], vertical[:, :, 1]
        moved = torch.stack(
            [left + right[0][..., None] * (beside - left), beside + right[1][..., None] * (left - beside)], 2
        )
        torch.testing.assert_close(kept(batch)[layer][:, 0], moved, atol=1e-5, rtol=1e-5)
