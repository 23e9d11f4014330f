"""The endpoint of a study as a figure: a mean with its interval for each variant, the seeds as dots."""

from pathlib import Path

from burnish.core.errors import BurnishError
from burnish.core.figures import new_figure, save_figure
from burnish.core.reading import read_object
from burnish.experiments.results import check_result, readable
from burnish.experiments.variants import ALIASES, MAIN

COLOURS = {"better": "#0f766e", "worse": "#b4262a", "equivalent": "#2563a8"}
PLAIN = "#8a929c"


def write_intervals(result: Path, out: Path = Path("intervals.png"), measure: str = "") -> Path:
    """Draw a measure of a study (its endpoint unless another is named); colours are verdicts, letters at the right.

    `result` is that of a study, e.g. results/tabletop/replay.json; `out` a PNG or SVG.

    Raises:
        BurnishError: no such result, or no such measure in it.
    """
    if not result.is_file():
        raise BurnishError(f"{result} does not exist", "a file that `burnish run STUDY` wrote")
    content = read_object(result)
    check_result(content, str(result))
    with readable(str(result)):
        name = measure or content.get("declared", {}).get("endpoint", "success")
        rows = [row for row in content["rows"] if row.get("eval", MAIN) == ALIASES.get(name, name)]
        known = ", ".join(dict.fromkeys(row.get("eval", MAIN) for row in content["rows"]))
        if not rows:
            raise BurnishError(f"{result} has no measure '{name}'", f"one of {known}")
        figure = new_figure(7, 0.9 + 0.36 * len(rows))
        axis = figure.subplots()
        share = "rate" in rows[0]
        scale = 100 if share else 1
        for place, row in enumerate(rows):
            colour = COLOURS.get(row.get("verdict", ""), PLAIN)
            mean = scale * row["rate" if share else "mean"]
            if row["interval"]:
                ends = [scale * end for end in row["interval"]]
                axis.plot(ends, [place, place], color=colour, linewidth=7, alpha=0.3, solid_capstyle="round")
            seeds = [scale * one for one in row.get("by_seed", [])]
            axis.plot(seeds, [place] * len(seeds), "o", color=colour, markersize=4, alpha=0.7)
            axis.plot(mean, place, "|", color=colour, markersize=16, markeredgewidth=2)
            words = [row.get("verdict", ""), row.get("letters", "")]
            axis.text(1.02, place, "  ".join(filter(None, words)), va="center", fontsize=9, color="#68717d",
                      transform=axis.get_yaxis_transform(), parse_math=False)  # fmt: skip
        axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9, parse_math=False)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="x", color="#e4e2dc")
        axis.tick_params(length=0)
        axis.set_frame_on(False)
        title = f"{name}{', %' if share else ''}: mean, 95 % interval over seeds and units, seeds as dots"
        axis.set_title(title, loc="left", fontsize=9, color="#1c2127", parse_math=False)
    save_figure(figure, out)
    return out
