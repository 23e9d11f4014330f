"""The CKA heatmap of `burnish method align select`."""

from collections.abc import Sequence
from pathlib import Path

from burnish.core.figures import new_figure, save_figure
from burnish.methods.align.analysis import Comparison


def draw_cka(comparison: Comparison, pairs: Sequence[tuple[int, int]], path: Path) -> None:
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
