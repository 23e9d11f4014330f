"""Results as small JSON files, and the tables of README and docs that are generated from them.

`results/<name>.json` is the outcome of a recipe; `results/bench_<name>.json` what `python -m bench` printed. A page
asks for a table with a pair of lines, and `burnish report results` fills in what stands between them:

    <!-- results:tabletop/quickstart -->
    <!-- /results -->

Several names, separated by spaces, give one table. `results:STUDY runs: KEY ...` gives means over seeds of what a
study's runs logged. No number is typed by hand.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError, one_line
from burnish.core.files import write_json
from burnish.core.options import number
from burnish.core.outputs import require_outside
from burnish.core.reading import inside, read_object

FIELDS = ("recipe", "command", "commit", "date", "seeds", "hardware", "minutes", "rows", "metrics")
FROM_RUN = ("commit", "date", "seeds", "hardware")
"""Fields that run.json has under the same names."""
ROW_FIELDS = ("label", "n", "successes", "rate", "interval")
NUMBER_FIELDS = ("label", "n", "mean", "interval")
"""Of a row whose outcomes are numbers and not shares."""
RAW = "outcomes"
"""Field of a row that no table shows: every single outcome, for whoever computes the interval again."""
HIDDEN = {*ROW_FIELDS, "mean", RAW, "p", "eval"}
WITHDRAWN = (
    "*Withdrawn, to be run again: this study kept no outcome of single trials, so none of its figures can be "
    "computed again.*"
)
MARKER = re.compile(r"^<!-- results:(?P<names>[^>]*?)-->[ \t]*\n(?P<table>.*?)^<!-- /results -->[ \t]*$", re.M | re.S)
OPENING = re.compile(r"^<!-- results:", re.M)
RUNS = "runs:"
"""Between the names of studies and what to show of their runs."""


def result_row(label: str, successes: int, n: int, **extra: Any) -> dict[str, Any]:
    """One line of a result: the rate and its 95 % Wilson interval are computed here, further columns are `extra`."""
    from burnish.evaluate.stats import wilson

    rate = wilson(successes, n)
    row = {"label": label, "n": n, "successes": successes, "rate": rate.rate, "interval": [rate.low, rate.high]}
    return row | extra


def flags(outcomes: Iterable[bool]) -> str:
    """Successes and failures as a text of 1 and 0."""
    return "".join("01"[bool(one)] for one in outcomes)


def outcome_row(label: str, outcomes: dict[str, list[bool]]) -> dict[str, Any]:
    """`result_row` of single outcomes by seed, which the row keeps."""
    texts = {seed: flags(some) for seed, some in outcomes.items()}
    every = "".join(texts.values())
    return result_row(label, every.count("1"), len(every), outcomes=texts)


def write_result(
    path: Path | str, *, recipe: str, command: str, rows: list[dict[str, Any]], commit: str, date: str,
    seeds: dict[str, int], hardware: str, minutes: float, metrics: dict[str, Any] | None = None,
    declared: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write the outcome of a recipe; the old file stays until the new one is complete.

    Args:
        path: results/<name>.json.
        recipe: the recipe file, relative to the checkout.
        command: the exact command that made it.
        rows: one per variant, from `result_row`.
        seeds: name to seed.
        hardware: in words, e.g. "2 CPU cores".
        minutes: wall time of the whole recipe.
        metrics: anything else that was measured (question accuracy, latency).
        declared: of a study, what was settled before its first run, see `experiments.variants.judge`; comparisons and
            verdicts are put into `rows` here.
    """
    from burnish.experiments.variants import judgement  # scipy takes its time

    path = Path(path)
    content = {
        "recipe": recipe, "command": command, "commit": commit, "date": date, "seeds": seeds, "hardware": hardware,
        "minutes": round(float(minutes), 1), "rows": rows, "metrics": metrics or {},
    }  # fmt: skip
    if declared is not None:
        content |= {"declared": declared, **judgement(rows, declared)}
    check_result(content, str(path))
    write_json(path, content)
    return path


def check_place(path: Path | None, recipe: str) -> None:
    """Raise BurnishError where a result of `recipe` cannot be written to `path`, or would replace something else."""
    if path is None:
        return
    require_outside(path)
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BurnishError(f"--result {path}: {above} is {'not yours to write' if above.is_dir() else 'a file'}",
                           "a folder that you can write", "another file")  # fmt: skip
    if os.path.lexists(path):
        try:
            check_result(content := read_object(path), str(path))
        except BurnishError as error:
            found = f"--result would replace a file that is no result ({error})"
            raise BurnishError(found, fix="another file") from None
        if content["recipe"] != recipe:
            raise BurnishError(f"--result would replace {path}, a result of {str(content['recipe'])[:200]}",
                               f"an earlier result of {recipe}, or no file", "another file")  # fmt: skip


def check_result(content: Any, where: str) -> None:
    """Raise BurnishError unless `content` is a complete result whose rates follow from their counts."""
    if not isinstance(content, dict):
        raise BurnishError(f"{where} does not hold a JSON object")
    missing = [name for name in FIELDS if name not in content]
    if missing:
        raise BurnishError(f"{where} lacks {', '.join(missing)}", "a result written by `burnish run`")
    for row in content["rows"] if isinstance(content["rows"], list) else [None]:
        fields = NUMBER_FIELDS if isinstance(row, dict) and "mean" in row else ROW_FIELDS
        missing = [name for name in fields if name not in row] if isinstance(row, dict) else ["everything"]
        if missing:
            label = row.get("label", "?") if isinstance(row, dict) else row
            raise BurnishError(f"{where}: row '{label}' lacks {', '.join(missing)}")
        value = row[fields[-2]]
        ends = [value, value] if row["interval"] is None and "mean" in row else row["interval"]
        ends = ends if isinstance(ends, list | tuple) and len(ends) == 2 else [None]
        if not all(map(number, [*ends, *(row[name] for name in fields[1:-1])])):
            raise BurnishError(f"{where}: row '{row['label']}' holds something else than numbers")
        low, high = ends
        wrong = fields is ROW_FIELDS and row["n"] >= 1 and abs(value - row["successes"] / row["n"]) > 1e-9
        if row["n"] < 1 or wrong or not low <= value <= high:
            found = f"{where}: row '{row['label']}' contradicts itself"
            raise BurnishError(found, "rate = successes / n inside interval")


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Inside, a result that is of another form than ours becomes one BurnishError that begins with `what`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise BurnishError(f"{what} cannot be shown ({type(error).__name__}: {one_line(error, 100)})",
                           "what `burnish run` or `python -m bench` wrote") from error  # fmt: skip


def render_table(names: Iterable[str], results: Path) -> str:
    """The markdown between one pair of markers; says so where a result does not exist yet."""
    names = list(names)
    if RUNS in names:
        at = names.index(RUNS)
        return _runs_table(names[:at], names[at + 1 :], results)
    files = {name: inside(results, f"{name}.json") for name in names}
    found = {name: _load(file) for name, file in files.items() if file.is_file()}
    absent = [name for name in names if name not in found]
    benches = {name: found[name] for name in found if "figures" in found[name]}
    recipes = {name: found[name] for name in found if name not in benches}
    parts = [_recipe_table(recipes)] if recipes else []
    parts += [_bench_table(name, bench) for name, bench in benches.items()]
    parts += [f"*Not measured yet: `results/{name}.json` does not exist.*" for name in absent]
    return "\n\n".join(parts) + "\n"


def _runs_table(names: list[str], keys: list[str], results: Path) -> str:
    """Means over training seeds of what a study's runs logged last: a row for each variant, a column for each key."""
    parts = []
    for name in names:
        file = inside(results, f"{name}.json")
        if not file.is_file():
            parts.append(f"*Not measured yet: `results/{name}.json` does not exist.*")
            continue
        found = _load(file)
        variants: dict[str, list[dict[str, Any]]] = {}
        for run, figures in found["metrics"].get("runs", {}).items():
            variants.setdefault(run.rpartition("-")[0], []).append(figures)
        lines = [line(["", "seeds", *(key.replace("_", " ") for key in keys)])]
        lines.append(line(["---", *["---:"] * (len(keys) + 1)]))
        for variant, runs in variants.items():
            values = [[run[key] for run in runs if run.get(key) is not None] for key in keys]
            means = [cell(k, sum(v) / len(v) if v else None) for k, v in zip(keys, values, strict=True)]
            lines.append(line([variant, len(runs), *means]))
        parts.append("\n".join(lines) + "\n\n" + _provenance(found))
    return "\n\n".join(parts) + "\n"


def fill(text: str, results: Path, where: str) -> str:
    """`text` with every marked table written again."""
    if len(OPENING.findall(text)) != len(MARKER.findall(text)):
        raise BurnishError(f"{where}: a results marker is not closed", "a line '<!-- /results -->' after the table")

    def renew(match: re.Match) -> str:
        names = match["names"].split()
        with readable(f"{where}: results {' '.join(names)[:100]}"):
            table = render_table(names, results)
        return f"<!-- results:{' '.join(names)} -->\n{table}<!-- /results -->"

    return MARKER.sub(renew, text)


def _load(path: Path) -> dict[str, Any]:
    content = read_object(path)
    if "figures" not in content:
        check_result(content, str(path))
    return content


def withdrawn(result: dict[str, Any]) -> bool:
    """Whether a study keeps no single outcome, so that nobody can compute its intervals again; counts are enough for
    those of a single run."""
    return "figures" not in result and any("by_seed" in row and RAW not in row for row in result["rows"])


def _recipe_table(found: dict[str, dict[str, Any]]) -> str:
    rows = [(name, row) for name, result in found.items() for row in [*result["rows"], *_metric_rows(result)]]
    shown = dict.fromkeys(key for _, row in rows for key in row if key not in HIDDEN)
    extra = sorted(shown, key=lambda key: LAST.index(key) if key in LAST else -1)
    several, evals = len(found) > 1, any("eval" in row for _, row in rows)  # evaluations: named at the left
    names = [*(["recipe"] if several else []), "", *(["eval"] if evals else [])]
    mean = "mean" if any("mean" in row for _, row in rows) else "success"
    numbers = ["n", mean, "95 % interval", *(TITLES.get(key, key.replace("_", " ")) for key in extra)]
    lines = [line([*names, *numbers]), line(["---"] * len(names) + ["---:"] * len(numbers))]
    for name, row in rows:
        cells = [*([name] if several else []), row["label"], *([row.get("eval", "")] if evals else []), row["n"]]
        if "mean" in row:
            ends = row["interval"]
            cells += [cell("", row["mean"]), "" if ends is None else f"{cell('', ends[0])} to {cell('', ends[1])}"]
        else:
            low, high = row["interval"]
            cells += [f"{100 * row['rate']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"]
        lines.append(line([*cells, *(_row_cell(key, row) for key in extra)]))
    heads = [f"{WITHDRAWN}\n\n" if any(map(withdrawn, found.values())) else ""]
    heads += [_declared(result) for result in found.values() if "declared" in result]
    tails = [f"{_additive(result)}\n\n" for result in found.values() if "additive" in result]
    return "".join(heads) + "\n".join(lines) + "\n\n" + "".join(tails) + "\n".join(map(_provenance, found.values()))


SIGNED = ("minus_reference", "minus_base")
LAST = (*SIGNED, "adjusted", "detectable", "verdict", "letters")
"""Columns at the right, in this order."""
TITLES = {"adjusted": "p (Holm)"}


def _row_cell(key: str, row: dict[str, Any]) -> str:
    """A cell beside the interval; where outcomes are numbers, differences are not in points."""
    value = row.get(key)
    if value is None:
        return ""
    if key == "adjusted":
        return f"{value:.3f}" if value >= 0.001 else "< 0.001"
    if key == "detectable":
        return cell("", value) if "mean" in row else f"{100 * value:.1f}"
    if "mean" in row and key == "by_seed":
        return ", ".join(cell("", one) for one in value)
    if "mean" in row and key in SIGNED:
        return "{:+.3g} [{:+.3g}, {:+.3g}]".format(*value)
    return cell(key, value)


def _declared(result: dict[str, Any]) -> str:
    """What was settled before the first run, and the gates: they stand above what they let through."""
    said, gates = result["declared"], result["gates"]
    margin = said["margin"]
    words = [f"Endpoint {said['endpoint']}, compared with {said['reference']}, {said['stopping']} seeds"]
    if margin is not None:
        words.append(f"margin {100 * margin:g} points" if _of_shares(result) else f"margin {margin:g}")
    lines = [f"{', '.join(words)}: settled before the first run."]
    for gate in gates:
        value = "not measured" if gate["value"] is None else f"{gate['value']:.3g}"
        lines.append(f"- Gate {'passed' if gate['passed'] else '**failed**'}: {gate['name']} "
                     f"(`{gate['check']}` in {gate['measure']}: {value})")  # fmt: skip
    failed = list(dict.fromkeys(gate.get("of", "") for gate in gates if not gate["passed"]))
    if failed:
        every = {"", said["reference"]} & {*failed}
        which = "every verdict is void" if every else f"the verdict of {', '.join(failed)} is void"
        lines.append(f"- So this setting cannot show the effect, and {which}.")
    return lines[0] + "\n\n" + "".join(f"{line}\n" for line in lines[1:]) + ("\n" if lines[1:] else "")


def _of_shares(result: dict[str, Any]) -> bool:
    """Whether the endpoint is a share, so that its differences are in points."""
    from burnish.experiments.variants import ALIASES, MAIN

    name = result["declared"]["endpoint"]
    return any("rate" in row for row in result["rows"] if row.get("eval", MAIN) == ALIASES.get(name, name))


def _additive(result: dict[str, Any]) -> str:
    """Whether what the steps do adds up, in a sentence."""
    said, share = result["additive"], _of_shares(result)
    form = (lambda ends: cell(SIGNED[0], ends)) if share else "{0[0]:+.3g} [{0[1]:+.3g}, {0[2]:+.3g}]".format
    together, parts, more = (form(said[key]) for key in ("together", "sum", "more_together"))
    return (f"All steps together change {result['declared']['endpoint']} by {together}; what each changes, alone left "
            f"out, sums to {parts}. The first minus the second: {more}, **{said['verdict']}**.")  # fmt: skip


def _metric_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for the rates among the metrics, such as question accuracy before and after."""
    rows = []
    for name, value in result["metrics"].items():
        rate = value.get("accuracy", value) if isinstance(value, dict) else None
        if isinstance(rate, dict) and {"n", "successes"} <= rate.keys():
            rows.append(result_row(name.replace("_", " "), rate["successes"], rate["n"]))
    return rows


def _bench_table(name: str, bench: dict[str, Any]) -> str:
    targets = bench.get("targets") or (bench.get("detail") or {}).get("targets") or {}
    lines = [line(["figure", "value", "target"]), line(["---", "---:", "---"])]
    for figure, value in bench["figures"].items():
        shown, target = cell(figure, value), str(targets.get(figure, ""))
        close = shown == target.split(" ")[-1] and isinstance(value, float)  # 1.054 is not within 1.05
        lines.append(line([f"`{figure}`", f"{value:.4g}" if close else shown, target]))
    made = f"`{bench.get('command') or 'python -m bench ' + name.removeprefix('bench_') + ' --json'}`"
    facts = [made, _words(bench.get("device")), f"n = {_words(bench['n'])}" if bench.get("n") else ""]
    facts += [f"commit {str(bench['commit'])[:10]}" if bench.get("commit") else ""]
    facts += [_words(bench.get(fact)) for fact in ("date", "stopped")]
    return "\n".join(lines) + "\n\n" + " · ".join(fact for fact in facts if fact)


def _provenance(result: dict[str, Any]) -> str:
    runs = [run for run in result["metrics"].get("runs", {}).values() if isinstance(run, dict)]
    commits = [one for run in runs for one in (run.get("commit"), *run.get("measured_with", [])) if one]
    made = sorted({str(one)[:10] for one in commits}) or [str(result["commit"])[:10]]
    facts = [
        f"`{result['command']}`", f"commit {', '.join(made)}", _words(result["hardware"]),
        f"{result['minutes']:g} minutes", str(result["date"]), f"seeds {_words(result['seeds'])}",
    ]  # fmt: skip
    return " · ".join(facts)


def line(cells: Iterable[Any]) -> str:
    """A line of a markdown table."""
    return "| " + " | ".join(str(one).replace("|", "\\|").replace("\n", " ") for one in cells) + " |"


def cell(key: str, value: Any) -> str:
    """A number to three digits; accuracies, rates and shares as percent."""
    if value is None:
        return ""
    if key == "by_seed":
        return ", ".join(f"{100 * rate:.1f}" for rate in value)
    if key in SIGNED:
        return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * number for number in value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if key.endswith(("accuracy", "rate", "share")):
            return f"{100 * value:.1f} %"
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return _words(value)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return "" if value is None else str(value)
