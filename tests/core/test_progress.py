"""Bars: drawn anew at a terminal, and in a log at most a line every ten seconds."""

import io
import sys

import pytest

from burnish.core.progress import progress_bar


class Clock:
    """Stands for tqdm's clock; a second passes with every look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.5
        return self.now


@pytest.fixture
def shown(monkeypatch):
    """`shown(work, terminal=False)`: what `work` puts on stderr, by a clock of its own."""
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    monkeypatch.setattr("tqdm.std.time", Clock())

    def run(work, terminal=False):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            work()
        return stream.getvalue()

    return run


def test_a_log_has_whole_lines_ten_seconds_apart(shown):
    def work():
        with progress_bar(total=1000, desc="train", unit="step") as bar:
            for _ in range(1000):
                bar.set_postfix_str("loss 0.1", refresh=False)
                bar.update()

    text = shown(work)
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert all(line.startswith("train: ") for line in lines)
    seconds = [int(line.split("[")[1].split("<")[0].split(":")[-1]) + 60 * int(line.split("[")[1].split(":")[0])
               for line in lines[:-1]]  # fmt: skip
    assert len(lines) > 5 and all(later - earlier >= 9 for earlier, later in zip(seconds, seconds[1:], strict=False))
    assert "1000/1000" in lines[-1] and len(text) < 20_000


def test_a_short_task_says_little_and_a_hidden_one_nothing(shown):
    assert len(shown(lambda: list(progress_bar(range(2), desc="short"))).splitlines()) <= 1
    assert shown(lambda: list(progress_bar(range(1000), desc="hidden", shown=False))) == ""


def test_a_terminal_is_drawn_anew(shown):
    assert "\r" in shown(lambda: list(progress_bar(range(1000), desc="train")), terminal=True)
