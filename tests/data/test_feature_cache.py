"""The cache of teacher features: exact, compressed, refused when of something else, continued after a kill."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from feature_fakes import SPEC, fill, make_data, make_key

from burnish.core.errors import BurnishError
from burnish.data.feature_cache import CacheKey, FeatureCache, Fit, Statistics
from burnish.data.feature_fill import Pooled
from burnish.data.views import FrameViews, frame_source
from burnish.teachers.base import make_teacher
from burnish.teachers.placing import Placement


@pytest.fixture(scope="module")
def data(dataset):
    return make_data(dataset)


@pytest.fixture
def key(data, edges):
    return make_key(data)


def by_hand(key, data, rows):
    """Pooled features of some rows straight from the teacher, centred at each place and scaled by dimension."""
    pooled = Pooled(make_teacher(SPEC, (2, 2)), key)
    views = FrameViews(frame_source(data, ("front",), False))
    everything = pooled(views(np.arange(len(data.actions)), None))
    scaled = {}
    for layer, features in everything.items():
        centred = features - features.mean(0)
        scale = centred.flatten(0, -2).std(0, correction=0)
        scaled[layer] = (centred / scale.clamp_min(0.01 * float(scale.mean())))[rows]
    return scaled


def test_half_precision_is_exact_after_pooling(tmp_path, key, data):
    cache = fill(tmp_path / "c", key, data)
    rows = torch.tensor([7, 0, 29, 7])
    for layer, features in by_hand(key, data, rows).items():
        # The statistics come from all rows in another order, hence the last bit.
        torch.testing.assert_close(cache.read(rows)[layer], features.half().float(), atol=2e-3, rtol=2e-3)
    assert cache.bytes_per_sample == 2 * 2 * 2 * 2 * 12


def test_int8_keeps_the_direction_of_every_token(tmp_path, key, data):
    half = fill(tmp_path / "h", key, data)
    small = fill(tmp_path / "p", replace(key, format="pca"), data)
    rows = torch.arange(len(data.actions))
    for layer in key.layers:
        cosine = torch.cosine_similarity(half.read(rows)[layer], small.read(rows)[layer], dim=-1)
        assert cosine.mean() > 0.99
    assert small.bytes_per_sample <= half.bytes_per_sample / 2


def anisotropic():
    """Features [200, 1, 2, 2, 6] that lie almost in three of their dimensions."""
    drawn = torch.randn(200, 1, 2, 2, 6, generator=torch.Generator().manual_seed(0))
    return drawn @ torch.diag(torch.tensor([9.0, 5, 3, 0.1, 0.1, 0.1]))


def test_pca_is_the_best_subspace():
    features = anisotropic()
    key = CacheKey({"name": "x"}, "", ["a"], [[1, 1]], [0], [2, 2], format="pca", components=3)
    statistics = Statistics.fit(features, key)
    assert statistics.basis.shape == (3, 6) and statistics.basis[:, 3:].abs().max() < 0.05
    error = statistics.decode(statistics.encode(features)) - features
    assert error[..., :3].abs().max() < 0.3 and error[..., 3:].abs().max() < 0.6


def test_compression_is_gated_and_finds_its_own_size():
    features = anisotropic()
    key = CacheKey({"name": "x"}, "", ["a"], [[1, 1]], [0], [2, 2], format="pca")
    assert len(Statistics.fit(features, key).basis) == 3
    with pytest.raises(BurnishError, match=r"2 components keep .* to a cosine of 0.9.*at least 0.99"):
        Statistics.fit(features, replace(key, components=2))


@pytest.mark.parametrize("options", [{"standardise": True}, {"standardise": True, "format": "pca"}], ids=str)
def test_statistics_from_blocks_are_those_of_the_whole(options):
    features = anisotropic() + torch.arange(4.0).view(1, 1, 2, 2, 1) * 100
    key = CacheKey({"name": "x"}, "", ["a"], [[1, 1]], [0], [2, 2], **options)
    whole, fit = Statistics.fit(features, key), Fit(key)
    for block in features.split(37):
        fit.add(block)
    parts = fit.statistics()
    for one, other in zip(whole.tensors()[:2], parts.tensors()[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.mean, features.double().mean(0).float())
    torch.testing.assert_close(
        parts.scale, (features - features.mean(0)).flatten(0, -2).std(0, correction=0), rtol=1e-4, atol=1e-4
    )
    if whole.basis is not None:
        assert len(whole.basis) == len(parts.basis) and fit.tokens[0].shape == (37 * 4, 6)


def test_of_many_frames_few_tokens_are_kept_and_none_of_the_padding(monkeypatch):
    monkeypatch.setattr("burnish.data.feature_cache.TOKENS", 512)
    placed = [Placement(4, 4, 2, 0, 2, 4).numbers()]
    key = CacheKey({"name": "x"}, "", ["a"], [[2, 4]], [0], [4, 4], format="pca", placed=placed)
    fit = Fit(key)
    features = torch.randn(64, 1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    features[:, :, :2] = 1e4
    for block in features.split(32):
        fit.add(block)
    assert [len(tokens) for tokens in fit.tokens] == [32, 32]  # a token for each of the 512 sampled frames
    assert torch.cat(fit.tokens).abs().max() < 10 and torch.cat(fit.places).min() >= 8
    assert fit.statistics().basis.shape[1] == 6


def test_size_is_told_before_anything_is_computed(tmp_path, key, data, caplog, monkeypatch):
    with caplog.at_level("INFO", "burnish"):
        fill(tmp_path / "c", key, data)
    assert "features of edges: 0.000192 MB a frame" in caplog.text
    assert key.bytes_per_frame((12, 12)) == 192
    assert replace(key, format="pca").bytes_per_frame((12, 12)) == 96
    assert replace(key, format="pca", components=5).bytes_per_frame((12, 12)) == 40

    def never(*_):
        raise AssertionError("the disk is full: no frame is computed")

    monkeypatch.setattr("burnish.data.feature_fill.fit_statistics", never)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(BurnishError, match="less with fewer pairs, cache_format: pca"):
        fill(tmp_path / "d", key, data)


def test_features_that_are_kept_as_they_are_need_no_statistics(tmp_path, key, data, monkeypatch):
    calls, original = [], Pooled.__call__
    monkeypatch.setattr(
        Pooled, "__call__", lambda self, views: calls.append(len(views.images)) or original(self, views)
    )
    fill(tmp_path / "c", replace(key, standardise=False), data)
    assert sum(calls) == len(data.actions)


def test_a_foreign_folder_beside_the_cache_is_not_touched(tmp_path, key, data):
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial/thesis.txt").write_text("mine")
    with pytest.raises(BurnishError, match="thesis.txt, which this would overwrite"):
        fill(tmp_path / "c", key, data)
    assert (tmp_path / "c.partial/thesis.txt").read_text() == "mine"


def test_one_of_another_data_set_or_teacher_is_refused_in_one_line(tmp_path, key, data):
    fill(tmp_path / "c", key, data)
    for changed, words in (
        (replace(key, data="0" * 16), "another data set"),
        (replace(key, teacher={"name": "other"}), "another teacher"),
        (replace(key, grid=[4, 4]), "another grid"),
        (replace(key, pooling="bilinear"), "another pooling"),
    ):
        with pytest.raises(BurnishError, match=words) as error:
            fill(tmp_path / "c", changed, data)
        assert "\n" not in str(error.value)
    with pytest.raises(BurnishError, match="no teacher features"):
        FeatureCache(tmp_path / "nothing", key)
    np.save(tmp_path / "c" / "layer-0.npy", np.zeros((3, 1, 2, 2, 12), np.float16))
    with pytest.raises(BurnishError, match="layer-0.npy is not the file"):
        FeatureCache(tmp_path / "c", key)


def test_an_interrupted_one_is_continued(tmp_path, key, data, monkeypatch):
    monkeypatch.setattr("burnish.data.feature_fill.BLOCK", 8)
    whole = fill(tmp_path / "whole", key, data)
    original, done = Statistics.encode, []  # called once for each block and layer

    def dying(self, features):
        if len(done) == 2 * len(key.layers):
            raise KeyboardInterrupt
        done.append(features)
        return original(self, features)

    with monkeypatch.context() as patch:
        patch.setattr(Statistics, "encode", dying)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "cut", key, data)
    assert not (tmp_path / "cut").exists() and np.fromfile(tmp_path / "cut.partial/done", np.uint8).sum() == 2
    counted = []
    monkeypatch.setattr(Statistics, "encode", lambda self, rows: counted.append(rows) or original(self, rows))
    cut = fill(tmp_path / "cut", key, data)
    assert len(counted) == (-(-len(data.actions) // 8) - 2) * len(key.layers)
    for layer in key.layers:
        assert np.array_equal(whole.arrays[layer], cut.arrays[layer])
    assert not (tmp_path / "cut.partial").exists()


def test_processes_give_the_same_bytes(tmp_path, key, data, monkeypatch, edges):
    monkeypatch.setattr("burnish.data.feature_fill.BLOCK", 4)
    monkeypatch.setenv("PYTHONPATH", str(edges))
    one, two = (fill(tmp_path / str(n), key, data, workers=n) for n in (1, 2))
    for layer in key.layers:
        name = f"layer-{layer}.npy"
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert json.loads((one.folder / "meta.json").read_text()) == json.loads((two.folder / "meta.json").read_text())


def test_targets_that_are_not_finite_are_named(tmp_path, key, data, monkeypatch):
    import edges

    def broken(self, views, layers):
        return {layer: torch.full((*views.images.shape[:2], 4, 4, 12), torch.nan) for layer in layers}

    monkeypatch.setattr(edges.Edges, "features", broken)
    with pytest.raises(BurnishError, match="teacher 'edges' gives values that are not finite at layer 0") as error:
        fill(tmp_path / "c", key, data)
    assert "\n" not in str(error.value) and not (tmp_path / "c").exists()


def test_values_beyond_half_precision_are_named(tmp_path, key, data, monkeypatch):
    import edges

    def huge(self, views, layers):
        return {layer: torch.full((*views.images.shape[:2], 4, 4, 12), 1e6) for layer in layers}

    monkeypatch.setattr(edges.Edges, "features", huge)
    with pytest.raises(BurnishError, match="exceed half precision"):
        fill(tmp_path / "c", replace(key, standardise=False), data)
