"""The page of a run: complete, self-contained, made of whatever the folder holds."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from burnish import BurnishError, write_report
from burnish.cli.main import main
from burnish.report.media import write_figure

VOID = {"meta", "link", "img", "br", "line", "circle", "path"}


class Checker(HTMLParser):
    """Collects tags that are left open and every address that the page refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "poster")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run(fake_run, tmp_path) -> Path:
    return Path(shutil.copytree(fake_run, tmp_path / "run"))


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_page_shows_everything_and_needs_nothing(run):
    page = page_of(run)
    checker = Checker(page)
    assert not checker.open
    assert all(address.startswith("data:") for address in checker.addresses if address != "#content")  # skip link
    assert "http" not in page.split("<pre>")[0].replace("data:", "")
    assert sum(address.startswith("data:video/mp4") for address in checker.addresses) == 4
    assert sum(address.startswith("data:image/png") for address in checker.addresses) == 1
    text = " ".join(checker.text)
    for word in ("Success", "Tasks", "Instruction swap", "language model still knows", "Training", "Latency"):
        assert word in text
    for word in (
        "make quickstart",
        "4b3ebee0c9",
        "lerobot",
        "put-on",
        "demonstrations 4.2 min",
        "p = 0.0063",
        "put the red cube on the plate",
        "wrong object 3 3",
    ):
        assert word in text
    tuned = json.loads((run / "eval/tuned/summary.json").read_text())
    assert f"({tuned['overall']['successes']}/120)" in text


@pytest.mark.parametrize(
    "gone",
    ["run.json", "recipe.yaml", "metrics.jsonl", "retention.json", "eval", "eval/base", "eval/tuned", "eval/swap"],
)
def test_every_part_is_optional(run, gone):
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not Checker(page_of(run)).open


def test_training_folder_alone(run, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(run / "metrics.jsonl", alone)
    page = page_of(alone)
    assert "Gradient norm" in page and "l2sp" in page and "Success" not in page


def test_last_metrics_line_cut_by_a_kill_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3000, "lo')
    page_of(run)


@pytest.mark.parametrize("name", ["run.json", "retention.json", "eval/tuned/summary.json"])
def test_malformed_file_is_named(run, name):
    (run / name).write_text("{oops")
    with pytest.raises(BurnishError, match=name):
        write_report(run)
    assert not list(run.glob(".report*")) and not (run / "report.html").exists()


def test_malformed_metrics_line_is_named(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = "{"
    (run / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(BurnishError, match=r"metrics\.jsonl:4"):
        write_report(run)


def test_summary_without_counts_is_named(run):
    (run / "eval/tuned/summary.json").write_text('{"overall": {"n": 5}}')
    with pytest.raises(BurnishError, match="successes"):
        write_report(run)


def test_nothing_to_report(tmp_path):
    with pytest.raises(BurnishError, match="nothing to report"):
        write_report(tmp_path)
    with pytest.raises(BurnishError, match="no run folder"):
        write_report(tmp_path / "absent")


def test_unwritable_target(run, tmp_path):
    with pytest.raises(BurnishError, match="cannot be made"):
        (tmp_path / "file").write_text("")
        write_report(run, tmp_path / "file" / "page.html")


def test_text_is_escaped(run):
    info = json.loads((run / "run.json").read_text()) | {"name": "<script>alert(1)</script>"}
    (run / "run.json").write_text(json.dumps(info))
    assert "<script>" not in page_of(run)


def test_failed_criteria_are_said(run):
    for variant in ("tuned", "base"):
        (run / f"eval/{variant}/summary.json").write_text('{"overall": {"n": 100, "successes": 20}}')
    assert "does not lie above that of the base" in page_of(run)


def test_large_video_becomes_a_strip(run, monkeypatch):
    import burnish.report.media as media

    monkeypatch.setattr(media, "MAX_VIDEO_BYTES", 10)
    page = page_of(run)
    assert "data:video" not in page and page.count("data:image/") == 5


def test_broken_video_is_left_out(run, monkeypatch):
    import burnish.report.media as media

    monkeypatch.setattr(media, "MAX_VIDEO_BYTES", 10)
    next((run / "eval/tuned/videos").glob("*.mp4")).write_bytes(b"not a video at all")
    for strip in (run / "eval/tuned/videos").glob("*.png"):
        strip.unlink()
    assert page_of(run).count("data:image/") == 4


def test_figure_of_a_run(run, tmp_path):
    from PIL import Image

    target = tmp_path / "img/run.png"
    assert main(["report", "page", str(run), "--figure", str(target)]) == 0
    with Image.open(target) as image:
        assert image.width > 900 and image.convert("L").getextrema()[0] < 200
    shutil.rmtree(run / "eval/tuned/videos")
    with pytest.raises(BurnishError, match="no film strips"):
        write_figure(run, target)
