"""Small charts, written by hand so that a page needs no script, no font and no network.

Every chart is as wide as its container. Shapes are stretched, text has a fixed size, so a chart stays readable
on a phone; colours come from the page's style sheet (classes role-<name>), so light and dark both work.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.core.figures import new_figure, save_figure

if TYPE_CHECKING:
    from burnish.methods.align.analysis import Comparison

MAX_POINTS = 300  # more than a phone can show
MOST_VALUE = 1e100  # and 1e-100: what lies beyond has no place on an axis
NARROW = "\u202f"  # a thin space that does not break


@dataclass(frozen=True)
class IntervalRow:
    """One line of `interval_plot`: a rate in [0, 1], its interval, and what to write at the right."""

    label: str
    rate: float
    low: float
    high: float
    note: str = ""
    role: str = "base"


@dataclass(frozen=True)
class Series:
    """One curve of `line_plot`; `points` marks each of its values."""

    x: Sequence[float]
    y: Sequence[float]
    role: str = "tuned"
    points: bool = False


@dataclass(frozen=True)
class _Frame:
    """Maps values to the 1000 x 1000 canvas of a line plot."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log_y: bool

    def x(self, value: float) -> float:
        return 1000 * (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)

    def y(self, value: float) -> float:
        low, high = self.y_low, self.y_high
        if self.log_y:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return 1000 * (1 - (value - low) / ((high - low) or 1.0))


def percent(rate: float) -> str:
    """0.873 as "87 %"; one more digit where rounding would hide that it is not 0 or 1."""
    digits = 1 if 0 < rate < 0.005 or 0.995 < rate < 1 else 0
    return f"{100 * rate:.{digits}f}{NARROW}%"


def percent_range(low: float, high: float) -> str:
    """An interval as "79-92 %", with an en dash."""
    return f"{100 * low:.0f}–{100 * high:.0f}{NARROW}%"


def short_number(value: float) -> str:
    """At most three significant digits: 12k, 0.035, 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1_000_000 or abs(value) < 0.001:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def interval_plot(rows: Sequence[IntervalRow]) -> str:
    """Dots with intervals on a common 0-100 % axis, one row each, the label above its row."""
    row_height, bottom = 48, 24
    height = row_height * len(rows) + bottom
    said = [f"{one.label}: {percent(one.rate)}, 95 % interval {percent_range(one.low, one.high)}" for one in rows]
    label = escape("; ".join(said))
    out = [f'<svg class="intervals" width="100%" height="{height}" role="img" aria-label="{label}">']
    for tick in (0, 25, 50, 75, 100):
        x = _inset(tick / 100)
        anchor = {0: "start", 100: "end"}.get(tick, "middle")
        label_x = {0: "0", 100: "100%"}.get(tick, x)
        for index in range(len(rows)):
            top = row_height * index + 23
            out.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{top + 18}"/>')
        out.append(f'<text class="tick" x="{label_x}" y="{height - 6}" text-anchor="{anchor}">{tick} %</text>')
    for index, row in enumerate(rows):
        top = row_height * index
        y = top + 32
        out.append(
            f'<g class="role-{row.role}"><title>{escape(said[index])}</title>'
            f'<text class="label" x="0" y="{top + 15}">{escape(row.label)}</text>'
            f'<text class="note" x="100%" y="{top + 15}" text-anchor="end">{escape(row.note)}</text>'
            f'<line class="track" x1="{_inset(0)}" x2="{_inset(1)}" y1="{y}" y2="{y}"/>'
            f'<line class="interval" x1="{_inset(row.low)}" x2="{_inset(row.high)}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot" cx="{_inset(row.rate)}" cy="{y}" r="6.5"/></g>'
        )
    return "".join(out) + "</svg>"


def line_plot(
    series: Sequence[Series], log_y: bool = False, as_percent: bool = False, from_zero: bool = False, axis: str = "step"
) -> str:
    """Curves over training steps, or what `axis` says; values that are not finite are left out. Empty text when nothing
    is left."""
    kept = [one for one in (_clean(one, log_y) for one in series) if one.x]
    if not kept:
        return ""
    y_low, y_high = min(min(one.y) for one in kept), max(max(one.y) for one in kept)
    y_ticks = _log_ticks(y_low, y_high) if log_y else _ticks(0.0 if from_zero else y_low, y_high)
    x_low, x_high = min(one.x[0] for one in kept), max(one.x[-1] for one in kept)
    frame = _Frame(x_low, x_high, y_ticks[0], y_ticks[-1], log_y)
    grid, ticks = [], []
    for tick in y_ticks:
        y = frame.y(tick)
        text = percent(tick) if as_percent else short_number(tick)
        grid.append(f'<line class="grid" x1="0" x2="1000" y1="{y:.1f}" y2="{y:.1f}"/>')
        ticks.append(f'<span class="y" style="top:{y / 10:.2f}%">{text}</span>')
    for tick in _ticks(x_low, x_high, 4):
        x = frame.x(tick)
        if 0 <= x <= 930:  # the right end is for the name of the axis
            ticks.append(f'<span class="x" style="left:{x / 10:.2f}%">{short_number(tick)}</span>')
    ticks.append(f'<span class="x name">{escape(axis)}</span>')
    y = kept[-1].y
    said = f"curve over {axis}: begins at {short_number(y[0])}, ends at {short_number(y[-1])}, "
    said += f"lies between {short_number(min(y))} and {short_number(max(y))}"
    return (
        f'<div class="plot" role="img" aria-label="{escape(said)}">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(grid)}{''.join(_curve(one, frame) for one in kept)}</svg>{''.join(ticks)}</div>"
    )


def smooth(values: Sequence[float], share: float = 0.04) -> list[float]:
    """Centred moving average over `share` of the points, so that a noisy loss shows its course."""
    half = int(len(values) * share / 2)
    sums = [*accumulate(values, initial=0.0)]
    out = []
    for index in range(len(values)):
        first, last = max(0, index - half), min(len(values), index + half + 1)
        out.append((sums[last] - sums[first]) / (last - first))
    return out


def _inset(share: float) -> str:
    """Position of a share of the axis, leaving room at both ends for half a dot."""
    return f"{1.5 + 97 * min(max(share, 0.0), 1.0):.2f}%"


def _clean(one: Series, log_y: bool) -> Series:
    """Points of ordinary size (and, on a log axis, above 0) only, thinned to what a screen can show."""
    keep = [
        index
        for index, (x, y) in enumerate(zip(one.x, one.y, strict=True))
        if abs(x) <= MOST_VALUE and abs(y) <= MOST_VALUE and (y >= 1 / MOST_VALUE or not log_y)
    ]
    stride = math.ceil(len(keep) / MAX_POINTS) or 1
    keep = sorted({*keep[::stride], *keep[-1:]})
    return replace(one, x=[one.x[i] for i in keep], y=[one.y[i] for i in keep])


def _curve(one: Series, frame: _Frame) -> str:
    points = [(frame.x(x), frame.y(y)) for x, y in zip(one.x, one.y, strict=True)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    out = [f'<g class="role-{one.role}"><path class="curve" d="{path}"/>']
    if one.points or len(points) == 1:
        # Lines of no length with round caps stay round when the plot is stretched; circles would not.
        out.extend(f'<path class="point" d="M{x:.1f} {y:.1f}h0"/>' for x, y in points)
    return "".join(out) + "</g>"


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values from at or below `low` to at or above `high`."""
    if high - low < 1 / MOST_VALUE:
        high = low + (abs(low) if abs(low) > 1 / MOST_VALUE else 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2 and 5 times powers of ten around [low, high]; powers alone over many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(decades) > 4 else (1, 2, 5)
    marks = [factor * 10.0**decade for decade in decades for factor in factors]
    below = max((mark for mark in marks if mark <= low), default=marks[0])
    above = min((mark for mark in marks if mark >= high), default=marks[-1])
    if above == below:  # both ends on one mark
        return [below, 2 * below]
    return [mark for mark in marks if below <= mark <= above]


def draw_cka(comparison: "Comparison", pairs: Sequence[tuple[int, int]], path: Path) -> None:
    """CKA of all layers, the best one-to-one matching marked."""
    rows, columns = comparison.cka.shape
    figure = new_figure(1.6 + 0.55 * columns, 1.4 + 0.5 * rows)
    axes = figure.subplots()
    image = axes.imshow(comparison.cka, vmin=0, vmax=max(0.1, float(comparison.cka.max())), cmap="viridis")
    axes.set(xlabel="teacher layer", ylabel="student layer", xticks=range(columns), yticks=range(rows))
    for row in range(rows):
        for column in range(columns):
            text = f"{comparison.cka[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", size=7, color="white")
    for student, teacher in pairs:
        axes.plot(teacher, student, "s", mfc="none", mec="red", ms=18)
    axes.set_title(f"linear CKA over {comparison.tokens} tokens", size=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    save_figure(figure, path, dpi=130)
