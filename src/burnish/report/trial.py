"""The page of a trial on a robot that has ended: both policies under their names, and whether being first mattered."""

from html import escape
from pathlib import Path

import numpy as np

from burnish.core.reading import read_object
from burnish.evaluate.compare import Comparison, compare
from burnish.evaluate.records import SUMMARY
from burnish.evaluate.sequential import confidence_sequence
from burnish.evaluate.stats import mcnemar, paired_interval
from burnish.evaluate.trial import ARMS, Trial
from burnish.report.comparison import success
from burnish.report.html import document, facts, header, section, table, tile_row
from burnish.report.page import write_page
from burnish.report.plots import Series, line_plot, percent
from burnish.report.run_folder import read_evaluation
from burnish.report.sections import count, failures_of

WORDS = {"better": "better than", "worse": "worse than", "equivalent": "equivalent to", "undecided": "not told from"}


def write_trial_report(trial: Trial) -> tuple[Path, Comparison]:
    """Write trial.html into the folder of a trial that has ended, and say what `burnish compare --sequential` says."""
    arms = {trial.names[arm]: trial.folder / "eval" / arm for arm in ARMS}
    found = compare(*arms.values(), margin=trial.options.margin, sequential=True)
    looked, (a, b), r = found.sequential, arms, found.overall
    assert looked is not None  # noqa: S101 - asked for
    settled = f"settled by pair {looked.decided}" if looked.decided else "not settled"
    margin = "" if found.margin is None else f", margin {100 * found.margin:g} points"
    ends = f"B - A, in points\n95 %: {100 * looked.low:+.0f} to {100 * looked.high:+.0f}"
    evaluations = {
        name: read_evaluation(at / SUMMARY, trial.folder, read_object(at / SUMMARY)) for name, at in arms.items()
    }
    body = [
        tile_row([("", percent(r.rate_a.rate), f"A, {a}: {count(r.rate_a)}"),
                  ("", percent(r.rate_b.rate), f"B, {b}: {count(r.rate_b)}"),
                  ("main", f"{100 * r.difference:+.0f}", ends), ("", str(r.n), "pairs")]),
        section("Verdict", f"<p><strong>{escape(f'{b} is {WORDS[looked.verdict]} {a}')}</strong>: {settled} "
                f"({looked.n} pairs{margin}).</p>", _course(trial),
                lead="Below, the interval of the difference in points after each pair: it holds however often one "
                "looks. The test in the next section holds where the number of pairs was fixed beforehand."),
        success((a, b), {"trials": found}), failures_of(evaluations), _order(trial), _tries(trial), _protocol(trial),
    ]  # fmt: skip
    head = header("burnish trial", f"{a} and {b}", f"A is {a}, B is {b}; trials on a robot, judged blind")
    target = trial.folder / "trial.html"
    write_page(target, document(f"{a} and {b} · burnish", head, "".join(body)))
    return target, found


def _course(trial: Trial) -> str:
    low, high, _ = confidence_sequence(trial.differences())
    curves = [Series(range(1, len(low) + 1), 100 * ends) for ends in (low, high)]
    return line_plot(curves, axis="pairs") if len(low) > 1 else ""


def order_effect(trial: Trial) -> tuple[float, float, float, float]:
    """Second minus first try of a pair, whichever policies they were: mean, 95 % interval, exact McNemar p."""
    won = [float(one.success) for one in trial.outcomes]
    found = np.array(won[1::2]) - np.array(won[::2][: len(won) // 2])
    low, high = paired_interval(found, np.random.default_rng(0))
    return float(found.mean()), low, high, mcnemar(int((found < 0).sum()), int((found > 0).sum()))


def _order(trial: Trial) -> str:
    mean, low, high, p = order_effect(trial)
    said = (
        f"Second minus first of a pair, whichever it was: {100 * mean:+.0f} points, 95 % {100 * low:+.0f} to "
        f"{100 * high:+.0f}, p = {p:.2g}. The coin of each pair keeps this out of the difference between the policies."
    )
    return section("Order", f"<p>{said}</p>")


def _tries(trial: Trial) -> str:
    rows = []
    for one in trial.outcomes:
        word = "ok" if one.success else "fail"
        how = f'<span class="{word}">{"solved" if one.success else one.failure or "failed"}</span>'
        how += " (the robot asked nothing)" if one.asked == 0 else ""
        video = escape(one.video)
        if one.video.startswith(("http://", "https://")):
            video = f'<a href="{video}" rel="noreferrer">video of pair {one.pair + 1}, policy {one.code}</a>'
        state, arm = trial.state(one.pair)[1], trial.arm(one.pair, one.code)
        rows.append([f"{one.pair + 1}, {one.code}", escape(state.name), escape(trial.names[arm]), how, video])
    return section("Every try", table(["pair, policy", "initial state", "it was", "outcome", "video"], rows))


def _protocol(trial: Trial) -> str:
    margin = "" if trial.options.margin is None else f" --margin {trial.options.margin:g}"
    return section("Protocol", facts([
        ("begun, ended", f"{trial.entries[0].time}, {trial.entries[-1].time}"), ("draw", f"seed {trial.seed}"),
        ("minutes of trials", f"{sum(one.seconds for one in trial.outcomes) / 60:.1f}"),
        ("initial states", str(len(trial.states))),
        ("entries taken back", str(sum(one.kind == "undo" for one in trial.entries))),
        ("the same figures", f"burnish compare {trial.folder}/eval/a {trial.folder}/eval/b --sequential{margin}"),
    ]))  # fmt: skip
