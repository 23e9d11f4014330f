"""What the vectors of a data set show, as text and as sections of the inspection's page."""

from pathlib import Path

import numpy as np

from burnish.data.curate import Curation, curate
from burnish.data.dataset import Dataset, open_dataset
from burnish.data.search import build
from burnish.data.streamed import Shape, StreamedFrames
from burnish.data.vectors import META, encode_dataset, load_vectors, make_encoder
from burnish.methods.retrieve.options import make_config
from burnish.methods.retrieve.train import train_head
from burnish.report.html import png_uri, section, table
from burnish.report.plots import Series, line_plot

SHOWN, EDGE = 8, 128


def curate_dataset(root: Path, spec: str) -> tuple[list[str], str]:
    """Lines for a terminal and sections of a page; `spec` is an encoder, or the folder of an index of this data set."""
    data = open_dataset(root)
    index = Path(spec)
    if (index / META).is_file():
        made = load_vectors(index)
    else:
        features = encode_dataset(root, make_encoder(spec))
        made = build(features, train_head(features, make_config("raw", {}))[0])
    found = curate(made, data.fps)
    return as_lines(found), as_sections(found, _pictures(data, found, made.about["cameras"][0]))


def as_lines(found: Curation) -> list[str]:
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


def _pictures(data: Dataset, found: Curation, camera: str) -> dict[int, np.ndarray]:
    """A picture of every episode that is shown, of its middle frame."""
    key = next(name for name in data.camera_keys if name.removeprefix("observation.images.") == camera)
    frames = StreamedFrames.open(data, key, Shape.of(data, key, EDGE, 0), list(data.episodes))
    pairs = [episode for one, other, _ in found.duplicates[:SHOWN] for episode in (one, other)]
    named = [*pairs, *(e for e, _ in found.outliers[:SHOWN]), *(one[0] for one in found.idle[:SHOWN])]
    named += found.cover[:SHOWN]
    return {episode: np.asarray(frames[[found.rows[episode]]])[0] for episode in dict.fromkeys(named)}


def as_sections(found: Curation, pictures: dict[int, np.ndarray]) -> str:
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
