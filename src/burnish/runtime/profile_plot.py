"""The figure of a profile: one bar, cut into stages and passes, with the tails beside it."""

from pathlib import Path
from typing import Any

from burnish.core.figures import new_figure, save_figure

COLOURS = {
    "preprocess": "#9aa5b1", "vision": "#2b6cb0", "prompt": "#2f855a", "passes": "#dd6b20", "head": "#b83280",
    "postprocess": "#718096", "host": "#cbd5e0",
}  # fmt: skip


def draw(outcome: dict[str, Any], path: Path) -> None:
    """Write a PNG of the median milliseconds of every stage, passes one by one.

    Args:
        outcome: as `burnish policy profile --json` prints it.
        path: where.
    """
    figure = new_figure(9, 2.6)
    axes = figure.subplots()
    left = 0.0
    for name, figures in outcome["stages"].items():
        parts = [each["median"] for each in outcome["each_pass"]] if name == "passes" else [figures["median"]]
        for i, width in enumerate(parts):
            label = f"{name} {sum(parts):.1f} ms" if i == 0 else None
            axes.barh(0, width, left=left, color=COLOURS[name], edgecolor="white", linewidth=0.6, label=label)
            left += width
    for mark, style in (("median", "-"), ("p95", "--"), ("p99", ":")):
        axes.axvline(outcome["total"][mark], color="black", linestyle=style, linewidth=1, label=f"undisturbed, {mark}")
    axes.axvline(outcome["first_action"]["median"], color="#c53030", linewidth=1.5, label="first action, median")
    axes.set_yticks([])
    axes.set_xlabel("milliseconds of one call")
    axes.set_title(
        f"{outcome['policy']} ({outcome['type']}): {outcome['passes']:g} forward passes, "
        f"{outcome['rows']:g} token positions, {outcome['actions_per_second']:.0f} actions/s, "
        f"{outcome['replans_per_second']:.1f} replans/s", fontsize=10
    )  # fmt: skip
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False)
    save_figure(figure, path, dpi=140)
