"""A study as figures: what variants can do against what they still know, and its endpoint as intervals."""

from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.figures import new_figure, save_figure
from burnish.core.reading import read_object
from burnish.experiments.results import check_result, readable
from burnish.experiments.variants import ALIASES, ANSWER_LOSS, MAIN, QUESTIONS

KINDS = {MAIN: "success", QUESTIONS: "accuracy", ANSWER_LOSS: "loss"}
COLOURS = ("#0f766e", "#c2580c", "#7c5cbf", "#b4262a", "#2563a8", "#6b7280", "#a16207", "#be185d", "#15803d", "#0e7490")


def write_pareto(result: Path, out: Path = Path("pareto.png")) -> Path:
    """Draw closed-loop success against exact answers and against answer loss, one colour for each variant.

    Large marks are means over seeds, with the intervals of the result; small ones single seeds. A line joins the
    variants that no other beats in both; dotted, what the base knew before. `out` is a PNG or SVG.

    Raises:
        BurnishError: no such result, or one without both measurements.
    """
    with readable(str(result)):
        return _write_pareto(result, out)


def _write_pareto(result: Path, out: Path) -> Path:
    variants = read_variants(result)
    figure = new_figure(10, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, variants, "accuracy", "exact answers to held-out questions", +1)
    _draw(right, variants, "loss", "loss on their answers, nats per token", -1)
    for axis, value in zip((left, right), read_base(result), strict=True):
        if value is not None:
            axis.axvline(value, color="#6b7280", linestyle=":", linewidth=1)
            axis.annotate("base", (value, 1), xycoords=("data", "axes fraction"), fontsize=8, color="#6b7280")
    right.invert_xaxis()
    left.set_ylabel("closed-loop success")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, out)
    return out


def read_variants(result: Path) -> dict[str, dict[str, Any]]:
    """Variant to `success`, `accuracy` and `loss`, each a dict of rate, interval (or None) and by_seed."""
    if not result.is_file():
        raise BurnishError(f"{result} does not exist", "a file that `burnish run STUDY` wrote")
    content = read_object(result)
    variants: dict[str, dict[str, Any]] = {}
    for row in content.get("rows", []):
        kind = KINDS.get(row.get("eval", MAIN))
        if kind:
            rate = row["mean" if kind == "loss" else "rate"]
            variants.setdefault(row["label"], {})[kind] = {**row, "rate": rate}
    for name, run in content.get("metrics", {}).get("runs", {}).items():
        variant = name.rpartition("-")[0]
        if variant in variants and ANSWER_LOSS in run and "outcomes" not in variants[variant].get("loss", {}):
            losses = variants[variant].setdefault("loss", {"by_seed": [], "interval": None})  # of an earlier version
            losses["by_seed"].append(run[ANSWER_LOSS])
    wanted = {"success", "accuracy", "loss"}
    variants = {name: found for name, found in variants.items() if wanted <= found.keys()}
    if not variants:
        found = f"{result} has no variant with success and answers"
        raise BurnishError(found, "a study whose recipe sets eval.questions")
    for found in variants.values():
        found["loss"]["rate"] = sum(found["loss"]["by_seed"]) / len(found["loss"]["by_seed"])
    return variants


def read_base(result: Path) -> tuple[float | None, float | None]:
    """Exact answers and answer loss of the base, where the study asked it."""
    content = read_object(result)
    rows = [row for row in content["rows"] if (row["label"], row.get("eval")) == ("base", QUESTIONS)]
    return (rows[0]["rate"] if rows else None), content["metrics"].get("base", {}).get("answer_loss")


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other matches in both values and beats in one (more is better), in order."""
    kept = [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points.values())
    ]
    return sorted(kept, key=lambda name: points[name])


def _draw(axis: Any, variants: dict[str, dict[str, Any]], kind: str, label: str, sign: int) -> None:
    for colour, (name, found) in zip(COLOURS * 3, variants.items(), strict=False):
        x, y = found[kind], found["success"]
        low, high = y["interval"]
        across = None if x["interval"] is None else [[x["rate"] - x["interval"][0]], [x["interval"][1] - x["rate"]]]
        axis.errorbar(x["rate"], y["rate"], xerr=across, yerr=[[y["rate"] - low], [high - y["rate"]]], fmt="o",
                      color=colour, label=name, capsize=2, elinewidth=0.8, markersize=7)  # fmt: skip
        if len(x["by_seed"]) == len(y["by_seed"]):
            axis.plot(x["by_seed"], y["by_seed"], ".", color=colour, alpha=0.45, markersize=5)
    points = {name: (sign * one[kind]["rate"], one["success"]["rate"]) for name, one in variants.items()}
    best = front(points)
    x, y = ([variants[name][what]["rate"] for name in best] for what in (kind, "success"))
    axis.plot(x, y, color="#c9ced6", linewidth=1, zorder=0)
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)


VERDICTS = {"better": "#0f766e", "worse": "#b4262a", "equivalent": "#2563a8"}
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
            colour = VERDICTS.get(row.get("verdict", ""), PLAIN)
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
