"""A trial on a robot as pages: one on which a person judges it, one when it has ended (which policy was which)."""

import json
import logging
import secrets
import sys
import threading
from collections.abc import Callable
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError, one_line
from burnish.core.reading import parse_json, read_object
from burnish.evaluate.compare import Comparison, compare
from burnish.evaluate.records import SUMMARY
from burnish.evaluate.sequential import confidence_sequence
from burnish.evaluate.stats import mcnemar, paired_interval
from burnish.evaluate.trial import ARMS, Stale, Trial
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


MOST_BODY = 4096
ACTS = {"start": [], "outcome": ["success", "failure", "video"], "undo": [], "finish": []}
"""Methods of a trial that may be posted, and what they are given beside the entry; the first is needed."""
_TYPES = {"entry": int, "success": bool, "failure": str, "video": str}
_OWN = ("default-src 'none'; img-src 'self' data:; media-src 'self' blob:; connect-src 'self'; script-src 'nonce-{0}'; "
        "style-src 'self' 'nonce-{0}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip
_REPORT = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'"
log = logging.getLogger("burnish")


class Refused(Exception):
    """A request that gets a status and one line."""


class Page(ThreadingHTTPServer):
    """Serves a trial on 127.0.0.1; whoever knows its `address` may judge. BurnishError where the port cannot be had.

    Args:
        report: writes the report of the trial, which has ended, and returns the page.
    """

    daemon_threads = True

    def __init__(self, trial: Trial, report: Callable[[], str], port: int = 0):
        self.trial, self.report, self.secret = trial, report, secrets.token_urlsafe(24)
        self.page, self.ended = "", threading.Event()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise BurnishError(f"cannot listen on port {port} ({one_line(error, 100)})", "a free port") from None
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.address = f"http://{self.hosts[0]}/{self.secret}/"

    def run(self) -> None:
        """Serve until the report has been shown."""
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        try:
            self.ended.wait()
        finally:
            self.shutdown()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no news; anything else is a fault of ours."""
        if not isinstance(sys.exception(), OSError):
            log.error("a request ended in %r", sys.exception())


class _Handler(BaseHTTPRequestHandler):
    protocol_version, server_version, sys_version, timeout = "HTTP/1.1", "burnish", "", 20
    server: Page

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(self._post)

    def log_message(self, *_: Any) -> None: ...

    def _answered(self, answer: Callable[[str], None]) -> None:
        try:
            return answer(self._path())
        except Refused as refused:
            status, text = refused.args
        except BurnishError as error:
            status, text = 409 if isinstance(error, Stale) else 404 if self.command == "GET" else 400, str(error)
        self.close_connection = True  # whatever was not read of its body
        self._send(json.dumps({"error": text}), status=status)

    def _path(self) -> str:
        """What is asked for, of one who knows the secret, under our own name: a page of elsewhere may know neither."""
        _, secret, *rest = [*self.path.partition("?")[0].split("/", 2), ""]
        hosts, origin = self.server.hosts, self.headers.get("Origin", f"http://{self.server.hosts[0]}")
        if self.headers.get("Host") not in hosts or origin not in [f"http://{host}" for host in hosts]:
            raise Refused(403, f"expected {hosts[0]}")
        if not secrets.compare_digest(secret.encode(), self.server.secret.encode()):
            raise Refused(403, "expected the whole address that the command printed")
        return rest[0]

    def _get(self, path: str) -> None:
        folder, trial = files("burnish.report"), self.server.trial
        if path == "":
            nonce = secrets.token_urlsafe(16)
            text = folder.joinpath("trial.html").read_text(encoding="utf-8").replace("NONCE", nonce)
            self._send(text, "text/html", _OWN.format(nonce))
        elif path == "style.css":
            self._send(folder.joinpath(path).read_text(encoding="utf-8"), "text/css")
        elif path == "state":
            self._send(json.dumps(trial.view()))
        elif path == "report" and self.server.page:
            self._send(self.server.page, "text/html", _REPORT)
            self.server.ended.set()
        elif path.startswith("photo/") and path[6:].isdecimal() and len(path) < 12:
            self._send(trial.photo(int(path[6:])), "image/jpeg")
        else:
            raise Refused(404, "nothing is there")

    def _post(self, path: str) -> None:
        if path not in ACTS:
            raise Refused(404, "nothing is there")
        getattr(self.server.trial, path)(**self._body(ACTS[path]))
        if path == "finish":
            self.server.page = self.server.report()
        self._send(json.dumps({"state": self.server.trial.view()}))

    def _body(self, keys: list[str]) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise Refused(411, "expected Content-Length")
        if len(length) > 9 or int(length) > MOST_BODY:
            raise Refused(413, f"expected at most {MOST_BODY} bytes")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "expected application/json")
        given = parse_json(self.rfile.read(int(length)).decode(errors="replace"), "the body")
        whole = isinstance(given, dict) and {"entry", *keys[:1]} <= given.keys() <= {"entry", *keys}
        if not whole or any(type(value) is not _TYPES[key] for key, value in given.items()):
            raise Refused(400, f"expected an object of {', '.join(['entry', *keys])}")
        return given

    def _send(self, content: str | bytes, kind: str = "application/json", policy: str = "default-src 'none'",
              status: int = 200) -> None:  # fmt: skip
        body = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        said = {"Content-Type": kind if kind == "image/jpeg" else f"{kind}; charset=utf-8", "Cache-Control": "no-store",
                "Content-Length": str(len(body)), "Content-Security-Policy": policy, "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}  # fmt: skip
        for name, value in said.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
