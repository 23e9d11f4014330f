"""What holds at real size and over many processes, in parts: `python -m bench scale --json [--part NAME]`.

A part is a module `bench/scale_<name>.py` with `measure(args) -> (figures, detail)`. Parts take long and need different
machines, so each can be run alone: its figures replace those of its earlier run in the results file, which keeps the
others' and says of every part where and from which commit it comes.
"""

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError

PARTS = ("shard", "memory", "data", "ray")
RESULTS = "results/bench_scale.json"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The parts asked for, beside what the results file holds of the others."""
    from burnish.core.provenance import commit, machine
    from burnish.core.reading import read_object

    if args.part and args.part not in PARTS:
        raise BurnishError(f"bench scale: part '{args.part}'", f"one of {', '.join(PARTS)}")
    if not args.output and not args.quick:
        args.output = RESULTS
    earlier = read_object(Path(args.output)) if args.output and Path(args.output).is_file() else {}
    figures, detail = dict(earlier.get("figures", {})), dict(earlier.get("detail", {}))
    for part in [args.part] if args.part else PARTS:
        if find_spec(f"bench.scale_{part}") is None:
            print(f"bench scale: there is no part '{part}' yet", file=sys.stderr)
            continue
        found, about = import_module(f"bench.scale_{part}").measure(args)
        figures |= found
        detail[part] = {"machine": machine(), "commit": commit(), "figures": sorted(found), **about}
    info = machine()
    return {"name": "scale", "device": info.pop("device"), "versions": info, "n": 1, "figures": figures,
            "detail": detail}  # fmt: skip
