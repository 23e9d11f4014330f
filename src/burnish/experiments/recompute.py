"""Every figure of a result again, from the raw outcomes that it keeps."""

import math
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.reading import read_object
from burnish.evaluate import watchdog
from burnish.evaluate.retrieval import figures
from burnish.evaluate.stats import wilson
from burnish.experiments.results import RAW, check_result, readable, result_row, withdrawn
from burnish.experiments.variants import judgement, summary


@dataclass
class Recomputed:
    """What came of the files under results/, by their names."""

    changed: dict[str, str] = field(default_factory=dict)
    """Those that said something else than their outcomes, and what."""
    same: list[str] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    """Without single outcomes: rates and intervals follow from their counts, and that is all that could be held."""
    withdrawn: list[str] = field(default_factory=list)
    """Without raw outcomes: withdrawn, or to be run again."""
    benches: list[str] = field(default_factory=list)
    """Times and sizes; what was measured in each round stands in their `detail`."""


def renew(content: dict[str, Any]) -> dict[str, Any]:
    """A result with all that follows from its raw outcomes computed anew; what was measured stays as it is."""
    content = deepcopy(content)
    rows = content["rows"]
    for at, row in enumerate(rows):
        if "declared" in content:
            rows[at] = {k: v for k, v in row.items() if k != "interval"} | summary(row[RAW], "mean" not in row)
        elif any(":" in text for text in row.get(RAW, {}).values()):  # of retrieval: the rank of every query
            rows[at] = row | figures(row[RAW])
        elif any("=" in text for text in row.get(RAW, {}).values()):  # of a watchdog: the distances of every episode
            rows[at] = row | watchdog.figures(row[RAW])
        else:
            every = "".join(row.get(RAW, {}).values())
            counts = (every.count("1"), len(every)) if every else (row["successes"], row["n"])
            rows[at] = row | result_row(row["label"], *counts)
    if "declared" in content:
        content |= judgement(rows, content["declared"])
    for found in content["metrics"].values():
        accuracy = found.get("accuracy") if isinstance(found, dict) else None
        if isinstance(accuracy, dict) and {"successes", "n"} <= accuracy.keys():
            every = found.get(RAW)
            counts = (every.count("1"), len(every)) if every else (accuracy["successes"], accuracy["n"])
            accuracy |= wilson(*counts).to_dict()
    return content


def differing(one: Any, other: Any, where: str = "") -> str:
    """The first place at which two results differ by more than rounding, and how; "" where they do not."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        found = (differing(one.get(key), other.get(key), f"{where}.{key}" if where else key) for key in keys)
        return next(filter(None, found), "")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found = (differing(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True)))
        return next(filter(None, found), "")
    numbers = all(isinstance(value, int | float) for value in (one, other))
    equal = math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12) if numbers else one == other
    return "" if equal else f"{where}: {str(one)[:40]}, its outcomes say {str(other)[:40]}"


def recompute_results(folder: Path, write: bool = False) -> Recomputed:
    """Compute every result under `folder` again.

    Args:
        write: put the figures that follow from the outcomes into files that say something else.
    """
    found = Recomputed()
    for path in sorted(folder.rglob("*.json")):
        name, content = path.relative_to(folder).with_suffix("").as_posix(), read_object(path, folder)
        if "figures" in content:
            found.benches.append(name)
            continue
        check_result(content, str(path))
        if withdrawn(content):
            found.withdrawn.append(name)
            continue
        with readable(str(path)):
            after = renew(content)
            different = differing(content, after)
        if different:
            found.changed[name] = different
            if write:
                write_json(path, after)
        else:
            (found.same if any(RAW in row for row in content["rows"]) else found.counted).append(name)
    if not (found.changed or found.same or found.counted or found.withdrawn or found.benches):
        raise BurnishError(f"no result under {folder}", "files that `burnish run --result` wrote")
    return found
