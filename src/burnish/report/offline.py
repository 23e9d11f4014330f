"""The part of a run's page about held-out episodes: how far the policy is from what was recorded."""

from html import escape
from typing import Any

from burnish.evaluate.offline_scores import FIGURES, shown
from burnish.report.html import section, table
from burnish.report.media import picture
from burnish.report.plots import Series, line_plot
from burnish.report.run_folder import VARIANTS, RunFolder


def tile(run: RunFolder) -> list[tuple[str, str, str]]:
    """Kind, figure and text for the head of the page."""
    figures = run.offline.get("offline", {}).get("figures", {})
    error, mean = (shown([*(figures.get(name) or [None])[:1], None, None]) for name in ("error", "mean"))
    return [("main", error, f"action error, held-out\nthe mean action: {mean}")] * bool(figures)


def offline(run: RunFolder) -> str:
    """Every figure with its interval, error by step and by dimension, plots of episodes."""
    if not run.offline:
        return ""
    found = list(run.offline.values())
    head = ["", *(VARIANTS.get(name, (name,))[0] for name in run.offline)]
    rows = [[escape(text), *(shown(one["figures"].get(name)) for one in found)] for name, text in FIGURES.items()
            if any(one["figures"].get(name) for one in found)]  # fmt: skip
    names = list(found[0]["by_dimension"])
    dims = [[escape(name), *(shown(one["by_dimension"].get(name)) for one in found)] for name in names]
    curves = line_plot([curve for name, one in run.offline.items() for curve in _curve(name, one)], from_zero=True)
    pictures = [(text, picture(path)) for text, path in found[0]["plots"] if path]
    plots = [f'<figure class="wide"><img src="{uri}" alt="recorded and predicted actions"><figcaption>{escape(text)}'
             "</figcaption></figure>" for text, uri in pictures if uri]  # fmt: skip
    lead = (
        f"{found[0]['calls']} chunks predicted along {found[0]['episodes']} recorded episodes; intervals are over "
        "episodes, errors in standard deviations of the recorded actions. They do not tell how often a robot succeeds."
    )
    return section(
        "Held-out episodes", table(head, rows, range(1, len(head))),
        f"<h3>Action error by step of a chunk</h3>{curves}" if curves else "",
        "<h3>Action error by dimension, in its own units</h3>", table(head, dims, range(1, len(head))),
        f'<div class="films">{"".join(plots)}</div>' if plots else "", lead=lead,
    )  # fmt: skip


def _curve(name: str, one: dict[str, Any]) -> list[Series]:
    points = [(step, value[0]) for step, value in enumerate(one["by_horizon"]) if value]
    role = VARIANTS.get(name, ("", "faint"))[1]
    return [Series(*zip(*points, strict=True), role=role)] if len(points) > 1 else []
