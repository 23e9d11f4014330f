"""The parts of a run's page, each a function of the run folder that returns "" when it has nothing to show."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from burnish.core.options import number
from burnish.evaluate.offline_scores import FIGURES, shown
from burnish.evaluate.stats import Rate
from burnish.report.html import facts, section, table, tile_row
from burnish.report.media import films, picture
from burnish.report.plots import IntervalRow, Series, interval_plot, line_plot, percent, percent_range, smooth
from burnish.report.run_folder import VARIANTS, Evaluation, RunFolder, read_rate

# column of metrics.jsonl: (title of its chart, logarithmic axis, shown as percent)
CURVES = {
    "loss": ("Loss", True, False),
    "lr": ("Learning rate", False, False),
    "grad_norm": ("Gradient norm", True, False),
    "data_wait_share": ("Share of the step spent waiting for data", False, True),
}
RETENTION_COLUMNS = ("retention_loss", "retention_accuracy")
BOOKKEEPING = {"step", "minutes"}


def headline(run: RunFolder) -> str:
    tiles = []
    tuned, base = run.evaluations.get("tuned"), run.evaluations.get("base")
    if tuned:
        tiles.append(("main", percent(tuned.overall.rate), f"success: {count(tuned.overall)}"))
    if base:
        tiles.append(("", percent(base.overall.rate), f"base: {count(base.overall)}"))
    tiles += tile(run)
    before, after = _accuracy(run, "base"), _accuracy(run, "tuned")
    if after:
        was = f"questions right after\nbefore: {percent(before.rate)}" if before else "questions right"
        tiles.append(("", percent(after.rate), was))
    if tuned and "p50" in tuned.latency_ms:
        tiles.append(("", f"{tuned.latency_ms['p50']:.0f} ms", "median policy call"))
    elif run.info.get("stages"):
        minutes = sum(float(stage.get("minutes") or 0) for stage in run.info["stages"])
        tiles.append(("", f"{minutes:.0f} min", "all stages together"))
    return tile_row(tiles)


def count(rate: Rate) -> str:
    return f"{rate.successes} of {rate.n}\n95 %: {percent_range(rate.low, rate.high)}"


def success(run: RunFolder) -> str:
    """The dot-and-interval plot of all variants, and what follows from it."""
    shown = [run.evaluations[name] for name in run.evaluations if name != "swap"]
    if not shown:
        return ""
    rows = [_interval_row(one.label, one.overall, one.role) for one in shown]
    lead = "Share of fixed initial states solved in closed loop; the band is the 95 % Wilson interval."
    return section("Success", interval_plot(rows), _checks(run), lead=lead)


def _checks(run: RunFolder) -> str:
    tuned, base = run.evaluations.get("tuned"), run.evaluations.get("base")
    chance = run.evaluations.get("expert_random_object")
    bars = []
    if tuned and base:
        bars.append((base.overall.high, "that of the base."))
    if tuned and chance:
        bar = min(1.0, 3 * chance.overall.rate)
        bars.append((bar, f"three times that of the expert that picks its object at random ({percent(bar)})."))
    lines = ""
    for bar, what in bars:
        kind, verb = ("", "lies") if tuned.overall.low > bar else (" class=no", "does not lie")
        lines += f"<li{kind}>{escape(f'The interval {verb} above {what}')}</li>"
    return f'<ul class="checks">{lines}</ul>' if lines else ""


def failures(run: RunFolder) -> str:
    """In which way episodes failed."""
    lead = "From the simulator's state at the end of each episode that was not solved."
    return failures_of({one.label: one for one in run.evaluations.values()}, lead)


def failures_of(evaluations: Mapping[str, Evaluation], lead: str = "") -> str:
    """A row for each way to fail, and a column for each evaluation that knows."""
    known = {name: one for name, one in evaluations.items() if one.failures or one.overall.successes == one.overall.n}
    kinds = dict.fromkeys(kind for one in known.values() for kind in one.failures)
    rows = [[escape(kind), *(f"{one.failures.get(kind, 0):.0f}" for one in known.values())] for kind in kinds]
    head = ["", *(f"{name} ({one.overall.n} episodes)" for name, one in known.items())]
    return section("Failures", table(head, rows, numbers=range(1, len(head))), lead=lead) if rows else ""


def tasks(run: RunFolder) -> str:
    """Success per task, with the base beside it; left out where there is one task only."""
    tuned, base = run.evaluations.get("tuned"), run.evaluations.get("base")
    if not tuned or len(tuned.tasks) < 2:
        return ""
    rows = []
    for task, rate in tuned.tasks.items():
        row = [f'<span class="task">{escape(task)}</span>', str(rate.n), percent(rate.rate)]
        row += [percent_range(rate.low, rate.high), _mini_bar(rate)]
        if base:
            before = base.tasks.get(task)
            row.insert(2, percent(before.rate) if before else "")
        rows.append(row)
    head = ["task", "n", "success", "95 %", ""]
    if base:
        head.insert(2, "base")
    return section("Tasks", table(head, rows, numbers=range(1, len(head) - 1)))


def _mini_bar(rate: Rate) -> str:
    low, high, dot = 100 * rate.low, 100 * rate.high, 100 * rate.rate
    return (
        '<svg class="intervals role-tuned" width="100%" height="14" style="min-width:90px" aria-hidden="true">'
        f'<line class="track" x1="1%" x2="99%" y1="7" y2="7"/>'
        f'<line class="interval" x1="{1 + 0.98 * low:.1f}%" x2="{1 + 0.98 * high:.1f}%" y1="7" y2="7"/>'
        f'<circle class="dot" cx="{1 + 0.98 * dot:.1f}%" cy="7" r="4.5"/></svg>'
    )


def swap(run: RunFolder) -> str:
    """Does the sentence steer the policy? Same initial states, the instruction names another object."""
    tuned, swapped = run.evaluations.get("tuned"), run.evaluations.get("swap")
    if not swapped:
        return ""
    rows = []
    if tuned:
        rows.append(_interval_row("Told A, does A", tuned.overall, "tuned"))
    rows.append(_interval_row("Told B, still does A", swapped.overall, "swap"))
    if swapped.other:
        rows.append(_interval_row("Told B, does B", swapped.other, "swap"))
    lead = (
        "The same initial states, but the sentence names object B of the scene instead of A. A policy that listens "
        "does A less often than before; one that ignores language does it as often."
    )
    return section("Instruction swap", interval_plot(rows), lead=lead)


def retention(run: RunFolder) -> str:
    """What the language model inside still knows: held-out scene questions before and after."""
    before, after = run.retention.get("base") or {}, run.retention.get("tuned") or {}
    labels = {"base": "Before fine-tuning", "tuned": "After fine-tuning"}
    rows = [_interval_row(label, rate, name) for name, label in labels.items() if (rate := _accuracy(run, name))]
    parts = [interval_plot(rows)] if rows else []
    sentences = []
    if number(before.get("loss")) and number(after.get("loss")):
        sentences.append(f"Answer loss {before['loss']:.3f} before, {after['loss']:.3f} after (nats per token).")
    paired = run.retention.get("comparison") or run.retention.get("mcnemar_p")
    if isinstance(paired, dict):
        low, high = 100 * paired["low"], 100 * paired["high"]
        sentences.append(
            f"On the same questions: {paired['forgotten']} forgotten, {paired['learned']} learned, a difference of "
            f"{100 * paired['difference']:+.1f} points (95 %: {low:+.1f} to {high:+.1f}), "
            f"exact McNemar p = {paired['p']:.2g}."
        )
    if sentences:
        parts.append(f'<p class="muted after">{escape(" ".join(sentences))}</p>')
    parts += [_by_kind(before, after), _retention_curves(run)]
    return section("What the language model still knows", *parts, lead="Held-out questions about scenes it never saw.")


def _by_kind(before: dict[str, Any], after: dict[str, Any]) -> str:
    rows = []
    for kind, row in (after.get("by_kind") or {}).items():
        new = read_rate(row, f"retention.json: {kind}")
        old = (before.get("by_kind") or {}).get(kind)
        was = percent(read_rate(old, f"retention.json: {kind}").rate) if old else ""
        shown = percent_range(new.low, new.high)
        rows.append([escape(kind.replace("_", " ")), str(new.n), was, percent(new.rate), shown])
    if not rows:
        return ""
    inner = table(["kind of question", "n", "before", "after", "95 %"], rows, numbers=(1, 2, 3, 4))
    return f"<details><summary>By kind of question</summary>{inner}</details>"


def _retention_curves(run: RunFolder) -> str:
    charts = []
    for column, title in (("retention_accuracy", "Accuracy during training"), ("retention_loss", "Answer loss")):
        x, y = curve(run, column)
        if len(x) > 1:
            plot = line_plot([Series(x, y, points=True)], as_percent=column == "retention_accuracy")
            charts.append(f"<figure><h3>{title}</h3>{plot}</figure>")
    return f'<div class="two">{"".join(charts)}</div>' if charts else ""


def training(run: RunFolder) -> str:
    """The curves of metrics.jsonl; figures that methods logged come folded at the end."""
    main, other = [], []
    named = {key for row in run.metrics for key, value in row.items() if number(value)}
    if len([name for name in named if name.startswith("loss_")]) == 1:
        named -= {"loss_policy"}  # the only term is the loss itself
    for column in [*CURVES, *sorted(named - set(CURVES) - BOOKKEEPING - set(RETENTION_COLUMNS))]:
        title, log_y, as_percent = CURVES.get(column, (column, False, False))
        x, y = curve(run, column)
        if len(x) < 2:
            continue
        curves = [Series(x, y, role="tuned")]
        if column in ("loss", "grad_norm", "data_wait_share"):
            curves = [Series(x, y, role="faint"), Series(x, smooth(y), role="tuned")]
        log_y = log_y and min(y) > 0 and max(y) > 3 * min(y)
        plot = line_plot(curves, log_y=log_y, as_percent=as_percent, from_zero=not log_y and min(y) >= 0)
        (main if column in CURVES else other).append(f"<figure><h3>{escape(title)}</h3>{plot}</figure>")
    folded = ""
    if other:
        folded = f'<details><summary>Further figures</summary><div class="two">{"".join(other)}</div></details>'
    return section("Training", f'<div class="two">{"".join(main)}</div>' if main else "", folded)


def recordings(run: RunFolder) -> str:
    """Videos of the tuned policy first, then of the other variants."""
    parts = []
    for name, one in run.evaluations.items():
        figures = films(one, limit=8 if name == "tuned" else 4)
        if figures:
            parts.append(f"<h3>{escape(one.label)}</h3>{figures}")
    return section("Recordings", *parts)


def latency(run: RunFolder) -> str:
    timed = {name: one.latency_ms for name, one in run.evaluations.items()}
    timed |= {name: one["latency_ms"] for name, one in run.offline.items()}
    names = list(dict.fromkeys(name for one in timed.values() for name in one if name.startswith("p")))
    rows = [[escape(VARIANTS.get(variant, (variant.replace("_", " "),))[0]),
             *(f"{one[name]:.1f}" if name in one else "" for name in names)]
            for variant, one in timed.items() if one]  # fmt: skip
    if not rows:
        return ""
    lead = "Milliseconds for one call of the policy, which serves a whole batch of simulators."
    return section("Latency", table(["", *names], rows, numbers=range(1, len(names) + 1)), lead=lead)


def reproduce(run: RunFolder) -> str:
    """Commands, versions, seeds, the resolved recipe."""
    info, parts = run.info, []
    commands = info.get("commands") or ([info["command"]] if info.get("command") else [])
    if commands:
        parts.append(f"<pre>{escape(chr(10).join(map(str, commands)))}</pre><p></p>")
    pairs = [("commit", str(info.get("commit") or "")), ("hardware", flat(info.get("hardware")))]
    pairs += [("seeds", flat(info.get("seeds")))]
    parts.append(facts(pairs) if any(value for _, value in pairs) else "")
    if info.get("versions"):
        versions = facts([(str(k), str(v)) for k, v in dict(info["versions"]).items()])
        parts.append(f"<details><summary>Versions</summary>{versions}</details>")
    if run.recipe:
        parts.append(f"<details><summary>Resolved recipe</summary><pre>{escape(run.recipe)}</pre></details>")
    return section("Reproduce", *parts)


def _accuracy(run: RunFolder, name: str) -> Rate | None:
    """Question accuracy of "base" or "tuned", None when it was not measured."""
    part = run.retention.get(name)
    return read_rate(part.get("accuracy"), f"retention.json: {name}") if isinstance(part, dict) else None


def curve(run: RunFolder, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one column of metrics.jsonl, where it holds a number."""
    rows = [row for row in run.metrics if number(row.get(name)) and number(row.get("step"))]
    return [float(row["step"]) for row in rows], [float(row[name]) for row in rows]


def _interval_row(label: str, rate: Rate, role: str) -> IntervalRow:
    note = f"{percent(rate.rate)}  ({rate.successes}/{rate.n})"
    return IntervalRow(label, rate.rate, rate.low, rate.high, note, role)


def flat(value: object) -> str:
    """A string as it is; a mapping or list as one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {flat(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(flat(v) for v in value)
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def tile(run: RunFolder) -> list[tuple[str, str, str]]:
    """Kind, figure and text for the head of the page."""
    figures = run.offline.get("offline", {}).get("figures", {})
    error, mean = (shown([*(figures.get(name) or [None])[:1], None, None]) for name in ("error", "mean"))
    return [("main", error, f"action error, held-out\nthe mean action: {mean}")] * bool(figures)


def offline(run: RunFolder) -> str:
    """Every figure with its interval, error by step and by dimension, plots of episodes."""
    if not run.offline:
        return ""
    found = list(run.offline.values())
    head = ["", *(VARIANTS.get(name, (name,))[0] for name in run.offline)]
    rows = [[escape(text), *(shown(one["figures"].get(name)) for one in found)] for name, text in FIGURES.items()
            if any(one["figures"].get(name) for one in found)]  # fmt: skip
    names = list(found[0]["by_dimension"])
    dims = [[escape(name), *(shown(one["by_dimension"].get(name)) for one in found)] for name in names]
    curves = line_plot([curve for name, one in run.offline.items() for curve in _curve(name, one)], from_zero=True)
    pictures = [(text, picture(path)) for text, path in found[0]["plots"] if path]
    plots = [f'<figure class="wide"><img src="{uri}" alt="recorded and predicted actions"><figcaption>{escape(text)}'
             "</figcaption></figure>" for text, uri in pictures if uri]  # fmt: skip
    lead = (
        f"{found[0]['calls']} chunks predicted along {found[0]['episodes']} recorded episodes; intervals are over "
        "episodes, errors in standard deviations of the recorded actions. They do not tell how often a robot succeeds."
    )
    return section(
        "Held-out episodes", table(head, rows, range(1, len(head))),
        f"<h3>Action error by step of a chunk</h3>{curves}" if curves else "",
        "<h3>Action error by dimension, in its own units</h3>", table(head, dims, range(1, len(head))),
        f'<div class="films">{"".join(plots)}</div>' if plots else "", lead=lead,
    )  # fmt: skip


def _curve(name: str, one: dict[str, Any]) -> list[Series]:
    points = [(step, value[0]) for step, value in enumerate(one["by_horizon"]) if value]
    role = VARIANTS.get(name, ("", "faint"))[1]
    return [Series(*zip(*points, strict=True), role=role)] if len(points) > 1 else []
