"""A study as a page: what was settled before its first run, its endpoint as intervals, and its table."""

from html import escape
from pathlib import Path

from burnish.core.reading import read_object
from burnish.experiments.results import check_result, readable, render_table
from burnish.experiments.variants import ALIASES, MAIN
from burnish.report.html import document, header, section, table
from burnish.report.page import write_page
from burnish.report.plots import IntervalRow, interval_plot, percent

ROLES = {"better": "tuned", "worse": "swap", "equivalent": "expert"}


def write_study_page(result: Path, out: Path | None = None) -> Path:
    """Write the page of a result file, NAME.html in the present folder unless `out` says another place.

    Raises:
        BurnishError: no such file, or no result of ours.
    """
    content = read_object(result)
    check_result(content, str(result))
    with readable(str(result)):
        name = content.get("declared", {}).get("endpoint", MAIN)
        rows = [row for row in content["rows"] if row.get("eval", MAIN) == ALIASES.get(name, name) and "rate" in row]
        shown = [
            IntervalRow(str(row["label"]), row["rate"], *row["interval"],
                        f"{percent(row['rate'])}  (n={row['n']})  {row.get('verdict', '')}",
                        ROLES.get(row.get("verdict", ""), "base"))
            for row in rows
        ]  # fmt: skip
        blocks = [block.splitlines() for block in render_table([result.stem], result.parent).split("\n\n")]
        parts = [_table(lines) if lines[0].startswith("| ") else _words(lines) for lines in blocks if lines]
    title = str(content["recipe"]) or result.stem
    body = section("Endpoint" if "declared" in content else "Success", interval_plot(shown) if shown else "")
    target = out or Path(f"{result.stem}.html")
    head = header("burnish study", title, f"{content['date']} · {content['hardware']}")
    write_page(target, document(f"{title} · burnish", head, body + section("Every measure", *parts)))
    return target


def _table(lines: list[str]) -> str:
    """A table as `experiments.results` writes them in markdown."""
    head, _, *rows = ([cell.replace("\\|", "|") for cell in line[2:-2].split(" | ")] for line in lines)
    return table(head, [list(map(escape, row)) for row in rows], range(1, len(head)))


def _words(lines: list[str]) -> str:
    return "".join(f"<p>{escape(line.removeprefix('- ').replace('**', '').replace('`', ''))}</p>" for line in lines)
