"""One self-contained page for a run folder."""

from datetime import datetime
from html import escape
from pathlib import Path

from burnish.core.errors import BurnishError
from burnish.core.files import write_text
from burnish.core.reading import read_text
from burnish.report import sections
from burnish.report.html import document, header
from burnish.report.run_folder import RunFolder, load_run
from burnish.report.sections import offline


def write_report(run_folder: Path | str, out: Path | str | None = None) -> Path:
    """Write the page of a run; it needs no network and no other file.

    Args:
        run_folder: what `burnish run` (or train and eval by hand) wrote. Every part of it is optional:
            run.json, recipe.yaml, metrics.jsonl, retention.json, eval/<variant>/{summary.json, *.mp4, *_strip.png}.
        out: where the page goes; report.html in the run folder when not given.

    Returns:
        The path of the page.

    Raises:
        BurnishError: no such folder, nothing in it to report, a malformed file, or no room to write.
    """
    run = load_run(Path(run_folder))
    target = Path(out) if out else run.path / "report.html"
    if not out and target.is_file() and "burnish</title>" not in read_text(target)[:2000]:
        raise BurnishError(f"{target} is another page", "none, or one of ours", "--out PAGE.html")
    write_page(target, render(run))
    return target


def render(run: RunFolder) -> str:
    parts = (
        sections.headline, sections.success, offline, sections.recordings, sections.tasks, sections.failures,
        sections.swap, sections.retention, sections.training, sections.latency, sections.reproduce,
    )  # fmt: skip
    return document(f"{run.name} · burnish", _header(run), "".join(part(run) for part in parts))


def _header(run: RunFolder) -> str:
    info = run.info
    when = str(info.get("date") or info.get("when") or "")
    if not when:
        newest = max((file.stat().st_mtime for file in run.path.glob("*.json*")), default=run.path.stat().st_mtime)
        when = datetime.fromtimestamp(newest).strftime("%Y-%m-%d %H:%M")
    commit = str(info.get("commit") or "")
    dirty = " (changed)" if commit.endswith("+") else ""
    parts = [when, sections.flat(info.get("hardware")), f"commit {commit[:10]}{dirty}" if commit else ""]
    line = " · ".join(part for part in parts if part)
    return header("burnish", run.name, line, _stages(info.get("stages") or []))


def _stages(stages: list[dict]) -> str:
    minutes = [(str(stage.get("name", "")), float(stage.get("minutes") or 0)) for stage in stages]
    total = sum(length for _, length in minutes)
    if not total:
        return ""
    bars = "".join(f'<i style="flex:{length:.3f}" title="{escape(name)}"></i>' for name, length in minutes)
    names = "".join(f"<span><i></i>{escape(name)} {length:.1f} min</span>" for name, length in minutes)
    return f'<div class="stages" aria-hidden="true">{bars}</div><div class="stage-names">{names}</div>'


def write_page(target: Path, text: str) -> None:
    """Write a page, all or nothing: a reader never sees half of it."""
    try:
        write_text(target, text)
    except OSError as error:
        raise BurnishError(f"cannot write {target} ({error.strerror})") from None
