"""`burnish report`: the page of a run, a study as a figure, the tables of README and docs."""

from pathlib import Path
from typing import Annotated

from burnish.cli.parser import Arg, Group
from burnish.core.errors import BurnishError, plain


def page(
    run_folder: Path, against: Path | None = None, *, out: Path | None = None,
    figure: Annotated[Path | None, Arg(old=("--picture",), metavar="PNG")] = None,
) -> None:  # fmt: skip
    """Write the HTML page of a run, of two runs side by side, or of a study's result.

    The page is one file with everything inside; it shows what the folder holds.

    Args:
        run_folder: folder that `burnish run` or `burnish train` wrote; or the result file of a study
        against: a second run, B; differences are B minus A. Both may also be folders that `burnish eval` wrote
        out: where the page goes; default: RUN_FOLDER/report.html; of two comparison.html, of a study NAME.html
        figure: also draw film strips and success rates

    Examples:
        burnish report page runs/tabletop/quickstart
        burnish report page runs/before runs/after --out both.html
        burnish report page results/isolate/answers.json
    """
    from burnish.core.outputs import require_file
    from burnish.report.page import write_report

    study = run_folder.is_file() and not against
    default = Path("comparison.html") if against else Path(f"{run_folder.stem}.html") if study else None
    for place, kind in ((out or default, "page"), (figure, "figure")):
        if place:
            require_file(place, kind)
    if against:
        from burnish.report.comparison import write_comparison

        print(write_comparison(run_folder, against, out))
    elif study:
        from burnish.experiments.pages import write_study_page

        print(write_study_page(run_folder, out))
    else:
        print(write_report(run_folder, out))
    if figure:
        from burnish.report.media import write_figure

        print(write_figure(run_folder, figure))


def pareto(result: Path, *, output: Annotated[Path, Arg(short="-o")] = Path("pareto.png")) -> None:
    """Plot what a study's variants can do against what they still know.

    Args:
        result: result of a study whose recipe sets eval.questions
        output: PNG to write

    Example:
        burnish report pareto results/isolate/answers.json -o docs/img/isolate.png
    """
    from burnish.core.outputs import require_file
    from burnish.experiments.plots import write_pareto

    require_file(output, "figure")
    print(write_pareto(result, output))


def intervals(
    result: Path, *, output: Annotated[Path, Arg(short="-o")] = Path("intervals.png"), measure: str = ""
) -> None:
    """Plot a study's variants: means with intervals, the seeds as dots.

    Args:
        result: result of a study
        output: PNG or SVG to write
        measure: another than the study's endpoint, for instance answer_loss

    Example:
        burnish report intervals results/tabletop/replay.json -o docs/img/replay.svg
    """
    from burnish.core.outputs import require_file
    from burnish.experiments.plots import write_intervals

    require_file(output, "vector figure" if output.suffix.lower() == ".svg" else "figure")
    print(write_intervals(result, output, measure))


def results(*, root: Path = Path(), check: bool = False, recompute: bool = False) -> None:
    """Write the tables of README and docs from results/.

    Fills what stands between '<!-- results:NAME -->' and '<!-- /results -->' in README.md and docs/ of a checkout
    from results/NAME.json, and between '<!-- claims:all -->' and '<!-- /claims -->' from docs/claims.yaml.

    Args:
        root: the checkout; default: this folder
        check: change nothing; fail when a table is out of date
        recompute: first compute again what follows from the raw outcomes in results/; benches have none

    Examples:
        burnish report results --check
        burnish report results --recompute --check
    """
    from burnish.experiments.pages import update_pages

    if not (root / "README.md").is_file():
        raise BurnishError(f"no README.md in {root.resolve()}", "the root of a checkout", "--root DIR")
    if recompute:
        _recompute(root / "results", check)
    changed = update_pages(root, check=check)
    if check and changed:
        names = ", ".join(str(page) for page in changed)
        raise BurnishError(f"tables out of date in {names}", "what results/ says", "burnish report results")
    for page in changed:
        print(f"updated {page}")


def _recompute(folder: Path, check: bool) -> None:
    from burnish.experiments.recompute import recompute_results

    found = recompute_results(folder, write=not check)
    print(f"computed again from raw outcomes: {len(found.same)} the same")
    for name, different in found.changed.items():
        print(plain(f"{'' if check else 'renewed '}{name}: {different}"))
    print(plain(f"from counts alone, without raw outcomes: {', '.join(found.counted) or 'none'}"))
    print(plain(f"withdrawn or to be run again, without raw outcomes: {', '.join(found.withdrawn) or 'none'}"))
    print(f"times and sizes, whose rounds stand in their files: {len(found.benches)}")
    if check and found.changed:
        raise BurnishError(f"{len(found.changed)} results say something else than their outcomes",
                           fix="burnish report results --recompute")  # fmt: skip


COMMANDS = Group(
    "Write the page of a run, a study as a figure, the tables of README and docs.",
    {"page": page, "intervals": intervals, "pareto": pareto, "results": results},
)
