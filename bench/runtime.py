"""Running a policy: the executor against LeRobot's samplers, samplers, real-time chunking, the server.

Every part is a module bench/runtime_<part>.py with `measure(args) -> (figures, detail)`, imported when its turn comes;
`--part NAME` runs one alone. Peers run in one process, in turns; where outputs are not equal there is no ratio.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError


def parts() -> list[str]:
    """Names of the parts, by their files."""
    return sorted(path.stem.removeprefix("runtime_") for path in Path(__file__).parent.glob("runtime_*.py"))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All parts, or the one of `args.part`; a part that lacks an installed package says so and the others go on."""
    from burnish.core.provenance import machine

    if args.part and args.part not in parts():
        raise BurnishError(f"--part {args.part} of bench runtime", f"one of {', '.join(parts())}")
    figures: dict[str, Any] = {}
    detail: dict[str, Any] = {}
    for part in [args.part] if args.part else parts():
        print(f"python -m bench runtime: {part}", file=sys.stderr)
        try:
            found, detail[part] = import_module(f"bench.runtime_{part}").measure(args)
        except BurnishError as error:
            found, detail[part] = {}, {"failed": str(error)}
        figures |= found
    info = machine("cpu")
    name = info.pop("device")
    return {"name": "runtime", "device": name, "versions": info, "figures": figures, "detail": detail}
