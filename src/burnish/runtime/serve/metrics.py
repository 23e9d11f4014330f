"""What a server counts: as Prometheus reads it (/metrics), and as JSON (/stats)."""

import json
import time
from collections import Counter as Counts
from collections import deque
from collections.abc import Sequence
from typing import Any

from burnish.core.errors import BurnishError

KEPT = 300.0
"""Seconds over which quantiles are taken."""
MOST_KEPT = 20_000
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
OUTCOMES = ("ok", "refused", "busy", "left")
"""Answered; answered with an error; not taken for want of room or time; the client was gone."""


class Metrics:
    """Counters and histograms of one server.

    Raises:
        BurnishError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError:
            found = "a server without prometheus-client"
            raise BurnishError(found, "the package", "pip install 'burnish[serve]'") from None
        self.registry = registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": registry}
        self.requests = Counter("burnish_requests", "requests by outcome", ["outcome"], **options)
        self.clients = Gauge("burnish_clients", "open connections", **options)
        self.queue = Histogram("burnish_queue_seconds", "waiting for a batch", buckets=_SECONDS, **options)
        self.infer = Histogram("burnish_infer_seconds", "one batch", buckets=_SECONDS, **options)
        self.total = Histogram("burnish_request_seconds", "from receipt to reply", buckets=_SECONDS, **options)
        self.rows = Histogram("burnish_batch_rows", "requests in a batch", buckets=(1, 2, 4, 8, 16, 32), **options)
        self.recorded = Counter("burnish_recorded_calls", "calls written by --record", ["outcome"], **options)
        quantiles = Gauge("burnish_request_quantile_seconds", "of the last five minutes", ["quantile"], **options)
        for name in ("0.5", "0.95", "0.99"):
            quantiles.labels(name).set_function(lambda q=float(name): self.quantile(q))
        self.delay = Histogram("burnish_delay_steps", "steps that are executed before an answer, as clients expect",
                               buckets=(0, 1, 2, 4, 8, 16, 32), **options)  # fmt: skip
        self.distance = Gauge("burnish_watchdog_distance", "of the last request from the training set", **options)
        self._cached = Gauge("burnish_cache", "what caches did", ["what"], **options)
        self.caches: list[Counts[str]] = []
        self._delays: deque[int] = deque(maxlen=1000)
        self._recent: deque[tuple[float, float]] = deque(maxlen=MOST_KEPT)
        self._counts = dict.fromkeys(OUTCOMES, 0)
        self._batches = self._rows = 0

    def request(self, outcome: str, seconds: float = 0.0) -> None:
        """Count a request; `seconds` from its receipt to its reply, of those that were answered."""
        self.requests.labels(outcome).inc()
        self._counts[outcome] += 1
        if outcome == "ok":
            self.total.observe(seconds)
            self._recent.append((time.monotonic(), seconds))

    def late(self, steps: int) -> None:
        """Count a request of a robot that will have executed so many steps when the answer comes."""
        self.delay.observe(steps)
        self._delays.append(steps)

    def batch(self, rows: int, seconds: float, queued: Sequence[float]) -> None:
        """Count a call of the policy and how long its requests had waited."""
        self._batches, self._rows = self._batches + 1, self._rows + rows
        self.rows.observe(rows)
        self.infer.observe(seconds)
        for one in queued:
            self.queue.observe(one)

    def quantile(self, q: float) -> float:
        """Seconds below which a share `q` of the requests of the last minutes was answered; 0 without any."""
        start = time.monotonic() - KEPT
        recent = sorted(seconds for at, seconds in list(self._recent) if at >= start)
        return recent[min(len(recent) - 1, int(q * len(recent)))] if recent else 0.0

    def text(self) -> str:
        """In the text format of Prometheus."""
        from prometheus_client import generate_latest

        for what, count in self._caches().items():
            self._cached.labels(what).set(count)
        return generate_latest(self.registry).decode()

    def _caches(self) -> dict[str, int]:
        return {what.replace(" ", "_"): count for counts in self.caches for what, count in counts.copy().items()}

    def stats(self, clients: int) -> str:
        """The same in short, as JSON."""
        found: dict[str, Any] = {"requests": self._counts, "clients": clients, "batches": self._batches}
        found["rows_per_batch"] = self._rows / max(1, self._batches)
        found["cache"] = self._caches()
        found["delay_p95"] = sorted(self._delays)[int(0.95 * (len(self._delays) - 1))] if self._delays else None
        found |= {f"p{q:g}_ms": 1000 * self.quantile(q / 100) for q in (50, 95, 99)}
        return json.dumps(found) + "\n"
