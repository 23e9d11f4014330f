"""What `inspect_dataset` and a curation found, as text for a terminal and as a page."""

from html import escape
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING

import numpy as np

from burnish.core.errors import plain
from burnish.data.dataset import Dataset, open_named
from burnish.data.features import IMAGES
from burnish.data.inspect import Dimension, Inspection
from burnish.report.html import document, facts, header, png_uri, section, table
from burnish.report.plots import Series, line_plot

if TYPE_CHECKING:
    from burnish.data.search import Curation

SCHEMES = {"min_max": "min/max", "quantiles": "1-99 %", "mean_std": "3 std"}


def as_summary(found: Inspection) -> str:
    """What it is, and what is wrong with it."""
    head = [f"{found.root}  LeRobotDataset {found.version}", ""]
    return "\n".join([*head, *(f"{name:<14}{plain(value)}" for name, value in _overview(found)), "", *_remarks(found)])


def _remarks(found: Inspection) -> list[str]:
    return [plain(_verdict(found)), *(plain(f"  {p.kind:<8} {p.where}: {p.sentence}") for p in found.problems)]


def as_text(found: Inspection) -> str:
    out = [f"{found.root}  LeRobotDataset {found.version}", ""]
    out += [f"{name:<14}{value}" for name, value in _overview(found)]
    out += ["", "views"]
    for view in found.views:
        size = f"{view.size[0]}x{view.size[1]}" if view.size else "unreadable"
        out.append(f"  {view.name:<32} {size:<10} {view.codec:<18} {view.megabytes:8.1f} MB  {view.orientation}")
    out += ["", "instructions (episodes, share of frames)"]
    shown = list(found.instructions.items())[:20]
    out += [f"  {count:>6} {100 * found.frame_shares[text]:>6.1f} %  {text}" for text, count in shown]
    if len(found.instructions) > len(shown):
        out.append(f"          ... and {len(found.instructions) - len(shown)} more")
    for title, dimensions in (("action", found.actions), ("state", found.states)):
        if dimensions:
            out += ["", *_dimension_lines(title, dimensions)]
    out += ["", *_remarks(found)]
    return "\n".join(map(plain, out))


def _overview(found: Inspection) -> list[tuple[str, str]]:
    lengths = found.lengths
    seconds, median = lengths / found.fps, median_high(lengths.tolist())
    pairs = [
        ("episodes", f"{len(lengths)}, {lengths.sum()} frames, {seconds.sum() / 60:.1f} minutes at {found.fps:g} fps"),
        ("lengths", f"{lengths.min()} to {lengths.max()} frames, median {median} ({median / found.fps:.1f} s)"),
        ("control", f"{found.control or 'unknown'} (guessed from states and actions)"),
    ]
    if not found.actions:
        return pairs
    if found.gripper:
        sign = {"+": "large values open", "-": "small values open", "": "which sign opens is unclear"}
        pairs.append(("gripper", f"{found.gripper.name}: {sign[found.gripper.opens]} ({found.gripper.evidence})"))
    idle = f"{100 * found.idle_share:.1f} % of actions; {found.idle_start:.0f} frames at an episode's start"
    repeated = f"{100 * found.repeated_share:.1f} % of frames equal the one before in state and action"
    return [*pairs, ("idle", idle), ("repeated", repeated)]


def _dimension_lines(title: str, dimensions: list[Dimension]) -> list[str]:
    schemes = [name for name in SCHEMES if any(name in one.outside for one in dimensions)]
    head = f"{title:<20}{'min':>10}{'max':>10}{'mean':>10}{'std':>10}"
    head += "".join(f"{'outside ' + SCHEMES[name]:>17}" for name in schemes)
    lines = [head]
    for one in dimensions:
        line = f"  {one.name[:17]:<18}{one.low:>10.4g}{one.high:>10.4g}{one.mean:>10.4g}{one.std:>10.4g}"
        shares = (f"{100 * one.outside[name]:.2f} %" if name in one.outside else "" for name in schemes)
        lines.append(line + "".join(f"{share:>17}" for share in shares))
    return lines


def _verdict(found: Inspection) -> str:
    errors = sum(problem.kind == "error" for problem in found.problems)
    rest = len(found.problems) - errors
    if not found.problems:
        return "nothing wrong was found"
    return f"{errors} error{'s' * (errors != 1)}, {rest} other remark{'s' * (rest != 1)}"


def as_html(found: Inspection, more: str = "") -> str:
    """The same with thumbnails, as one self-contained page; `more` are further sections."""
    name = found.root.resolve().name
    marks = {"error": "fail", "warning": "warn", "hint": "ok"}
    rows = [
        [f'<span class="{marks[p.kind]}">{p.kind}</span>', escape(p.where), escape(p.sentence)] for p in found.problems
    ]
    head = header("burnish data inspect", name, f"LeRobotDataset {found.version} · {_verdict(found)}")
    parts = [
        section("Overview", facts(_overview(found))),
        section("Remarks", table(["kind", "where", "what"], rows)) if rows else "",
    ]
    for view in found.views:
        images = "".join(f'<img src="{png_uri(image)}" alt="a frame of it">' for image in view.thumbnails)
        size = f"{view.size[0]} x {view.size[1]}, {view.codec}" if view.size else "unreadable"
        lead = f"{size}. {view.orientation}"
        parts.append(section(view.name, f'<div class="thumbs">{images}</div>' if images else "<p></p>", lead=lead))
    counts = [
        [escape(text), str(count), f"{100 * found.frame_shares[text]:.1f} %"]
        for text, count in found.instructions.items()
    ]
    parts.append(section("Instructions", table(["text", "episodes", "frames"], counts, numbers=(1, 2))))
    for title, dimensions in (("Actions", found.actions), ("States", found.states)):
        parts.append(_dimension_section(title, dimensions))
    return document(f"{name} · burnish data inspect", head, "".join([*parts, more]))


def _dimension_section(title: str, dimensions: list[Dimension]) -> str:
    if not dimensions:
        return ""
    schemes = [name for name in SCHEMES if any(name in one.outside for one in dimensions)]
    rows = []
    for one in dimensions:
        shares = [f"{100 * one.outside[name]:.2f} %" if name in one.outside else "" for name in schemes]
        rows.append([escape(one.name), *(f"{x:.4g}" for x in (one.low, one.high, one.mean, one.std)), *shares])
    head = ["", "min", "max", "mean", "std", *(f"outside {SCHEMES[name]}" for name in schemes)]
    return section(title, table(head, rows, numbers=range(1, len(head))))


SHOWN, EDGE = 8, 128


def curate_dataset(root: Path, spec: str) -> tuple[list[str], str]:
    """Lines for a terminal and sections of a page; `spec` is an encoder, or the folder of an index of this data set."""
    from burnish.data.search import build, curate
    from burnish.data.vectors import META, encode_dataset, load_vectors, make_encoder
    from burnish.methods.retrieve.options import make_config
    from burnish.methods.retrieve.train import train_head

    data = open_named(root)
    index = Path(spec)
    if (index / META).is_file():
        made = load_vectors(index)
        made.require_of(data, index)
    else:
        features = encode_dataset(root, make_encoder(spec))
        made = build(features, train_head(features, make_config("raw", {}))[0])
    found = curate(made, data.fps)
    return as_lines(found), as_sections(found, _pictures(data, found, made.about["cameras"][0]))


def as_lines(found: "Curation") -> list[str]:
    """What the terminal shows."""
    out = [f"curation by {found.encoder}: an episode's nearest is at {found.typical:.4f} (1 - cosine, median)"]
    pairs = [f"{one} and {other} ({far:.4f})" for one, other, far in found.duplicates[:SHOWN]]
    out.append(f"near-duplicates  {_some(pairs, found.duplicates)}")
    out.append(f"outliers         {_some([f'{e} ({far:.4f})' for e, far in found.outliers[:SHOWN]], found.outliers)}")
    parts = [f"{e}: {first} to {last} ({seconds:.1f} s)" for e, first, last, seconds in found.idle[:SHOWN]]
    out.append(f"idle stretches   {_some(parts, found.idle)}; {100 * found.idle_share:.1f} % of frames")
    marks = [k for k in (1, 2, 5, 10, 20, 50) if k <= len(found.radii)]
    cover = ", ".join(f"{k}: {found.radii[k - 1]:.4f}" for k in marks)
    out.append(f"coverage         farthest episode after k centres, {cover}")
    return out


def _some(parts: list[str], whole: list) -> str:
    more = len(whole) - len(parts)
    return ("; ".join(parts) or "none") + (f"; and {more} more" if more else "")


def _pictures(data: Dataset, found: "Curation", camera: str) -> dict[int, np.ndarray]:
    """A picture of every episode that is shown, of its middle frame."""
    from burnish.data.streamed import Shape, StreamedFrames

    key = next(name for name in data.camera_keys if name.removeprefix(IMAGES) == camera)
    frames = StreamedFrames.open(data, key, Shape.of(data, key, EDGE, 0), list(data.episodes))
    pairs = [episode for one, other, _ in found.duplicates[:SHOWN] for episode in (one, other)]
    named = [*pairs, *(e for e, _ in found.outliers[:SHOWN]), *(one[0] for one in found.idle[:SHOWN])]
    named += found.cover[:SHOWN]
    return {episode: np.asarray(frames[[found.rows[episode]]])[0] for episode in dict.fromkeys(named)}


def as_sections(found: "Curation", pictures: dict[int, np.ndarray]) -> str:
    """Sections of the page, each with thumbnails."""

    def cell(episode: int) -> str:
        return f'<img src="{png_uri(pictures[episode])}" alt="" width="96"> {episode}'

    def rows(head: list[str], cells: list[list[str]]) -> str:
        return table(head, cells, numbers=(len(head) - 1,)) if cells else "<p>none</p>"

    duplicates = [[cell(one), cell(other), f"{far:.4f}"] for one, other, far in found.duplicates[:SHOWN]]
    outliers = [[cell(episode), f"{far:.4f}"] for episode, far in found.outliers[:SHOWN]]
    idle = [[cell(e), f"{first} to {last}", f"{seconds:.1f} s"] for e, first, last, seconds in found.idle[:SHOWN]]
    curve = line_plot([Series(range(1, len(found.radii) + 1), found.radii)], from_zero=True, axis="episodes")
    images = "".join(f'<img src="{png_uri(pictures[e])}" alt="episode {e}">' for e in found.cover[:SHOWN])
    typical = f"Vectors of {found.encoder}; an episode's nearest is at {found.typical:.4f} (1 - cosine, median)."
    return "".join([
        section("Near-duplicate episodes", rows(["episode", "and", "distance"], duplicates), lead=typical),
        section("Outliers", rows(["episode", "distance to the nearest"], outliers)),
        section("Idle stretches", rows(["episode", "frames", "time"], idle),
                lead=f"{100 * found.idle_share:.1f} % of frames are in stretches in which no view changes."),
        section("Coverage", curve, f'<div class="thumbs">{images}</div>',
                lead="How far the farthest episode is from the nearest of the first k that cover the data set best; "
                f"below the first of them: {', '.join(map(str, found.cover[:SHOWN]))}."),
    ])  # fmt: skip
