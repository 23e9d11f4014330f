"""Videos and film strips of a run, small enough to sit inside the page. And the figure of a run for a README."""

import io
from collections import Counter
from html import escape
from pathlib import Path

import av
from PIL import Image

from burnish.core.errors import BurnishError
from burnish.core.figures import new_figure, save_figure
from burnish.report.html import data_uri, file_uri, png_uri
from burnish.report.plots import percent
from burnish.report.run_folder import Evaluation, Film, load_run

MAX_VIDEO_BYTES = 1_500_000
MAX_PAGE_BYTES = 16_000_000
MAX_STRIP_WIDTH = 1600
STRIP_FRAMES = 8
MOST_KEPT = 8 * STRIP_FRAMES


def films(one: Evaluation, limit: int = 8) -> str:
    """Figures of what was filmed in one evaluation, at most `limit`, as evenly over the tasks as they come.

    A small video is put in as it is, a large one as a strip of its frames.
    """
    figures, used = [], 0
    for film in one.films:
        if len(figures) == limit or used > MAX_PAGE_BYTES:
            break
        body = _body(film.video, film.strip)
        used += len(body)
        if body:
            wide = ' class="wide"' if body.startswith("<img") else ""
            figures.append(f"<figure{wide}>{body}<figcaption>{_caption(film)}</figcaption></figure>")
    return f'<div class="films">{"".join(figures)}</div>' if figures else ""


def _body(video: Path | None, strip: Path | None) -> str:
    """The element that shows a recording, "" when nothing of it can be read."""
    if video and video.stat().st_size <= MAX_VIDEO_BYTES:
        return f'<video src="{file_uri(video)}" controls muted loop playsinline preload="metadata"></video>'
    source = picture(strip) if strip else _strip_of(video) if video else ""
    return f'<img src="{source}" alt="frames of the episode, from first to last">' if source else ""


def _caption(film: Film) -> str:
    mark = f'<span class="{"ok" if film.success else "fail"}">{"solved" if film.success else "failed"}</span>'
    return f"{mark} · {escape(film.instruction)} · state {escape(film.initial_state)}"


def read_picture(path: Path) -> Image.Image | None:
    """An RGB image; None where the file is broken, or a monster."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def picture(strip: Path) -> str:
    """A picture as a data URI, a very wide one scaled down; "" where it cannot be read."""
    small = read_picture(strip)
    if small is None:
        return ""
    if small.width <= MAX_STRIP_WIDTH and strip.stat().st_size < MAX_VIDEO_BYTES:
        return file_uri(strip)
    small.thumbnail((MAX_STRIP_WIDTH, MAX_STRIP_WIDTH))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg")


def _strip_of(video: Path) -> str:
    """Evenly spaced frames of a video side by side; empty when it cannot be read."""
    import numpy as np

    frames, step = [], 1
    try:
        with av.open(str(video.absolute()), format="mp4") as container:
            stride = max(1, container.streams.video[0].width * STRIP_FRAMES // MAX_STRIP_WIDTH)
            for index, frame in enumerate(container.decode(video=0)):
                if index % step == 0:
                    frames.append(frame.to_ndarray(format="rgb24")[::stride, ::stride])
                if len(frames) == MOST_KEPT:  # of a long film every second, then every fourth, ...
                    frames, step = frames[::2], 2 * step
    except (av.FFmpegError, IndexError):
        return ""
    if not frames:
        return ""
    picked = np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)
    return png_uri(np.ascontiguousarray(np.concatenate([frames[i] for i in picked], axis=1)))


COLOURS = {"tuned": "#0f766e", "base": "#8a929c", "swap": "#c2580c", "expert": "#7c5cbf"}
ROWS = 3


def write_figure(run_folder: Path | str, out: Path | str) -> Path:
    """Draw at most three solved episodes of the tuned policy in `run_folder`, and all success rates, as the PNG `out`.

    Raises:
        BurnishError: the run holds no evaluation of the tuned policy with film strips.
    """
    run = load_run(Path(run_folder))
    tuned = run.evaluations.get("tuned")
    strips = _strips(tuned) if tuned else []
    if not strips:
        raise BurnishError(f"no film strips of solved episodes under {run.path}/eval/tuned",
                           "an evaluation that was filmed and succeeded at least once")  # fmt: skip
    rates = [one for one in run.evaluations.values() if one.variant != "swap"]
    heights = [*[1.5] * len(strips), 0.35 + 0.36 * len(rates)]
    figure = new_figure(9, sum(heights) + 0.5)
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (image, text) in zip(axes, strips, strict=False):
        axis.imshow(image, interpolation="lanczos")
        axis.set_title(text, loc="left", fontsize=10, color="#1c2127", parse_math=False)
        axis.axis("off")
    _draw_rates(axes[-1], rates)
    out = Path(out)
    save_figure(figure, out)
    return out


def _strips(one: Evaluation) -> list[tuple]:
    """(image, instruction) of solved episodes, a task at a time before any task comes twice."""
    seen: Counter[str] = Counter()
    ranked = []
    for film in one.films:
        image = read_picture(film.strip) if film.success and film.strip else None
        if image is not None:
            seen[film.task] += 1
            ranked.append((seen[film.task], image, film.instruction))
    return [pair for _, *pair in sorted(ranked, key=lambda one: one[0])[:ROWS]]


def _draw_rates(axis, rates: list[Evaluation]) -> None:
    for place, one in enumerate(rates):
        colour, rate = COLOURS[one.role], one.overall
        axis.plot([rate.low, rate.high], [place, place], color=colour, linewidth=7, alpha=0.3, solid_capstyle="round")
        axis.plot(rate.rate, place, "o", color=colour, markersize=8)
        label = f"{percent(rate.rate)} ({rate.successes}/{rate.n})"
        axis.text(1.02, place, label, va="center", fontsize=9, color="#68717d", transform=axis.get_yaxis_transform())
    axis.set_yticks(range(len(rates)), [one.label for one in rates], fontsize=9, parse_math=False)
    axis.set_ylim(len(rates) - 0.5, -0.5)
    axis.set_xlim(-0.01, 1.01)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"], fontsize=8, color="#68717d")
    axis.grid(axis="x", color="#e4e2dc")
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    axis.set_title("success on unseen initial states, 95 % Wilson interval", loc="left", fontsize=10, color="#1c2127")
