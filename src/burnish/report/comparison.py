"""Two runs, or two evaluations, side by side on one page: what differs in what they did, and in how they were made."""

import difflib
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from burnish.core.errors import BurnishError
from burnish.evaluate.compare import Comparison, OfflineComparison, compare
from burnish.evaluate.offline_scores import FIGURES
from burnish.evaluate.records import EPISODES
from burnish.report.html import document, header, section, table
from burnish.report.page import write_page
from burnish.report.plots import IntervalRow, Series, interval_plot, line_plot, percent, smooth
from burnish.report.run_folder import VARIANTS, RunFolder, load_run
from burnish.report.sections import CURVES, curve, failures_of, flat

SIDES = ("A", "B")


def write_comparison(a: Path | str, b: Path | str, out: Path | str | None = None) -> Path:
    """Write the page of two run folders, or two evaluation folders; it needs no network and no other file.

    Args:
        a, b: differences are B minus A, paired on initial states (or held-out episodes) that both have.
        out: where the page goes; comparison.html in the present folder when not given.

    Raises:
        BurnishError: a folder that cannot be read, or the two have nothing in common that could be compared.
    """
    paths = Path(a), Path(b)
    alone = all(os.path.lexists(path / EPISODES) for path in paths)
    runs = [RunFolder(path) if alone else load_run(path) for path in paths]
    known = [[*run.evaluations, *run.offline] for run in runs]
    found: dict[str, Comparison | OfflineComparison] = {}
    notes = []
    for name in ["."] if alone else [f"eval/{name}" for name in known[0] if name in known[1]]:
        label = VARIANTS.get(name[5:], (name[5:].replace("_", " ") or "trials",))[0]
        try:
            found[label] = compare(*(path / name for path in paths))
        except BurnishError as error:
            notes.append(f"{label}: {error}")
    if not found and not all(run.metrics for run in runs):
        raise BurnishError(f"{a} and {b} share nothing to compare ({'; '.join(notes) or 'no evaluation of one name'})",
                           "evaluations of the same initial states in eval/")  # fmt: skip
    names = [run.name for run in runs]
    names = [str(path) for path in paths] if names[0] == names[1] else names
    closed = {name: one for name, one in found.items() if isinstance(one, Comparison)}
    notes += [f"{name}: {word}" for name, one in closed.items() for word in one.warnings]
    evaluations = {f"{side}: {one.label}": one for side, run in zip(SIDES, runs, strict=True)
                   for one in run.evaluations.values()}  # fmt: skip
    body = [
        success(SIDES, closed),
        section("Remarks", "<ul>" + "".join(f"<li>{escape(one)}</li>" for one in notes) + "</ul>") if notes else "",
        failures_of(evaluations),
        *(_held_out(name, one) for name, one in found.items() if isinstance(one, OfflineComparison)),
        _training(runs), _made(names, runs),
    ]  # fmt: skip
    title = f"{names[0]} and {names[1]}"
    head = header("burnish", title, f"A is {names[0]}, B is {names[1]}; differences are B minus A")
    target = Path(out) if out else Path("comparison.html")
    write_page(target, document(f"{title} · burnish", head, "".join(body)))
    return target


def success(names: Sequence[str], found: Mapping[str, Comparison]) -> str:
    """Both rates of every evaluation as dots with intervals, and what the difference is worth."""
    rows, cells = [], []
    for label, one in found.items():
        r = one.overall
        for name, rate, role in zip(names, (r.rate_a, r.rate_b), ("base", "tuned"), strict=True):
            note = f"{percent(rate.rate)}  ({rate.successes}/{rate.n})"
            text = f"{name}: {label}" if len(found) > 1 else name
            rows.append(IntervalRow(text, rate.rate, rate.low, rate.high, note, role))
        ends = f"{100 * r.low:+.1f} to {100 * r.high:+.1f}"
        only = f"{r.only_a} / {r.only_b}"
        cells.append([escape(label), str(r.n), f"{100 * r.difference:+.1f}", ends, f"{r.p:.2g}", only, one.verdict])
    head = ["", "pairs", "B - A, points", "95 %", "p", "only A / only B", "verdict"]
    lead = "Share of initial states solved, with its 95 % interval; differences are paired on initial states."
    return section("Success", interval_plot(rows), table(head, cells, range(1, 6)), lead=lead) if rows else ""


def _held_out(label: str, one: OfflineComparison) -> str:
    rows = [[escape(FIGURES.get(name, f"error of {name}")), *(f"{value:.3g}" for value in one.means[name]),
             f"{d.mean:+.3g}", f"{d.low:+.3g} to {d.high:+.3g}"] for name, d in one.differences.items()]  # fmt: skip
    lead = f"{one.episodes} episodes that both were measured on; action error of B: {one.verdict}. {one.note}".rstrip()
    return section(label, table(["", *SIDES, "B - A", "95 %"], rows, range(1, 5)), lead=lead)


def _training(runs: Sequence[RunFolder]) -> str:
    charts = []
    for name, (title, log_y, as_percent) in CURVES.items():
        found = [curve(run, name) for run in runs]
        if all(len(x) > 1 for x, _ in found):
            curves = [Series(x, smooth(y), role) for (x, y), role in zip(found, ("base", "tuned"), strict=True)]
            plot = line_plot(curves, log_y=log_y and min(min(y) for _, y in found) > 0, as_percent=as_percent)
            charts.append(f"<figure><h3>{escape(title)}</h3>{plot}</figure>")
    lead = "Smoothed; A is the broken line, B the solid one."
    return section("Training", f'<div class="two">{"".join(charts)}</div>' if charts else "", lead=lead)


def _made(names: Sequence[str], runs: Sequence[RunFolder]) -> str:
    infos = [{"name": name, "folder": str(run.path), **run.info} for name, run in zip(names, runs, strict=True)]
    rows = [[key, *(escape(flat(info.get(key))) for info in infos)]
            for key in ("name", "folder", "commit", "hardware", "seeds", "date")]  # fmt: skip
    texts = [run.recipe.splitlines() for run in runs]
    lines = "\n".join(difflib.unified_diff(*texts, *SIDES, lineterm="", n=1)) or "The recipes are the same."
    shown = f'<pre class="after" tabindex="0">{escape(lines)}</pre>' if all(texts) else ""
    return section("How they were made", table(["", *SIDES], rows), shown)
