"""No result stands in the prose of a page that no generated block of that page holds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/methods").glob("*.md"))]
GENERATED = re.compile(r"^<!-- (?:results|claims):.*?^<!-- /(?:results|claims) -->$", re.M | re.S)
NOT_PROSE = re.compile(r"^```.*?^```$|^\|[^\n]*$|`[^`\n]*`|^ {4}[^\n]*$", re.M | re.S)
NUMBER = r"[-+]?\d+(?:\.\d+)?"
RESULT = re.compile(rf"({NUMBER})(?: ?%| points?\b| nats\b)|\[({NUMBER}), ({NUMBER})\]")
"""What states a result: a share, points, nats, an interval."""

RELEASED = "what the released code of the paper does"
NO_RESULT: dict[str, dict[str, str]] = {
    "align.md": {
        "independent projectors run at 20 % of their width": RELEASED, "gives a single pair 20 %": RELEASED,
    },
    "retrieve.md": {
        "99.5 % of frames": "the paper's", "91 % of the nearest neighbours": "the paper's log",
        "near to 100 %": "no result",
    },
    "prefer.md": {
        "51, 50 and 54 %": "of flows of known density, a calculation and no experiment",
        "73, 82 and 100 %": "of flows of known density, a calculation and no experiment",
    },
}  # fmt: skip
"""By page: phrases with a number that is no result of ours, and why."""


def results(page: Path) -> list[tuple[str, str]]:
    """(number, line) of every number in prose that states a result."""
    text = NOT_PROSE.sub("", GENERATED.sub("", page.read_text()))
    for phrase in NO_RESULT.get(page.name, {}):
        assert phrase in text, f"{page.name} no longer says '{phrase}'"
        text = text.replace(phrase, "")
    return [(number, line.strip()) for line in text.splitlines() for found in RESULT.finditer(line)
            for number in found.groups() if number]  # fmt: skip


def stands_in(number: str, numbers: set[float]) -> bool:
    """Whether one of `numbers`, rounded as `number` is, is that number (a sign may be said in words)."""
    digits = len(number.partition(".")[2])
    return any(abs(abs(round(one, digits)) - abs(float(number))) < 1e-9 for one in numbers)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_states_no_result_that_no_table_holds(page):
    generated = " ".join(GENERATED.findall(page.read_text()))
    numbers = {float(number) for number in re.findall(NUMBER, generated)}
    assert [(number, line) for number, line in results(page) if not stands_in(number, numbers)] == []


def test_the_rule_bites():
    assert [found.groups() for found in RESULT.finditer("rose by 3.4 points [+1.0, 5.8], n = 40")] == [
        ("3.4", None, None), (None, "+1.0", "5.8"),
    ]  # fmt: skip
    assert stands_in("-3.4", {3.41}) and stands_in("3", {3.4}) and not stands_in("3.5", {3.41})
