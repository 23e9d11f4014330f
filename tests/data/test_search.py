"""Vectors of frames, exact search in them, and which episodes are chosen by it."""

import json
import shutil

import numpy as np
import pytest
from dataset_fakes import write_v3
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.core.recipe import mixed_data, recipe_from_dict
from burnish.data.search import (
    Index,
    best,
    build,
    centres,
    curate,
    idle_stretches,
    nearest_episodes,
    search,
    signatures,
)
from burnish.data.vectors import FRAME, Vectors, encode_dataset, load_vectors, make_encoder


def vectors_of(directions, every=1, head="", views=1):
    """An index of episodes of given unit vectors: a list of [T, D] arrays."""
    lengths = [len(one) for one in directions]
    frames = [(i, e, every * t, e % 2, every * n) for i, (e, n, t) in enumerate(
        (e, n, t) for e, n in enumerate(lengths) for t in range(n))]  # fmt: skip
    values = np.concatenate(directions).astype(np.float32)
    values = np.repeat((values / np.linalg.norm(values, axis=1, keepdims=True))[:, None], views, 1)
    about = {"encoder": {"kind": "pixels", "grid": 16}, "spec": "pixels", "head": head, "data": "d", "root": "r",
             "cameras": ["front", "wrist"][:views], "every": every, "instructions": {"0": "a", "1": "b"}}  # fmt: skip
    return Vectors(values, np.array(frames, FRAME), about)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 700), st.integers(1, 70), st.integers(0, 9), st.booleans())
def test_the_best_are_those_of_a_sort(count, k, seed, ties):
    scores = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    scores = np.round(scores) if ties else scores
    assert best(scores, min(k, count)).tolist() == np.argsort(-scores, kind="stable")[:k].tolist()


def test_search_is_brute_force_in_blocks_of_queries(monkeypatch):
    rng = np.random.default_rng(0)
    queries, keys = (rng.normal(size=shape).astype(np.float32) for shape in ((33, 8), (500, 8)))
    monkeypatch.setattr("burnish.data.search.SCORES", 1700)  # three queries at once
    scores, places = search(queries, keys, 7)
    exact = queries.astype(np.float64) @ keys.T.astype(np.float64)
    assert np.array_equal(places, np.argsort(-exact, 1)[:, :7])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, places, 1), rtol=1e-5)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A data set whose pictures are grey, each a little lighter than the one before."""
    return write_v3(tmp_path_factory.mktemp("search") / "data", pictures=True)


def test_a_data_set_is_encoded_once_and_the_vectors_are_its_pictures(pictured, monkeypatch):
    encoder = make_encoder("pixels")
    found = encode_dataset(pictured, encoder, progress=False)
    assert found.values.shape == (18, 1, 768) and found.values.dtype == np.float16
    np.testing.assert_allclose(found.values[:, 0, 0], (20 + 12 * np.arange(18)) / 255, atol=1e-3)
    assert found.frames[5].tolist() == (5, 1, 0, 1, 6) and found.instruction(1) == "open the drawer"
    monkeypatch.setattr("burnish.data.vectors._encode", None)  # a second time nothing is computed
    assert np.array_equal(encode_dataset(pictured, encoder, progress=False).values, found.values)
    with pytest.raises(TypeError):
        encode_dataset(pictured, encoder, every=2, progress=False)


@pytest.mark.parametrize(
    ("spec", "match"),
    [("pixel", "encoder 'pixel'"), ("pixels:x", "encoder 'pixels:x'"), ("tower", "encoder 'tower'"),
     ("tower:nowhere", "no policy at nowhere"), ("folder:nowhere", "no vision model in nowhere")],
)  # fmt: skip
def test_unknown_encoders_are_one_line(spec, match):
    with pytest.raises(BurnishError, match=match):
        make_encoder(spec)


def test_the_towers_of_policies_and_their_backbones_are_encoders(tiny_smolvla, tiny_pi05):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for folder in (tiny_smolvla, tiny_pi05):
        for spec in (f"tower:{folder}", f"backbone:{folder}@1"):
            encoder = make_encoder(spec)
            both, one = encoder(pictures), encoder(pictures[1:2])
            np.testing.assert_allclose(both[1:2], one, rtol=1e-3, atol=1e-4)  # a picture by itself
            assert not np.allclose(both[0], both[1]) and encoder.identity["weights"]
    with pytest.raises(BurnishError, match="layer 99"):
        make_encoder(f"backbone:{tiny_smolvla}@99")


def test_an_index_is_of_unit_vectors_and_refuses_queries_of_another_encoder(pictured, tmp_path):
    features = encode_dataset(pictured, make_encoder("pixels"), progress=False)
    build(features).save(tmp_path / "index")
    index = Index.open(tmp_path / "index")
    np.testing.assert_allclose(np.linalg.norm(index.keys, axis=1), 1, rtol=1e-5)
    scores, places = index.ask(index.keys[:2], index.vectors.about, 1)
    assert places[:, 0].tolist() == [0, 0] or scores.min() > 0.999  # grey pictures differ in nothing but their mean
    other = {**index.vectors.about, "encoder": {"kind": "tower", "weights": "ab"}}
    with pytest.raises(BurnishError, match="encoder kind tower.* against an index of encoder kind pixels"):
        index.ask(index.keys[:1], other, 1)
    with pytest.raises(BurnishError, match="query of head abc against an index of head none"):
        index.check({**index.vectors.about, "head": "abc"})
    with pytest.raises(BurnishError, match="no index"):
        Index(features)
    np.save(tmp_path / "index/frames.npy", np.zeros(18, FRAME))
    with pytest.raises(BurnishError, match="is not the file that was written there"):
        load_vectors(tmp_path / "index")


def wave(start, length=24, size=8, turn=0.05):
    """[length, size] a direction that turns evenly."""
    angles = start + turn * np.arange(length)
    return np.stack([np.cos(angles), np.sin(angles), *np.zeros((size - 2, length))], 1)


def test_the_nearest_episodes_and_the_centres_are_those_that_were_placed_so():
    away = np.roll(wave(0), 2, axis=1)
    index = Index(vectors_of([wave(0), wave(0.1), wave(1.5), away]))
    target = vectors_of([wave(0.02)])
    assert [episode for episode, _ in nearest_episodes(index, target, 3)] == [0, 1, 2]
    chosen, radii = centres(index.vectors, 9)
    assert sorted(chosen) == [0, 1, 2, 3] and radii == sorted(radii, reverse=True) and radii[-1] < 1e-6
    assert 3 in chosen[:2] and 2 in chosen[:3]
    _, marks = signatures(index.vectors)
    cosine = float(np.mean([np.cos(1.5)] * 8))
    assert np.square(marks[0] - marks[2]).sum() == pytest.approx(1 - cosine, abs=1e-5)


def test_curation_finds_the_twin_the_stranger_and_the_pause():
    rng = np.random.default_rng(0)
    plain = [wave(0.25 * i) + 0.02 * rng.normal(size=(24, 8)) for i in range(8)]
    twin = plain[3] + 0.002 * rng.normal(size=(24, 8))
    stranger = np.roll(wave(0), 4, axis=1)
    pausing = plain[5][[*range(8), *[8] * 14, *range(9, 24)]]
    found = curate(vectors_of([*plain, twin, stranger, pausing], views=2), fps=10)
    assert found.duplicates[0][:2] == (3, 8) and found.outliers[0][0] == 9
    assert {pair[:2] for pair in found.duplicates} <= {(3, 8), (5, 10)}
    assert found.idle[0][:3] == (10, 8, 22) and found.idle[0][3] == pytest.approx(1.4) and len(found.idle) == 1
    assert found.idle_share == pytest.approx(14 / (10 * 24 + 37)) and found.episodes == 11
    alone = curate(vectors_of([wave(0)]), fps=10)
    assert (alone.duplicates, alone.outliers, alone.cover) == ([], [], [0])


def test_a_view_that_never_moves_says_nothing_of_idle_frames():
    still = vectors_of([np.ones((30, 4)), np.ones((30, 4))])
    assert idle_stretches(still, 10) == ([], 0.0)


def run(capsys, *words):
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_an_entry_of_a_mix_takes_its_episodes_from_a_file(tmp_path):
    file = tmp_path / "picked.json"
    given = {"data": {"root": "a", "mix": [{"root": "b", "episodes": str(file)}]}}
    recipe = recipe_from_dict(given)  # as in a study, whose steps write the file later
    with pytest.raises(BurnishError, match=r"picked\.json"):
        mixed_data(recipe)
    file.write_text("[3, 1]")
    assert mixed_data(recipe)[0].episodes == [3, 1] and recipe.data.mix[0]["episodes"] == str(file)
    file.write_text('{"3": 1}')
    with pytest.raises(BurnishError, match="a list of whole numbers"):
        mixed_data(recipe)


def test_index_search_and_select_from_the_command_line(pictured, tmp_path, capsys):
    root = shutil.copytree(pictured, tmp_path / "data")
    index = tmp_path / "index"
    assert "18 frames, 1 views" in run(capsys, "data", "index", root, "--encoder", "pixels", "-o", index)
    lines = run(capsys, "data", "search", index, "--episode", 1, "--frame", 0, "--top", 3, "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 3 and all(one["episode"] != 1 and one["camera"] == "front" for one in found)
    said = run(capsys, "data", "select", index, 2, "-o", tmp_path / "picked.json")
    picked = json.loads((tmp_path / "picked.json").read_text())
    assert len(picked) == 2 and "--data.episodes" in said
    run(capsys, "data", "index", root, "--encoder", "pixels", "-o", tmp_path / "same")
    run(capsys, "data", "select", index, 1, "--like", tmp_path / "same", "-o", tmp_path / "picked.json")
    for seed in (3, 3, 4):
        run(capsys, "data", "select", index, 2, "--random", seed, "-o", tmp_path / f"random-{seed}.json")
    chosen = json.loads((tmp_path / "random-3.json").read_text())
    assert chosen == sorted(np.random.default_rng(3).permutation(3)[:2].tolist())
    assert main(["data", "select", str(index), "1", "--like", str(tmp_path / "same"), "--random", "3"]) == 2
    assert "--like and --random; expected one of them" in capsys.readouterr().err
    head, small = tmp_path / "head", ["--epochs=1", "--hidden=8", "--width=4", "--batch=8"]
    run(capsys, "method", "retrieve", "train", root, "-o", head, "--encoder", "pixels", *small)
    run(capsys, "data", "index", root, "--encoder", "pixels", "--head", head, "-o", tmp_path / "headed")
    assert "front" in run(capsys, "data", "search", tmp_path / "headed", "--text", "lift the red cube", "--top", 2)
    assert main(["data", "select", str(index), "1", "--like", str(tmp_path / "headed")]) == 2
    assert "a query of head" in capsys.readouterr().err
    run(capsys, "method", "retrieve", "train", root, "-o", head, "--encoder", "pixels", *small, "--seed", 1)
    assert main(["data", "search", str(tmp_path / "headed"), "--text", "lift"]) == 2
    assert "another than the index was built with" in capsys.readouterr().err
    assert main(["data", "search", str(index), "--text", "lift"]) == 2
    assert "knows no sentences" in capsys.readouterr().err
    page = tmp_path / "page.html"
    text = run(capsys, "data", "inspect", root, "--quick", "--curate", index, "--html", page)
    assert "near-duplicates" in text and "<img" in page.read_text() and "Coverage" in page.read_text()
