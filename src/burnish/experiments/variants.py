"""What the variants of a study measured, as rows of its result: comparisons, gates and verdicts from raw outcomes.

A measure is one number for each variant, training seed and unit (an initial state, a question; a logged number has a
single unit). The rows keep these numbers, and everything else in them follows from those: `judge` computes it, for a
new result as for one that is checked (`experiments.recompute`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.options import option, read_options
from burnish.evaluate.stats import LEVEL, Estimate, estimate, holm, letters, verdict

Trials = Mapping[int | str, Mapping[Any, float]]
"""Training seed to unit to outcome."""
MAIN, QUESTIONS, ANSWER_LOSS = "main", "questions, exact", "answer_loss"
ALIASES = {"success": MAIN, "answers": QUESTIONS}
"""Names of measures in a study file to those in the rows of its result."""
START = "start"
"""In place of a training seed: measured before training."""
MARGIN = 0.05
"""Of shares, unless a study says otherwise."""
COMPUTED = ("minus_reference", "minus_base", "p", "adjusted", "detectable", "verdict", "letters")
_CHECK = re.compile(r"(?P<arm>\S+)(?: - (?P<other>\S+))? (?P<sign>>=|<=) (?P<bound>-?\d+(?:\.\d+)?)")


@dataclass
class Gate:
    """What must hold before a verdict of a study counts, such as `aux_sft - sft >= 0.15`."""

    name: str = option("", "what it says, in words")
    measure: str = option("", "a measure of the study; empty means its endpoint")
    check: str = option("", "VARIANT >= NUMBER, VARIANT <= NUMBER, or the same of VARIANT - VARIANT")
    of: str = option("", "the variant whose verdict it is about; empty: those of all")


def read_gates(entries: Sequence[Any], variants: Sequence[str], where: str) -> list[Gate]:
    """The gates of a study file."""
    gates = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise BurnishError(f"{where}: gate {i + 1} is {str(entry)[:100]}", "name, measure and check")
        gate = read_options(Gate, entry, f"{where}: gate {i + 1}")
        found = _CHECK.fullmatch(gate.check)
        if found is None:
            raise BurnishError(f"{where}: gate {i + 1} checks '{gate.check[:100]}'", "such as 'sft >= 0.4'")
        unknown = [arm for arm in found.group("arm", "other") if arm not in (None, "base", *variants)]
        unknown += [gate.of] if gate.of not in ("", *variants) else []
        if unknown:
            raise BurnishError(f"{where}: gate {i + 1} names '{unknown[0]}'", f"one of {', '.join(variants)}")
        gates.append(gate)
    return gates


def measure_rows(variants: Mapping[str, Trials], *, shares: bool = True, **extra: Any) -> list[dict[str, Any]]:
    """A row for each variant with its raw outcomes, on the units that all of their runs have in common.

    Args:
        variants: name to outcomes; those without any seed are left out.
        shares: outcomes are 0 or 1 and kept as a text of those; otherwise numbers, kept to four digits.
        extra: further columns, the same in every row.
    """
    runs = [run for trials in variants.values() for run in trials.values()]
    shared = [key for key in sorted(runs[0], key=str) if all(key in run for run in runs)] if runs else []
    if runs and not shared:
        raise BurnishError(f"the runs of {', '.join(variants)} share no trial", "the same initial states in every run")

    def text(run: Mapping[Any, float]) -> str:
        return "".join("01"[run[key] > 0.5] for key in shared) if shares else " ".join(f"{run[k]:.4g}" for k in shared)

    rows = []
    for name, trials in variants.items():
        if trials:
            row = {"label": name, **extra, "outcomes": {str(seed): text(run) for seed, run in trials.items()}}
            rows.append(row | summary(row["outcomes"], shares))
    return rows


def outcomes(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """[n] numbers by seed: the raw outcomes of a row."""
    shares = "rate" in row or "successes" in row
    return {seed: _numbers(text, shares) for seed, text in row["outcomes"].items()}


def _numbers(text: str, shares: bool) -> np.ndarray:
    return np.array([*map(float, text if shares else text.split())])


def summary(texts: Mapping[str, str], shares: bool) -> dict[str, Any]:
    """What a row says of its own raw outcomes: n, mean with its interval over seeds and units, mean of each seed."""
    table = np.array([_numbers(text, shares) for text in texts.values()])
    if table.size == 0:
        raise BurnishError("a row without a single outcome", "one for each seed and unit")
    mean, found = float(table.mean()), estimate(table, shares)
    interval = None if found is None else [min(max(found.low, 0.0), mean), max(min(found.high, 1.0), mean)]
    if not shares and found is not None:
        interval = found.interval
    head = {"successes": int(table.sum()), "rate": mean} if shares else {"mean": mean}
    return {"n": table.size, **head, "interval": interval, "by_seed": [float(one) for one in table.mean(1)]}


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Estimate | None:
    """Of two rows of a measure, the first minus the second, paired on seed and unit; None where they share no seed.

    What was measured before training is paired with every seed.
    """
    ours_by, theirs_by = outcomes(ours), outcomes(theirs)
    if START in theirs_by:
        theirs_by = dict.fromkeys(ours_by, theirs_by[START])
    seeds = [seed for seed in ours_by if seed in theirs_by]
    if not seeds:
        return None
    shares = "rate" in ours
    found = estimate(np.array([ours_by[seed] - theirs_by[seed] for seed in seeds]), shares)
    if found is None or not shares:
        return found
    return Estimate(**{**vars(found), "low": max(found.low, -1.0), "high": min(found.high, 1.0)})


def judge(rows: list[dict[str, Any]], declared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put differences, Holm's p-values, verdicts and letters into `rows`; returns the gates with their values.

    A verdict needs the adjusted p-value (of the endpoint's comparisons one family, of all others another) and the
    declared margin; where a gate fails, or seeds are missing, every verdict is "void" and nothing has letters, or so
    for the gate's variant (of the reference: for all, which are compared with it).

    Args:
        rows: of `measure_rows`, with `eval` where there are several measures.
        declared: endpoint, lower, margin, reference, stopping and gates, as in a study file.
    """
    endpoint = ALIASES.get(declared["endpoint"], declared["endpoint"])
    measures: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name in COMPUTED:
            row.pop(name, None)
        measures.setdefault(row.get("eval", MAIN), []).append(row)
    gates = [_gate(measures, declared, gate) for gate in declared["gates"]] + _seeds(measures, declared, endpoint)
    void = _void(gates, declared)
    families: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for name, some in measures.items():
        _compare(some, declared["reference"])
        families[name == endpoint] += [row for row in some if "p" in row]
    for primary, family in families.items():
        for row, adjusted in zip(family, holm([row["p"] for row in family]), strict=True):
            row["adjusted"] = adjusted
            row["verdict"] = "void" if void & {"", row["label"]} else _word(row, declared, primary)
    _letters([row for row in measures.get(endpoint, []) if not void & {"", row["label"]}])
    return gates


def _void(gates: Sequence[Mapping[str, Any]], declared: Mapping[str, Any]) -> set[str]:
    """Variants without a verdict; "" where that is all of them."""
    failed = {gate.get("of", "") for gate in gates if not gate["passed"]}
    return failed | ({""} if declared["reference"] in failed else set())


def _compare(rows: list[dict[str, Any]], reference: str) -> None:
    known = {START if START in row["outcomes"] else row["label"]: row for row in rows}
    for name, row in known.items():
        if name not in (START, reference) and reference in known and (found := difference(row, known[reference])):
            row["minus_reference"] = [found.mean, *found.interval]
            row |= {"p": found.p, "detectable": found.detectable}
        if name != START and START in known and (found := difference(row, known[START])):
            row["minus_base"] = [found.mean, *found.interval]


def _word(row: Mapping[str, Any], declared: Mapping[str, Any], primary: bool) -> str:
    _, low, high = row["minus_reference"]
    lower = row.get("eval", MAIN) in {ALIASES.get(name, name) for name in declared["lower"]}
    low, high = (-high, -low) if lower else (low, high)
    margin = declared["margin"] if primary else None
    states = max(map(len, row["outcomes"].values())) if "rate" in row else 0
    return verdict(low, high, MARGIN if margin is None and "rate" in row else margin, states, row["adjusted"])


def _letters(rows: list[dict[str, Any]]) -> None:
    """Compact letters over all pairs of at least three variants of the endpoint."""
    arms = [row for row in rows if START not in row["outcomes"]]
    pairs = [(i, j, found.p) for (i, one), (j, other) in combinations(enumerate(arms), 2)
             if (found := difference(one, other))]  # fmt: skip
    if len(arms) < 3 or not pairs:
        return
    differ = np.zeros((len(arms), len(arms)), bool)
    for (i, j, _), p in zip(pairs, holm([p for *_, p in pairs]), strict=True):
        differ[i, j] = differ[j, i] = p <= 1 - LEVEL
    for row, found in zip(arms, letters(differ), strict=True):
        row["letters"] = found


def _gate(
    measures: Mapping[str, Sequence[Mapping[str, Any]]], declared: Mapping[str, Any], gate: Mapping[str, Any]
) -> dict[str, Any]:
    """A gate with its value (a mean over seeds and units) and whether it passed; what is not measured yet fails."""
    name = gate.get("measure") or declared["endpoint"]
    check = _CHECK.fullmatch(gate["check"])
    rows = {row["label"]: row for row in measures.get(ALIASES.get(name, name), [])}
    arm, other, sign, bound = check.group("arm", "other", "sign", "bound") if check else ("", None, ">=", "0")
    value = None
    if arm in rows and (other is None or other in rows):
        value = float(np.mean(rows[arm]["by_seed"])) - (float(np.mean(rows[other]["by_seed"])) if other else 0.0)
    passed = value is not None and (value >= float(bound) if sign == ">=" else value <= float(bound))
    return {"name": gate.get("name") or gate["check"], "measure": name, "check": gate["check"], "value": value,
            "passed": passed, **({"of": gate["of"]} if gate.get("of") else {})}  # fmt: skip


def additivity(rows: Sequence[Mapping[str, Any]], declared: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether what the steps of a study do to its endpoint adds up: all together, against the sum of what each does.

    What one does is the variant without any left out minus that which leaves out this one; all together, minus that
    which leaves out all. None where one of these variants, or a seed that they share, is missing.
    """
    without, name = declared.get("without", {}), ALIASES.get(declared["endpoint"], declared["endpoint"])
    by_left = {tuple(sorted(left)): variant for variant, left in without.items()}
    wanted = [(), tuple(sorted(declared.get("steps", []))), *((step,) for step in declared.get("steps", []))]
    by_name = {row["label"]: row for row in rows if row.get("eval", MAIN) == name}
    if len(wanted) < 4 or not all(by_left.get(left) in by_name for left in wanted):
        return None
    tables = [outcomes(by_name[by_left[left]]) for left in wanted]
    seeds = [seed for seed in tables[0] if all(seed in table for table in tables)]
    full, none, *singles = (np.array([table[seed] for seed in seeds]) for table in tables)
    if full.size < 2:
        return None
    parts = sum(full - single for single in singles)
    found = {key: estimate(table, False) for key, table in
             {"together": full - none, "sum": parts, "more_together": full - none - parts}.items()}  # fmt: skip
    rest = found["more_together"]
    inside = declared["margin"] is not None and -declared["margin"] <= rest.low and rest.high <= declared["margin"]
    inside = inside and rest.error > 0  # equal outcomes throughout say nothing
    word = "additive" if inside else "not additive" if rest.p <= 1 - LEVEL else "undecided"
    return {key: [one.mean, *one.interval] for key, one in found.items()} | {"verdict": word}


def judgement(rows: list[dict[str, Any]], declared: Mapping[str, Any]) -> dict[str, Any]:
    """What `judge` and `additivity` say, as a result keeps it; a failed gate makes the latter void too."""
    gates, additive = judge(rows, declared), additivity(rows, declared)
    if additive and _void(gates, declared):
        additive["verdict"] = "void"
    return {"gates": gates} | ({"additive": additive} if additive else {})


def _seeds(measures: Mapping[str, Any], declared: Mapping[str, Any], endpoint: str) -> list[dict[str, Any]]:
    """The stopping rule as a gate: every variant of the endpoint has the same seeds, and as many as declared. Where no
    variant's outcomes differ between seeds, these changed nothing and count as one."""
    found = [row["outcomes"] for row in measures.get(endpoint, []) if START not in row["outcomes"]]
    telling = [{*outcomes.values()} for outcomes in found if any(len({*text}) > 1 for text in outcomes.values())]
    alike = bool(telling) and all(len(texts) == 1 for texts in telling)
    arms = [{*outcomes} if not alike else {*outcomes} & {min(outcomes)} for outcomes in found]
    wanted, shared = declared["stopping"], len(set.intersection(*arms)) if arms else 0
    value = next((count for count in (shared, *map(len, arms)) if count != wanted), wanted)
    gate = {"name": "the declared seeds", "measure": endpoint, "check": f"seeds = {wanted}", "value": value}
    return [] if value == wanted else [gate | {"passed": False}]
