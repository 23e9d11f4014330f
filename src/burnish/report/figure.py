"""One figure of a run for a README: film strips with their instructions, and the success rates below."""

from collections import Counter
from pathlib import Path

from burnish.core.errors import BurnishError
from burnish.core.figures import new_figure, save_figure
from burnish.report.media import read_picture
from burnish.report.plots import percent
from burnish.report.run_folder import Evaluation, load_run

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
