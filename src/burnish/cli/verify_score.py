"""`burnish verify score`: does the score of a flow policy order chunks as its exact log-probability does?"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

EPILOG = """examples:
  burnish verify score runs/lift/policy --data data/tabletop/quickstart
  burnish verify score runs/tuned/policy --reference runs/lift/policy --data data/tabletop/quickstart --draws 1 4 16

For each observation the chunk of the data set, one disturbed chunk and samples of the policy are compared. With
--reference the margins of preference optimisation are compared: how much more than the reference the policy prefers
one chunk to another. Divergences are exact; --probes estimates them where chunks are long.
"""


def _as_figures(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """In the form of `burnish bench`, so that pages can show it."""
    from burnish.core.provenance import commit, machine

    against = ["--reference", args.reference] if args.reference else []
    numbers = ("observations", "candidates", "steps", "probes", "disturbance", "seed")
    given = [word for name in numbers for word in (f"--{name}", str(getattr(args, name)))]
    command = ["burnish", "verify", "score", args.policy, *against, "--data", str(args.data), *given]
    command += ["--draws", *map(str, args.draws)]
    versions = machine()
    return {
        "name": "verify score", "command": shlex.join(command), "device": versions.pop("device"),
        "versions": versions, "commit": commit(), "n": args.observations,
        "figures": {
            f"{figure}_{row['weight']}_{row['draws']}_{'shared' if row['shared'] else 'independent'}": row[figure]
            for figure in ("sign_agreement", "rank_correlation") for row in found["rows"]
        },
        "detail": found,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("policy", help="folder of a flow policy")
    add("--data", required=True, type=Path, help="LeRobot data set with the policy's cameras")
    add("--reference", default="", help="policy folder to take margins against")
    add("--observations", type=int, default=16, help="how many (default 16)")
    add("--candidates", type=int, default=4, help="chunks for each (default 4)")
    add("--draws", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of draws (default 1 4 16 64)")
    add("--steps", type=int, default=24, help="steps of the ODE (default 24)")
    add("--probes", type=int, default=0, help="random probes of the divergence; 0 takes it exactly")
    add("--disturbance", type=float, default=0.3, help="noise on the disturbed chunk, in standard deviations")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--output", default="", help="also write the JSON to this file")


def main(args: argparse.Namespace) -> int:
    from burnish.methods.prefer.verify import verify_score
    from burnish.policies import load_policy

    models = [load_policy(path, device=args.device) for path in (args.policy, args.reference) if path]
    rows = verify_score(
        models[0], args.data, reference=models[1] if len(models) > 1 else None, observations=args.observations,
        candidates=args.candidates, draws=tuple(args.draws), steps=args.steps, probes=args.probes,
        disturbance=args.disturbance, seed=args.seed,
    )  # fmt: skip
    found = {"policy": args.policy, "reference": args.reference, "observations": args.observations,
             "candidates": args.candidates, "ode_steps": args.steps, "rows": rows}  # fmt: skip
    if args.output:
        from burnish.core.files import write_json

        write_json(Path(args.output), _as_figures(args, found))
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'weight':8s} {'draws':>5s} {'shared':>11s} {'rank correlation':>17s} {'sign agreement':>15s}")
    for row in rows:
        kind = "shared" if row["shared"] else "independent"
        print(f"{row['weight']:8s} {row['draws']:5d} {kind:>11s} {row['rank_correlation']:17.3f} "
              f"{row['sign_agreement']:15.3f}")  # fmt: skip
    return 0
