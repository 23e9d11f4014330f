"""The generated parts of README and docs: tables of results, claims."""

from pathlib import Path

from burnish.core.files import write_text
from burnish.core.reading import read_text
from burnish.experiments.claims import TABLE, answer_claims, fill_claims, read_claims
from burnish.experiments.results import fill

PAGES = ("README.md", "docs/**/*.md")


def update_pages(root: Path | str = Path(), check: bool = False) -> list[Path]:
    """Write the generated parts of README.md and docs/ under `root` from its results/ and docs/claims.yaml.

    Args:
        root: a checkout; the present folder when not given.
        check: change nothing.

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
