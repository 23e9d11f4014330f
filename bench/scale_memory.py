"""Memory at SmolVLA's size, for the bench `scale`: what methods add, and how well cost is predicted."""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from bench import memory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "bench_memory_smolvla.json"
MEASURED = ("src/burnish/train", "src/burnish/methods", "src/burnish/policies", "bench/memory.py")
"""What the peaks depend on."""


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """`bench memory` at SmolVLA's size, half an hour; at the tiny size with `--quick`.

    What results/ holds is taken over while the code has stayed as it was then; `detail.commit` says which.

    Figures:
        method_extra_p, cost_error: see bench.memory.
    """
    found = None if args.quick else _stored()
    if found is None:
        found = memory.run(argparse.Namespace(size="tiny" if args.quick else "smolvla"))
    return {name: found["figures"][name] for name in ("method_extra_p", "cost_error")}, found["detail"]


def _stored() -> dict[str, Any] | None:
    if not RESULTS.is_file():
        return None
    found = json.loads(RESULTS.read_text())
    changed = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", found["detail"]["commit"], "--", *MEASURED])
    return None if changed.returncode else found
