import json

import pytest
import torch
from PIL import Image

from burnish.core.errors import BurnishError
from burnish.train import logging
from burnish.train.logging import Metrics, Window, draw_curves, read_rows


def test_window_means_survive_saving():
    window = Window()
    for value in (1.0, 2.0):
        window.add({"a": torch.tensor(value), "b": torch.tensor(10 * value)})
    window = Window(**json.loads(json.dumps(window.state())))
    window.add({"a": torch.tensor(6.0)})
    assert window.means() == {"a": 3.0, "b": 15.0}
    assert window.means() == {}


def test_metrics_drop_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, -1)
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": step / 2})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # cut by a kill
    Metrics(path, 2).write({"step": 3, "loss": 9.0})
    assert read_rows(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0}]
    Metrics(path, -1)
    assert path.read_text() == ""


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path / "metrics.jsonl", -1)
    metrics.write({"step": 1})

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[:4])
            self.file.flush()
            raise OSError(28, "No space left on device")

    real = open
    monkeypatch.setattr(
        logging, "open", lambda p, mode: Full(real(p, mode)) if mode == "ab" else real(p, mode), raising=False
    )
    with pytest.raises(BurnishError, match="no room left"):
        metrics.write({"step": 2})
    assert read_rows(metrics.path) == [{"step": 1}]


def test_curves(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", -1)
    draw_curves(metrics.path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
    metrics.write({"step": 0, "retention_loss": 1.0})
    for step in range(1, 20):
        metrics.write({"step": step, "loss": 1 / step, "loss_policy": 1 / step, "lr": 0.1})
    draw_curves(metrics.path, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 300
