"""Single files that commands write: nothing of somebody else's is replaced, and an earlier one of ours is."""

import json
import os
import shutil

import pytest

from burnish.core.errors import BurnishError
from burnish.core.figures import new_figure, save_figure
from burnish.core.outputs import require_file

COMMANDS = {
    "anchor": ["method", "isolate", "anchor", "small", "questions", "-o", "X"],
    "html": ["data", "inspect", "data", "--html", "X"],
    "page": ["report", "page", "run", "--out", "X"],
    "two pages": ["report", "page", "run", "run", "--out", "X"],
    "page figure": ["report", "page", "run", "--figure", "X"],
    "pareto": ["report", "pareto", "result.json", "-o", "X"],
    "decode": ["policy", "decode", "small", "--output", "X"],
    "decode figure": ["policy", "decode", "small", "--figure", "X"],
    "score": ["policy", "verify", "score", "small", "data", "--output", "X"],
    "profile": ["policy", "profile", "small", "--output", "X"],
}


@pytest.mark.parametrize("place", ["config.json", "folder", "pipe", "dangling"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_stays(tmp_path, monkeypatch, refused, untouched, command, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"mine": 1}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/profile.json").write_text('{"mine": 1}')
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    check, before = untouched(tmp_path), sorted(os.listdir(tmp_path))
    refused([word.replace("X", place) for word in COMMANDS[command]], place)
    check()
    assert sorted(os.listdir(tmp_path)) == before


def test_a_page_of_ours_is_replaced(dataset, tmp_path, accepted):
    root = shutil.copytree(dataset, tmp_path / "data")
    for _ in range(2):
        accepted(["data", "inspect", root, "--html", tmp_path / "a.html", "--quick"], "a.html")


def test_a_figure_of_ours_is_replaced(tmp_path):
    save_figure(new_figure(1, 1), tmp_path / "a.png")
    require_file(tmp_path / "a.png", "figure")
    with pytest.raises(BurnishError, match="overwrite"):
        require_file(tmp_path / "a.png", "page")


@pytest.mark.parametrize("feature", ["observation.state", "action"])
def test_a_feature_without_dimensions(tiny_smolvla, tmp_path, refused, feature):
    folder = shutil.copytree(tiny_smolvla, tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    part = "output_features" if feature == "action" else "input_features"
    config[part][feature]["shape"] = []
    (folder / "config.json").write_text(json.dumps(config))
    refused(["policy", "profile", folder], "has the shape ()")
