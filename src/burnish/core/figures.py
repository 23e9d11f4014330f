"""Figures: one matplotlib set-up for all, without a screen and without pyplot's global state."""

from pathlib import Path
from typing import TYPE_CHECKING

from burnish.core.files import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, *, constrained: bool = True) -> "Figure":
    """An empty white figure of that many inches; not `constrained`, its space between axes is the caller's."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained" if constrained else None, facecolor="white")


def save_figure(figure: "Figure", path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG, or as SVG where the name ends so, whole or not at all."""
    svg = path.suffix.lower() == ".svg"
    with new_file(path) as file:
        figure.savefig(file, format="svg" if svg else "png", dpi=dpi)
