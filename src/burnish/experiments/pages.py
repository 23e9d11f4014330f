"""The generated parts of README and docs (tables of results, claims), and a study as a page."""

from html import escape
from pathlib import Path

from burnish.core.files import write_text
from burnish.core.reading import read_object, read_text
from burnish.experiments.claims import TABLE, answer_claims, fill_claims, read_claims
from burnish.experiments.results import check_result, fill, readable, render_table
from burnish.experiments.variants import ALIASES, MAIN
from burnish.report.html import document, header, section, table
from burnish.report.page import write_page
from burnish.report.plots import IntervalRow, interval_plot, percent

PAGES = ("README.md", "docs/**/*.md")


def update_pages(root: Path | str = Path(), check: bool = False) -> list[Path]:
    """Write the generated parts of README.md and docs/ under `root` from its results/ and docs/claims.yaml.

    Args:
        root: a checkout; the present folder when not given.

    Returns:
        The pages that changed (or, with `check`, would change).
    """
    root, changed = Path(root), []
    claims = read_claims(root / TABLE) if (root / TABLE).is_file() else []
    answers = answer_claims(claims, root / "results")
    for page in sorted(file for pattern in PAGES for file in root.glob(pattern)):
        before = read_text(page, root)
        after = fill_claims(fill(before, root / "results", str(page)), answers)
        if after == before:
            continue
        changed.append(page)
        if not check:
            write_text(page, after)
    return changed


ROLES = {"better": "tuned", "worse": "swap", "equivalent": "expert"}


def write_study_page(result: Path, out: Path | None = None) -> Path:
    """Write the page of a result file, NAME.html in the present folder unless `out` says another place."""
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
    head, _, *rows = ([cell.replace("\\|", "|") for cell in line[2:-2].split(" | ")] for line in lines)
    return table(head, [list(map(escape, row)) for row in rows], range(1, len(head)))


def _words(lines: list[str]) -> str:
    return "".join(f"<p>{escape(line.removeprefix('- ').replace('**', '').replace('`', ''))}</p>" for line in lines)
