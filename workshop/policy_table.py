"""`python -m workshop policy-table`: which policy has which verbs, as a table of docs/policies/lerobot.md."""

import argparse
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from burnish.policies import Policy, load_policy
from workshop.tiny import KINDS, make_tiny

PAGE = Path(__file__).resolve().parents[1] / "docs/policies/lerobot.md"
COLUMNS = ("language", "score", "likelihood", "capture", "velocity", "tokens", "prefix")
PLACE = re.compile(r"(?<=<!-- verbs -->\n).*?(?=<!-- /verbs -->)", re.S)


def row(kind: str, policy: Policy) -> str:
    """The line of a type, from what a tiny one of it declares."""
    marks = ["yes" if policy.supports(name) else "" for name in COLUMNS]
    return f"| {kind} | yes | {' | '.join(marks)} |\n"


def main(args: argparse.Namespace) -> None:
    """Write the table anew."""
    head = f"| type | loss, act | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 2)}|\n"
    with TemporaryDirectory() as place:
        rows = "".join(row(kind, load_policy(make_tiny(kind, Path(place) / kind))) for kind in sorted(KINDS))
    PAGE.write_text(PLACE.sub(lambda _: head + rows, PAGE.read_text()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""
