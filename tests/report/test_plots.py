"""Charts: the numbers end up where they belong."""

import math
import re

from hypothesis import example, given
from hypothesis import strategies as st

from burnish.report.plots import (
    IntervalRow,
    Series,
    _log_ticks,
    _ticks,
    interval_plot,
    line_plot,
    percent,
    short_number,
    smooth,
)

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(finite, finite)
def test_ticks_are_round_and_cover_the_range(a, b):
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(1.0, abs(high)):
        high = low + 1.0
    ticks = _ticks(low, high)
    slack = 1e-6 * (high - low) + 1e-9
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 9
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert max(steps) - min(steps) <= 1e-6 * max(steps) + 1e-9


@given(st.floats(1e-8, 1e8), st.floats(1, 1e6))
@example(0.02, 1.0)
def test_log_ticks_cover_the_range(low, factor):
    ticks = _log_ticks(low, low * factor)
    assert ticks == sorted(ticks) and len(ticks) >= 2
    assert ticks[0] <= low * 1.0001 and ticks[-1] >= low * factor * 0.9999


def test_interval_plot_places_dot_and_interval():
    plot = interval_plot([IntervalRow("a & b", 0.5, 0.0, 1.0, role="tuned")])
    assert 'cx="50.00%"' in plot and 'x1="1.50%" x2="98.50%"' in plot and "a &amp; b" in plot


def test_line_plot_maps_corners_and_skips_what_is_not_finite():
    plot = line_plot([Series([0, 1, 2, 3], [0.0, math.nan, math.inf, 4.0])])
    path = re.search(r'class="curve" d="([^"]+)"', plot).group(1)
    assert path == "M0.0 1000.0L1000.0 0.0"


def test_line_plot_on_a_log_axis():
    plot = line_plot([Series([0, 1, 2], [1.0, 10.0, 100.0])], log_y=True)
    assert 'd="M0.0 1000.0L500.0 500.0L1000.0 0.0"' in plot


def test_empty_and_single_point():
    assert line_plot([Series([], [])]) == ""
    assert line_plot([Series([0.0], [math.nan])]) == ""
    assert "point" in line_plot([Series([5.0], [0.3])])


def test_long_curves_are_thinned_and_keep_their_end():
    plot = line_plot([Series(range(100_000), [float(i) for i in range(100_000)])])
    path = re.search(r'class="curve" d="([^"]+)"', plot).group(1)
    assert path.count("L") <= 301 and path.endswith("1000.0 0.0")


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=60))
def test_smooth_stays_within_the_data(values):
    out = smooth(values, 0.2)
    assert len(out) == len(values)
    assert min(out) >= min(values) - 1e-9 and max(out) <= max(values) + 1e-9


def test_numbers_read_well():
    assert [short_number(x) for x in (0, 0.5, 12_000, 0.00002, 950, 1234)] == ["0", "0.5", "12k", "2e-5", "950", "1234"]
    assert percent(0.873).replace("\u202f", " ") == "87 %"
    assert percent(0.999).replace("\u202f", " ") == "99.9 %"
