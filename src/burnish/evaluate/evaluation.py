"""What an evaluation found: rates with n and interval, latency, videos."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from burnish.evaluate.records import Record
from burnish.evaluate.stats import Rate, percentiles, wilson
from burnish.evaluate.watchdog import failure_auc, watched


def video_path(task: str, initial_state: int) -> Path:
    """Where the video of an episode lies inside the evaluation folder; its film strip is the .png beside it."""
    return Path("videos") / f"{task.replace(':', '_').replace('/', '_')}_{initial_state}.mp4"


@dataclass
class Evaluation:
    """What an evaluation found. Printing it gives the table with n and Wilson interval on every rate."""

    output: Path
    settings: dict[str, Any]
    records: list[Record]
    seconds: float = 0.0
    """Wall time of this run, without episodes that were there already."""
    new_episodes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    """Tasks without such an expert, and why."""
    reused: dict[str, int] = field(default_factory=dict)
    """Calls of a policy that acts on old pictures, see `runtime.caches.Reuse`; of this run."""
    watchdog_ms: float = 0.0
    """What a watchdog took for each observation of this run."""

    @property
    def overall(self) -> Rate:
        """Success over all episodes."""
        return wilson(sum(r.success for r in self.records), len(self.records))

    @property
    def per_task(self) -> dict[str, Rate]:
        """Success by task."""
        tasks = dict.fromkeys(r.task for r in self.records)
        groups = {t: [r.success for r in self.records if r.task == t] for t in tasks}
        return {t: wilson(sum(g), len(g)) for t, g in groups.items()}

    @property
    def other(self) -> Rate | None:
        """Under an instruction swap: how often the newly named object's task was solved."""
        flags = [r.other_success for r in self.records if r.other_success is not None]
        return wilson(sum(flags), len(flags)) if flags else None

    @property
    def failures(self) -> dict[str, int]:
        """How many episodes failed in which way, the most frequent first; empty where the environment cannot tell."""
        return dict(Counter(r.failure for r in self.records if r.failure).most_common())

    @property
    def latency_ms(self) -> dict[str, float]:
        """Percentiles of the policy call over all replans, in milliseconds."""
        return percentiles([ms for r in self.records for ms in r.latency_ms])

    @property
    def motion(self) -> dict[str, float]:
        """Of a policy under delay: means over episodes of `evaluate.delay.motion`, of `commit_error` the greatest."""
        moved = [r.motion for r in self.records if r.motion]
        values = {name: [one[name] for one in moved if name in one] for name in {n for one in moved for n in one}}
        return {n: max(v) if n == "commit_error" else sum(v) / len(v) for n, v in sorted(values.items())}

    @cached_property
    def watchdog(self) -> dict[str, Any]:
        """Of episodes with distances to the training set: mean of all, mean over episodes of the largest, and how well
        the largest predicts failure ("auc" with "interval", where some failed and some did not)."""
        seen = [r for r in self.records if r.distances]
        if not seen:
            return {}
        found: dict[str, Any] = {"n": len(seen), "mean": float(np.mean([np.mean(r.distances) for r in seen]))}
        found |= {"largest": float(np.mean([max(r.distances) for r in seen])), "ms": self.watchdog_ms}
        if predicts := failure_auc([watched(seen)]):
            found |= {"auc": predicts[0], "interval": list(predicts[1:])}
        return found

    def to_dict(self) -> dict[str, Any]:
        """As summary.json holds it."""
        videos = [
            {"task": r.task, "initial_state": r.initial_state, "success": r.success, "video": name}
            | {"film_strip": str(Path(name).with_suffix(".png"))}
            for r in self.records
            if (self.output / (name := str(video_path(r.task, r.initial_state)))).exists()
        ]
        steps = [r.steps for r in self.records if r.steps >= 0]  # -1: not known
        return {
            "overall": self.overall.to_dict(), "per_task": {t: rate.to_dict() for t, rate in self.per_task.items()},
            "other": self.other.to_dict() if self.other else None,
            "mean_steps": sum(steps) / len(steps) if steps else None, "latency_ms": self.latency_ms,
            "settings": self.settings, "commits": sorted({r.commit for r in self.records}), "videos": videos,
            "seconds": self.seconds, "new_episodes": self.new_episodes,
            "left_out": self.left_out, **({"failures": self.failures} if self.failures else {}),
            **({"motion": self.motion} if self.motion else {}), **({"reused": self.reused} if self.reused else {}),
            **({"watchdog": watchdog} if (watchdog := self.watchdog) else {}),
        }  # fmt: skip

    def __str__(self) -> str:
        width = max(len("overall"), *(len(t) for t in self.per_task))
        lines = [f"{task:<{width}}  {rate}" for task, rate in self.per_task.items()]
        if len(lines) > 1:
            lines.append(f"{'overall':<{width}}  {self.overall}")
        if self.left_out:
            lines.append(f"left out, without such an expert: {', '.join(self.left_out)}")
        if self.failures:
            lines.append("failed: " + ", ".join(f"{kind} {count}" for kind, count in self.failures.items()))
        if self.other:
            lines.append(f"solved the newly named object's task instead: {self.other}")
        if self.latency_ms:
            form = "policy call p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} ms ({n} replans)"
            lines.append(form.format(**self.latency_ms))
        if "auc" in (found := self.watchdog):
            form = (
                "largest distance to the training set: AUC of failure {auc:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
            )
            lines.append(form.format(**found))
        return "\n".join(lines)
