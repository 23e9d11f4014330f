"""The claims of papers beside what was measured here: one table file in, generated blocks out.

`docs/claims.yaml` lists the claims; a page asks for all of them, or for what they come to, with a pair of lines:

    <!-- claims:all -->
    <!-- /claims -->

`claims:summary` counts verdicts and gives the headline of each method, `claims:METHOD` the headlines of one.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.options import number, option, read_options
from burnish.core.reading import inside, read_object
from burnish.core.recipe import read_yaml
from burnish.evaluate.stats import LEVEL, Estimate, estimate, holm, unseen, verdict, wilson
from burnish.experiments.results import cell, check_result, line, readable, withdrawn
from burnish.experiments.variants import ALIASES, MAIN, MARGIN, START, difference

TABLE = "docs/claims.yaml"
MARKER = re.compile(r"^<!-- claims:(?P<what>[\w-]+) -->[ \t]*\n(?:.*?)^<!-- /claims -->[ \t]*$", re.M | re.S)
MANY = {
    "holds": "hold", "does not hold": "do not hold", "undecided": "are undecided", "void": "are void (a gate failed)",
    "not tested": "are not tested",
}  # fmt: skip
"""Verdicts, as they are counted."""
EXPECTED = ("better", "worse", "equivalent", "not worse")
_BOUND = re.compile(r"(?P<sign>>=|<=) (?P<bound>-?\d+(?:\.\d+)?)")
_ROOM = re.compile(rf"(?P<arm>[\w.-]+) (?P<bounded>{_BOUND.pattern})")


@dataclass
class Claim:
    """A row of the table."""

    paper: str = option("", "name of the paper")
    method: str = option("", "ours, that it is about")
    claim: str = option("", "in words")
    number: str = option("", "the paper's")
    setting: str = option("", "ours")
    result: str = option("", "file under results/ that answers it, without .json")
    arm: str = option("", "variant of the study")
    against: str = option("", "variant that it is compared with; `start`: before training; empty: its mean alone")
    measure: str = option("", "of the study; empty means its endpoint")
    logged: str = option("", "instead of a measure: a number that the arm's runs logged")
    figure: str = option("", "instead of an arm: a figure of a bench")
    share: bool = option(False, "of a figure: it is a share of the bench's n independent cases, and has an interval")
    expect: str = option("better", f"{', '.join(EXPECTED)}, or a bound such as '>= 0.15'")
    room: str = option("", "gate of this claim alone, on its own measure: a variant and a bound, 'naive >= 0.2'")
    needs: str = option("", "what a test would need where there is none")
    command: str = option("", "that measures it; empty means the study's or bench's")
    headline: bool = option(False, "whether it is the sentence of its method")


@dataclass
class Answer:
    """What was found for a claim: its verdict, the number in words, the gates in words."""

    claim: Claim
    verdict: str
    ours: str = ""
    gate: str = ""
    command: str = ""
    found: Estimate | None = None
    margin: float | None = None
    lower: bool = False
    name: str = ""
    pairs: int = 0


def read_claims(path: Path) -> list[Claim]:
    entries = read_yaml(path).get("claims")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BurnishError(f"{path} has no list of claims", "claims: [{paper: ..., claim: ..., ...}]")
    claims = [read_options(Claim, entry, f"{path}: claim {i + 1}") for i, entry in enumerate(entries)]
    for i, claim in enumerate(claims):
        if claim.expect not in EXPECTED and not _BOUND.fullmatch(claim.expect):
            expected = f"{', '.join(EXPECTED)}, or '>= 0.15'"
            raise BurnishError(f"{path}: claim {i + 1} expects '{claim.expect}'", expected)
        if claim.room and not _ROOM.fullmatch(claim.room):
            raise BurnishError(f"{path}: claim {i + 1} has room '{claim.room}'", "such as 'naive >= 0.2'")
        alone = claim.figure or claim.logged or (claim.arm and not claim.against)
        if alone and claim.expect in EXPECTED:
            raise BurnishError(f"{path}: claim {i + 1} is compared with nothing", "against, or a bound as expect")
        if not (claim.claim and claim.result and (claim.arm or claim.figure or claim.needs)):
            raise BurnishError(f"{path}: claim {i + 1} lacks claim, result, or one of arm, figure and needs")
    return claims


def answer_claims(claims: Sequence[Claim], results: Path) -> list[Answer]:
    """Verdicts of all claims; p-values of those that one study answers are one family (Holm)."""
    answers = []
    for claim in claims:
        file = inside(results, f"{claim.result}.json")
        with readable(str(file)):
            answers.append(_answer(claim, read_object(file) if file.is_file() else None))
    for result in dict.fromkeys(claim.result for claim in claims):
        some = [one for one in answers if one.claim.result == result and one.claim.expect in EXPECTED]
        family = [(one, one.found) for one in some if one.found]
        for (one, found), adjusted in zip(family, holm([found.p for _, found in family]), strict=True):
            one.verdict = _judged(one, found, adjusted)
    return answers


def _answer(claim: Claim, content: dict[str, Any] | None) -> Answer:
    default = f"burnish run recipes/{claim.result}.yaml --result results/{claim.result}.json"
    if claim.figure:
        default = f"python -m bench {claim.result.removeprefix('bench_')} --json"
    untested = Answer(claim, "not tested", command=claim.command or (content or {}).get("command") or default)
    if content is None or not (claim.arm or claim.figure) or withdrawn(content):
        return untested
    if claim.figure:
        return _of_figure(untested, content)
    check_result(content, claim.result)
    said = content.get("declared", {})
    name = claim.measure or said.get("endpoint", "success")
    about = ("", claim.arm, claim.against)
    measured = _of_logged(claim, content) if claim.logged else _of_rows(claim, name, content)
    gates = [one for one in content.get("gates", []) if one.get("of", "") in about]
    gates += _room(claim, name, content) if measured and claim.room else []
    told = "; ".join(f"{'passed' if gate['passed'] else 'failed'}: {gate['name']}" for gate in gates)
    if measured is None:
        return replace(untested, gate=told)
    found, n, pairs = measured
    share = pairs > 0
    margin = said.get("margin") if name == said.get("endpoint") else None
    one = replace(untested, ours=f"{_interval(found, share, bool(claim.against))} (n = {n})", gate=told, found=found,
                  margin=MARGIN if margin is None and share else margin, lower=name in said.get("lower", []),
                  name=claim.logged or name, pairs=pairs)  # fmt: skip
    if not all(gate["passed"] for gate in gates):
        return replace(one, verdict="void", found=None)
    return one if claim.expect in EXPECTED else replace(one, verdict=_bounded(claim.expect, *found.interval))


def _of_figure(untested: Answer, content: Mapping[str, Any]) -> Answer:
    """A figure of a bench is a number without an interval, but for shares: that of Wilson."""
    claim, value, n = untested.claim, content["figures"].get(untested.claim.figure), content.get("n")
    if value is None:
        return untested
    told, low, high = cell(claim.figure, value), value, value
    if claim.share:
        low, high = wilson(math.floor(value * n + 1e-6), n).low, wilson(math.ceil(value * n - 1e-6), n).high
        told = f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return replace(untested, verdict=_bounded(claim.expect, low, high), ours=told + (f" (n = {n})" if n else ""))


def _room(claim: Claim, name: str, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The claim's own gate; what the study has not measured fails."""
    found = _ROOM.fullmatch(claim.room)
    one = found and _of_rows(replace(claim, arm=found["arm"], against=""), name, content)
    passed = bool(one) and _bounded(found["bounded"], *[one[0].mean] * 2) == "holds"
    return [{"name": f"{name} of {claim.room}", "passed": passed}]


def _of_rows(claim: Claim, name: str, content: Mapping[str, Any]) -> tuple[Estimate, str, int] | None:
    """The estimate, its n in words, and of shares how many units; None where the study has not measured it."""
    rows = [row for row in content["rows"] if row.get("eval", MAIN) == ALIASES.get(name, name)]
    by_label = {START if START in row["outcomes"] else row["label"]: row for row in rows}
    if not {claim.arm, claim.against or claim.arm} <= by_label.keys():
        return None
    row = by_label[claim.arm]
    share, seeds = "rate" in row, len(row["outcomes"])
    if claim.against:
        found = difference(row, by_label[claim.against])
    else:
        found = Estimate(row["rate" if share else "mean"], *(row["interval"] or row["by_seed"] * 2), 1.0, 0.0, 0.0, 0.0)
    units = row["n"] // seeds
    return None if found is None else (found, f"{seeds} seeds x {units}", units if share else 0)


def _of_logged(claim: Claim, content: Mapping[str, Any]) -> tuple[Estimate, str, int] | None:
    runs = content["metrics"].get("runs", {})
    values = [run.get(claim.logged) for name, run in runs.items() if name.rpartition("-")[0] == claim.arm]
    values = [value for value in values if number(value)]
    found = estimate(np.array([values]), False) if values else None
    return None if found is None else (found, f"{len(values)} seeds", 0)


def _interval(found: Estimate, share: bool, signed: bool) -> str:
    scale, form = (100.0, "+.1f" if signed else ".1f") if share else (1.0, "+.3g" if signed else ".3g")
    mean, low, high = (format(scale * value, form) for value in (found.mean, found.low, found.high))
    return f"{mean}{(' points' if signed else ' %') if share else ''} [{low}, {high}]"


def _bounded(expect: str, low: float, high: float) -> str:
    """Whether a whole interval keeps a bound, breaks it, or neither."""
    sign, _, bound = expect.partition(" ")
    low, high, limit = (low, high, float(bound)) if sign == ">=" else (-high, -low, -float(bound))
    return "holds" if low >= limit else "does not hold" if high < limit else "undecided"


def _judged(one: Answer, found: Estimate, adjusted: float) -> str:
    low, high = (-found.high, -found.low) if one.lower else (found.low, found.high)
    word, expect, margin = verdict(low, high, one.margin, one.pairs), one.claim.expect, one.margin or 0.0
    enough = unseen(one.pairs) <= margin
    if expect == "not worse" and (low >= -margin and enough or word == "better"):
        return "holds"
    if word == "undecided" or (word != "equivalent" and adjusted > 1 - LEVEL):
        return "undecided"
    return "holds" if word == expect else "does not hold"


def sentence(one: Answer) -> str:
    """A headline in one sentence: gate, effect, verdict."""
    claim = one.claim
    if one.verdict == "not tested":
        return f"{claim.claim}: not tested here{f'; it would need {claim.needs}' if claim.needs else ''}."
    where = f"Where {claim.setting or claim.result}{f' ({one.gate})' if one.gate else ''}"
    against = f" over {claim.against}" if claim.against else ""
    end = {"void": "the setting cannot show the effect", "undecided": "this does not decide"}
    return (f"{where}, {claim.arm or 'this'} changes {one.name or claim.figure}{against} by {one.ours}: "
            f"{end.get(one.verdict, f'the claim {one.verdict} here')} ({claim.claim}).")  # fmt: skip


def render_claims(what: str, answers: Sequence[Answer]) -> str:
    """The markdown between one pair of markers."""
    if what == "all":
        head = ["paper", "claim", "paper's number", "here", "setting", "gates", "verdict", "command"]
        rows = [[one.claim.paper, one.claim.claim, one.claim.number, one.ours or f"needs {one.claim.needs}",
                 one.claim.setting, one.gate, f"**{one.verdict}**", f"`{one.command}`"] for one in answers]  # fmt: skip
        return "\n".join(map(line, [head, ["---"] * len(head), *rows])) + "\n"
    chosen = [one for one in answers if one.claim.headline and what in ("summary", one.claim.method)]
    lines = [f"- {f'{one.claim.method}: ' if what == 'summary' else ''}{sentence(one)}" for one in chosen]
    if what == "summary":
        counts = Counter(one.verdict for one in answers)
        told = ", ".join(f"{counts[word]} {many}" for word, many in MANY.items() if counts[word])
        lines.insert(0, f"Of {len(answers)} claims of the papers: {told}.\n")
    return "\n".join(lines) + "\n"


def fill_claims(text: str, answers: Sequence[Answer]) -> str:
    """`text` with every marked block written again."""
    block = "<!-- claims:{} -->\n{}<!-- /claims -->"
    return MARKER.sub(lambda found: block.format(found["what"], render_claims(found["what"], answers)), text)
