"""The head: its size, what it learns, its folder, and the objective beside imitation."""

import shutil

import fake
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from seeing import Seeing

from burnish.core.errors import BurnishError
from burnish.data.vectors import FRAME, Vectors
from burnish.methods.retrieve.head import Head, load_head, partner_frames, save_head, sentence_features
from burnish.methods.retrieve.options import make_config
from burnish.methods.retrieve.train import train_and_save, train_head

ENCODER = {"kind": "pixels", "grid": 16}


def features(episodes=8, length=30, views=2, seed=0):
    """What an encoder could see: the episode, the task (two of them) and the time in some of 12 numbers, and noise."""
    rng = np.random.default_rng(seed)
    episode, time = np.repeat(np.arange(episodes), length), np.tile(np.arange(length), episodes)
    task = episode % 2
    clues = np.stack([task, time / length, rng.normal(size=episodes)[episode]], 1) @ rng.normal(size=(3, 12)) * 3
    values = clues[:, None] + rng.normal(size=(len(episode), views, 12))
    columns = [np.arange(len(episode)), episode, time, task, np.full(len(episode), length)]
    about = {"encoder": ENCODER, "spec": "pixels", "head": "", "data": "d", "root": "r", "every": 1,
             "cameras": ["a", "b"][:views], "instructions": {"0": "lift the cube", "1": "open the drawer"}}  # fmt: skip
    return Vectors(values.astype(np.float16), np.rec.fromarrays(columns, dtype=FRAME), about)


def test_the_published_head_has_its_656_000_parameters():
    head = Head(1152, make_config("paper", {}))
    trained = [p for p in head.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 656_000
    assert head(torch.randn(3, 2, 1152)).shape == (3, 2, 128) and float(1 / head.scale) == pytest.approx(0.07)


def test_sentences_are_told_apart_by_their_words():
    one, same, other = sentence_features(["Lift the red cube", "lift the red cube!", "open the drawer"])
    assert torch.equal(one, same) and one.norm() == pytest.approx(1) and abs(float(one @ other)) < 0.6


def test_partners_lie_in_their_episode_within_the_window():
    config, rng = make_config("default", {"window": 4}), np.random.default_rng(0)
    frames = np.arange(40)
    starts, ends = np.where(frames < 3, 0, 3), np.where(frames < 3, 3, 40)
    found = np.stack([partner_frames(rng, frames, starts, ends, config) for _ in range(50)])
    assert ((found >= starts) & (found < ends) & (abs(found - frames) <= 4)).all()
    assert (found[:, 10:30] != frames[10:30]).all()
    exact = partner_frames(rng, frames, starts, ends, make_config("paper", {}))
    assert exact[:3].tolist() == [2, 2, 2] and exact[3:35].tolist() == list(range(8, 40))


def test_training_is_a_function_of_its_seed_and_brings_like_frames_together():
    data = features()
    config = make_config("default", {"hidden": 32, "width": 16, "epochs": 12, "batch": 32, "lr": 3e-3})
    head, losses = train_head(data, config, seed=1, progress=False)
    again = train_head(data, config, seed=1, progress=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    assert losses["steps"] == 90 and losses["view"] < 0.5 * 0.5 * np.log(32)
    with torch.no_grad():
        vectors = head(torch.from_numpy(data.values.astype(np.float32))).numpy()
        words = head.sentences(["lift the cube", "open the drawer"]).numpy()
    assert ((vectors[:, 0] @ words.T).argmax(1) == data.frames["task"]).mean() > 0.9


def test_the_folder_loads_after_a_move_and_refuses_another_encoder_or_a_changed_file(tmp_path):
    config = make_config("paper", {"epochs": 0.5, "hidden": 8, "width": 4, "batch": 16})
    found = train_and_save(features(), config, tmp_path / "head", episodes=[0, 1, 2], progress=False)
    shutil.move(tmp_path / "head", tmp_path / "moved")
    head, about = load_head(tmp_path / "moved", ENCODER)
    assert about["hash"] == found["hash"] and about["episodes"] == [0, 1, 2] and about["normalisation"] == "none"
    x = torch.randn(5, 12)
    assert torch.equal(load_head(tmp_path / "moved")[0](x), head(x))
    with pytest.raises(BurnishError, match=r"features of kind pixels, grid 16; expected one for kind tower"):
        load_head(tmp_path / "moved", {"kind": "tower", "weights": "ab"})
    text = (tmp_path / "moved/head.json").read_text()
    for wrong, match in (
        (text.replace('"features": 12', '"features": 13'), "does not fit"),
        (text.replace('"hidden": 8', '"hidden": -1'), "hidden is -1"),
        (text.replace('"format": 1', '"format": 2'), "no head of format 1"),
        (text.replace('"features": 12', '"features": 1e99'), "features is 1e"),
    ):
        (tmp_path / "moved/head.json").write_text(wrong)
        with pytest.raises(BurnishError, match=match):
            load_head(tmp_path / "moved")
    (tmp_path / "moved/head.json").write_text(text)
    save_head(tmp_path / "other", Head(12, config), ENCODER)
    shutil.copy(tmp_path / "other/head.safetensors", tmp_path / "moved/head.safetensors")
    with pytest.raises(BurnishError, match="is not the file that head.json names"):
        load_head(tmp_path / "moved")
    with pytest.raises(BurnishError, match="no retrieval head"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("preset", "options", "match"),
    [
        ("other", {}, "preset is 'other'"), ("default", {"temperature": 0.0}, "temperature is 0"),
        ("default", {"window": 9, "far": 9}, "far is 9"), ("paper", {"batch": 2, "frames": 3}, "frames is 3"),
        ("default", {"hiden": 3}, "unknown option 'hiden'"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(preset, options, match):
    with pytest.raises(BurnishError, match=match):
        make_config(preset, options)


def test_one_episode_or_no_loss_is_refused():
    with pytest.raises(BurnishError, match="one episode"):
        train_head(features(episodes=1), make_config("default", {}), progress=False)
    nothing = dict.fromkeys(("time_weight", "sentence_weight", "progress_weight"), 0.0)
    with pytest.raises(BurnishError, match="no loss is left"):
        train_head(features(views=1), make_config("default", nothing), progress=False)


def test_it_trains_the_tower_alone_and_says_where_no_loss_is_left(dataset, tmp_path, monkeypatch):
    import burnish.policies
    from burnish.train.loop import train

    monkeypatch.setattr(burnish.policies, "load_policy", lambda *args, **more: Seeing())
    before = Seeing().backbone[0].weight
    entry = "--objectives=[{name: retrieve, hidden: 8, width: 4, weight: 1.0, window: 2, far: 4}]"
    alone = ["--train.imitation_weight=0", "--train.weight_decay=0", "--train.self_check=false"]
    made = train(fake.recipe(dataset, tmp_path / "a", entry, *alone), progress=False)
    rows = fake.figures(tmp_path / "a/metrics.jsonl")
    last = next(row for row in reversed(rows) if "retrieve_time" in row)
    assert {"retrieve_sentence", "retrieve_progress", "retrieve_temperature"} <= last.keys()
    assert "retrieve_view" not in last  # one camera
    assert not torch.equal(load_file(made.policy / "model.safetensors")["backbone.0.weight"], before)
    off = "--objectives=[{name: retrieve, time_weight: 0, sentence_weight: 0, progress_weight: 0}]"
    with pytest.raises(BurnishError, match="no loss is left"):
        train(fake.recipe(dataset, tmp_path / "b", off), progress=False)


def test_views_that_a_data_set_of_a_mix_lacks_are_left_out(dataset, tmp_path, monkeypatch):
    """There they are black pictures, which would be drawn to what the other cameras see."""
    import burnish.policies
    from burnish.train.loop import train

    monkeypatch.setattr(burnish.policies, "load_policy", lambda *args, **more: Seeing())
    monkeypatch.setattr(Seeing, "cameras", ("front", "wrist"))
    two = fake.make_dataset(tmp_path / "two", cameras=("front", "wrist"))
    entry, found = "--objectives=[{name: retrieve, hidden: 8, width: 4, window: 2, far: 4}]", []
    mix = f"--data.mix=[{{root: {dataset}, columns: {{observation.images.wrist: null}}}}]"
    for name, more in (("whole", []), ("lacking", [mix])):
        more += ["--train.steps=1", "--train.self_check=false"]
        found.append(train(fake.recipe(two, tmp_path / name, entry, *more), progress=False).final)
    assert "retrieve_view" in found[0] and "retrieve_view" not in found[1] and "retrieve_time" in found[1]


def test_partners_are_augmented_by_draws_of_their_own(dataset, tmp_path, monkeypatch):
    """With those of the batch a frame and its partner would have the same shift, which gives it away."""
    import burnish.policies
    from burnish.data.loader import RobotData
    from burnish.train.loop import train

    drawn, finish = [], RobotData.finish
    monkeypatch.setattr(burnish.policies, "load_policy", lambda *args, **more: Seeing())
    monkeypatch.setattr(RobotData, "finish", lambda data, batch, k: (drawn.append(k), finish(data, batch, k))[1])
    entry = "--objectives=[{name: retrieve, hidden: 8, width: 4, weight: 1.0, window: 2, far: 4}]"
    train(fake.recipe(dataset, tmp_path / "a", entry, "--train.steps=2", "--train.self_check=false"), progress=False)
    assert len(drawn) > 3 and len(drawn) == len(set(drawn))
