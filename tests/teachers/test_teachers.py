"""Teachers: exact geometry, a user's folder, VGGT's pre-processing, the trained one, and what a wrong one is told."""

import json
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from burnish.core.errors import BurnishError
from burnish.core.seeding import generator
from burnish.teachers.base import Teacher, Views, make_teacher, run_teacher
from burnish.teachers.geometry import GeometryTeacher, normals, patchify
from burnish.teachers.placing import pool_grid
from burnish.teachers.scene3d import DEFAULTS, SceneNet


def views(batch=2, cameras=2, side=24):
    images = torch.rand(batch, cameras, 3, side, side, generator=generator("views"))
    return Views(images, torch.ones(batch, cameras, dtype=torch.bool), ("front", "side")[:cameras])


def tilted_plane(side=24, slope=(0.3, -0.2)):
    """World points of z = slope . (x, y) seen from above, and their depth."""
    line = torch.linspace(-0.2, 0.2, side)
    x, y = line.expand(side, side), -line[:, None].expand(side, side)
    points = torch.stack([x, y, slope[0] * x + slope[1] * y], -1)
    return points, 1 - points[..., 2]


def test_normals_of_a_plane():
    points, _ = tilted_plane()
    expected = nn.functional.normalize(torch.tensor([-0.3, 0.2, 1.0]), dim=0)
    found = normals(points.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    torch.testing.assert_close(found, expected.expand(24, 24, 3), atol=1e-5, rtol=1e-4)


def test_patches_hold_their_own_places_in_order():
    rows = torch.arange(24.0)[:, None].expand(24, 24) * 100 + torch.arange(24.0)
    tokens = patchify(rows[None, None], (3, 3))[0]
    assert tokens.shape == (3, 3, 16)
    block = rows[8:16, 16:24]
    cells = block.reshape(4, 2, 4, 2).mean((1, 3)).flatten()
    torch.testing.assert_close(tokens[1, 2], cells)


def test_geometry_layers_are_depth_normals_points():
    points, depth = tilted_plane()
    seen = views(1, 1)
    seen.points, seen.depth = points[None, None], depth[None, None]
    found = run_teacher(GeometryTeacher((4, 4)), seen, [0, 1, 2])
    assert {layer: tuple(f.shape) for layer, f in found.items()} == {layer: (1, 1, 4, 4, 48) for layer in range(3)}
    token = found[2][0, 0, 0, 0].reshape(3, 16)
    torch.testing.assert_close(token.mean(1), points[:6, :6].mean((0, 1)), atol=1e-5, rtol=1e-4)
    assert found[0][0, 0, 0, 0, :16].mean() == pytest.approx(float(depth[:6, :6].mean()), abs=1e-5)
    with pytest.raises(BurnishError, match="no depth to look at"):
        GeometryTeacher((4, 4)).features(views(), [0])


def test_example_of_the_page_is_short_and_right(edges):
    lines = (edges / "edges.py").read_text().splitlines()
    assert len([line for line in lines[lines.index("class Edges(Teacher):") :] if line.strip()]) <= 40
    teacher = make_teacher({"name": "edges:Edges"}, (3, 3))
    seen = views()
    found = run_teacher(teacher, seen, [0, 1])
    brightness = seen.images[1, 0, :, 8:16, :8].reshape(3, 2, 4, 2, 4).mean((2, 4)).flatten()
    torch.testing.assert_close(found[0][1, 0, 1, 0], brightness)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


class Crooked(Teacher):
    widths = (5,)

    def __init__(self, width=5, layers=(0,)):
        super().__init__()
        self.identity, self.width, self.given = {"name": "crooked"}, width, layers

    def features(self, views, layers):
        return {layer: torch.zeros(*views.images.shape[:2], 2, 2, self.width) for layer in self.given}


def test_wrong_teachers_are_told_in_one_line(edges, monkeypatch):
    module = ModuleType("crooked")
    module.Crooked, module.Bare = Crooked, type("Bare", (Teacher,), {})
    monkeypatch.setitem(sys.modules, "crooked", module)
    for spec, words in (
        ({"name": "dino"}, "unknown teacher 'dino'.*folder, geometry, scene3d, vggt"),
        ({"name": "nowhere:Teacher"}, "cannot be imported"),
        ({"name": "edges:Edges", "colour": 1}, "does not take these options.*colour"),
        ({"name": "crooked:Bare"}, "sets no widths"),
    ):
        with pytest.raises(BurnishError, match=words):
            make_teacher(spec, (2, 2))
    with pytest.raises(BurnishError, match=r"layer 0 has features of shape \[2, 2, 2, 2, 4\].*\[2, 2, H, W, 5\]"):
        run_teacher(make_teacher({"name": "crooked:Crooked", "width": 4}, (2, 2)), views(), [0])
    with pytest.raises(BurnishError, match="gave no layer 0"):
        run_teacher(make_teacher({"name": "crooked:Crooked", "layers": [1]}, (2, 2)), views(), [0])


@pytest.mark.parametrize("kind", ["dinov2", "siglip", "depth_anything"])
def test_folders_of_transformers(tmp_path, kind):
    """Layer k of the teacher is hidden_states[k + 1] of the model, without class tokens, at its own normalisation."""
    from transformers import (
        BitImageProcessor,
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        Dinov2Model,
        SiglipImageProcessor,
        SiglipVisionConfig,
        SiglipVisionModel,
    )  # fmt: skip

    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "siglip":
            model = SiglipVisionModel(SiglipVisionConfig(intermediate_size=32, **sizes))
            SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
        else:
            config = Dinov2Config(mlp_ratio=2, **sizes)
            if kind == "dinov2":
                model = Dinov2Model(config)
            else:
                whole = Dinov2Config(
                    mlp_ratio=2, out_features=["stage1", "stage2", "stage3"], reshape_hidden_states=False, **sizes
                )
                model = DepthAnythingForDepthEstimation(
                    DepthAnythingConfig(
                        backbone_config=whole, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8],
                        fusion_hidden_size=8, reassemble_factors=[2, 1, 0.5], patch_size=7,
                    )
                )  # fmt: skip
            processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
            processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    teacher = make_teacher({"name": "folder", "path": str(tmp_path)}, (2, 2))
    seen = views(side=28)
    found = run_teacher(teacher, seen, [0, 2])
    lacking = patch.object(teacher.model, "forward", side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError), lacking:  # not told as a picture size that the model does not take
        run_teacher(teacher, seen, [0])
    assert found[0].shape == (2, 2, 4, 4, 16) and len(teacher.widths) == 3
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(processor[name])[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (seen.images.flatten(0, 1) - mean) / std
    inner = model.backbone if kind == "depth_anything" else model
    states = inner.eval()(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[2].flatten(0, 1).flatten(1, 2), states[3][:, -16:], atol=1e-4, rtol=1e-4)


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(BurnishError, match="no vision model in"):
        make_teacher({"name": "folder", "path": str(tmp_path)}, (2, 2))


class Aggregator(nn.Module):
    """Writes down what it is given; its patch tokens are the patches' means, its first five tokens are special."""

    def __init__(self):
        super().__init__()
        self.camera_token = nn.Parameter(torch.zeros(1))
        self.moments = []

    def forward(self, images):
        self.seen = images
        self.moments.append(len(images))
        patches = nn.functional.avg_pool2d(images.flatten(0, 1), 14).flatten(2).mT.unflatten(0, images.shape[:2])
        tokens = torch.cat([torch.full_like(patches[:, :, :5], 99.0), patches], 2)
        return [nn.functional.pad(tokens, (0, 2048 - 3)) + k for k in range(24)], 5


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The aggregator of a package `vggt` that loads whatever is there, as the real one does."""
    made = Aggregator()
    vggt = ModuleType("vggt.models.vggt")
    vggt.VGGT = SimpleNamespace(from_pretrained=lambda path: SimpleNamespace(aggregator=made))
    for name, module in (("vggt", ModuleType("vggt")), ("vggt.models", ModuleType("m")), ("vggt.models.vggt", vggt)):
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_vggt_gets_518_pixels_from_0_to_1_views_jointly_and_loses_special_tokens(tmp_path, made):
    from safetensors.torch import save_file

    with pytest.raises(BurnishError, match="no VGGT weights.*try: hf download facebook/VGGT-1B"):
        make_teacher({"name": "vggt", "path": str(tmp_path)}, (4, 4))
    for content, words in ((b"weights", "unreadable"), (b"", "unreadable")):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(BurnishError, match=words):
            make_teacher({"name": "vggt", "path": str(tmp_path)}, (4, 4))
    save_file({"aggregator.other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BurnishError, match="lacks 'aggregator.camera_token'"):
        make_teacher({"name": "vggt", "path": str(tmp_path)}, (4, 4))
    save_file({"aggregator.camera_token": torch.zeros(1)}, tmp_path / "model.safetensors")
    teacher = make_teacher({"name": "vggt", "path": str(tmp_path), "precision": "no"}, (4, 4))
    found = run_teacher(teacher, views(1, 2), [4, 23])
    assert made.seen.shape == (1, 2, 3, 518, 518) and made.seen.min() >= 0 and made.seen.max() <= 1
    assert found[23].shape == (1, 2, 37, 37, 2048) and found[4].max() < 6
    torch.testing.assert_close(found[23] - found[4], torch.full_like(found[4], 19.0))


def test_vggt_keeps_the_chosen_layers_alone_pooled_and_few_moments_at_a_time(tmp_path, made):
    import gc
    import weakref

    from safetensors.torch import save_file

    from burnish.data.feature_cache import CacheKey
    from burnish.data.feature_fill import Pooled

    save_file({"aggregator.camera_token": torch.zeros(1)}, tmp_path / "model.safetensors")
    spec = {"name": "vggt", "path": str(tmp_path), "precision": "no"}
    teacher = make_teacher(spec, (4, 4))
    key = CacheKey(teacher.identity, "", ["front", "side"], [[24, 24]] * 2, [4, 23], [4, 4])
    alive, original, most = [], made.forward, []

    def watched(images):
        most.append(sum(output() is not None for output in alive))
        outputs, first = original(images)
        alive.extend(weakref.ref(output) for output in outputs)
        return outputs, first

    made.forward = watched
    seen = views(3, 2)
    found = Pooled(teacher, key)(seen)
    gc.collect()
    assert made.moments == [2, 1] and most == [0, 0]  # outputs of earlier moments are gone
    assert {t: tuple(f.shape) for t, f in found.items()} == {t: (3, 2, 4, 4, 2048) for t in (4, 23)}
    made.forward = original
    whole = run_teacher(teacher, seen, [23])[23]
    torch.testing.assert_close(found[23], pool_grid(whole, (4, 4), "area"))
    assert key.bytes_per_frame(teacher.widths) == 2 * 2 * 16 * 2048 * 2


def test_vggt_without_its_package(tmp_path):
    with pytest.raises(BurnishError, match="package vggt is not installed"):
        make_teacher({"name": "vggt", "path": str(tmp_path)}, (4, 4))


@pytest.fixture
def scene_folder(tmp_path):
    from safetensors.torch import save_file

    sizes = {**DEFAULTS, "width": 16, "depth": 2, "heads": 2, "image_size": 24, "cells": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SceneNet(**sizes)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model": sizes}))
    return tmp_path


def test_scene_net_views_meet_in_odd_blocks_only(scene_folder):
    teacher = make_teacher({"name": "scene3d", "path": str(scene_folder)}, (2, 2))
    one, other = views(), views()
    other.images = one.images.clone()
    other.images[:, 1] = 0
    a, b = (run_teacher(teacher, v, [0, 1]) for v in (one, other))
    torch.testing.assert_close(a[0][:, 0], b[0][:, 0])
    assert (a[1][:, 0] - b[1][:, 0]).abs().max() > 1e-4
    one.cameras = ("front", "wrist")
    with pytest.raises(BurnishError, match="looks at cameras front, wrist.*front, side"):
        run_teacher(teacher, one, [0])
    control = make_teacher({"name": "scene3d", "path": str(scene_folder), "untrained": True}, (2, 2))
    assert control.identity != teacher.identity


def test_points_lie_where_their_pixels_are(scene_folder):
    """The head's cells are laid out in image order."""
    net = SceneNet(**json.loads((scene_folder / "config.json").read_text())["model"])
    cells = torch.arange(4.0).repeat(3) + torch.tensor([0.0, 10.0, 20.0]).repeat_interleave(4)
    with torch.no_grad():
        net.head[1].weight.zero_()
        net.head[1].bias.copy_(cells)
        net.centre[1] = 100.0
        points = net(views().images)
    torch.testing.assert_close(points[:, 1], points[:, 0] + 100)
    assert points.shape == (2, 2, 4, 4, 3)
    expected = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(2, 2)
    for axis in range(3):
        torch.testing.assert_close(points[1, 0, :, :, axis], expected + 10 * axis)


def test_missing_scene_net_names_the_command(tmp_path):
    with pytest.raises(BurnishError, match="python -m workshop teacher recipes/align/scene3d.yaml"):
        make_teacher({"name": "scene3d", "path": str(tmp_path / "none")}, (2, 2))


def test_scene_net_learns_a_scene_by_heart(tmp_path):
    """The training code brings the error below that of guessing the mean."""
    from workshop.scene_train import SceneRecipe, train_scene_net

    sizes = {**DEFAULTS, "width": 32, "depth": 2, "heads": 2, "image_size": 24, "patch": 8, "cells": 2}
    for name, count, seed in (("train", 16, 0), ("held_out", 4, 7_000_000)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        shade = rng.random((count, 2, 1, 1, 1)).astype(np.float32)
        np.save(folder / "images.npy", np.broadcast_to(shade * 255, (count, 2, 24, 24, 3)).astype(np.uint8))
        points = np.broadcast_to(shade, (count, 2, 6, 6, 3)).astype(np.float16)
        np.save(folder / "points.npy", points)
        request = {"count": count, "image_size": 24, "points": 6, "seed": seed, "version": 3}
        (folder / "scenes.json").write_text(json.dumps(request))
    recipe = SceneRecipe(
        output=str(tmp_path / "net"), data=str(tmp_path / "data"), scenes=16, held_out=4, steps=80, batch_size=8,
        lr=3e-3, warmup_steps=5, model=sizes,
    )  # fmt: skip
    facts = train_scene_net(recipe, progress=False)
    assert facts["accuracy"]["one_view_cm"] < 0.6 * facts["accuracy"]["guess_cm"]
    again = train_scene_net(recipe, progress=False)
    assert again["minutes"] == facts["minutes"]  # finished: not trained again
