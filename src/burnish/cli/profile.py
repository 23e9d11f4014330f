"""`burnish profile POLICY`: the anatomy of a policy's latency, as a table, JSON and a picture."""

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n  burnish profile small\n"
        "  burnish profile runs/decode/policy --set decoder=one_pass --data data/tabletop/lift --output profile"
    )
    parser.add_argument("policy", help="policy folder or the name of a shipped base")
    parser.add_argument("--data", default="", help="data set whose observations are used; default: random pictures")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        help="a field of the policy's config, e.g. num_steps=5 (repeatable)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=1, help="observations in a call (default 1, as on a robot)")
    parser.add_argument("--repeats", type=int, default=30, help="calls to time (default 30)")
    parser.add_argument("--warmup", type=int, default=3, help="calls before that (default 3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's own number")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", default="", help="folder for profile.json and profile.png")


def main(args: argparse.Namespace) -> int:
    from burnish.cli.decode import plan_options
    from burnish.runtime.profile import profile_policy, write_profile

    outcome = profile_policy(
        args.policy, overrides=plan_options(args.set), data=args.data, batch_size=args.batch_size,
        repeats=args.repeats, warmup=args.warmup, device=args.device, threads=args.threads,
    )  # fmt: skip
    if args.output:
        write_profile(outcome, args.output)
    print(json.dumps(outcome, indent=1) if args.json else table(outcome))
    return 0


def table(outcome: dict[str, Any]) -> str:
    """Stages and totals as lines of text."""

    def line(name: str, figures: dict[str, float], share: float | None = None) -> str:
        part = "" if share is None else f"{share:7.1%}"
        return f"{name:14s}{figures['median']:10.2f}{figures['p95']:10.2f}{figures['p99']:10.2f}  {part}"

    whole = outcome["profiled_total"]["median"]
    lines = [f"{'ms':14s}{'median':>10s}{'p95':>10s}{'p99':>10s}    share"]
    for name, figures in outcome["stages"].items():
        lines.append(line(name, figures, figures["median"] / whole))
        if name == "passes":
            lines += [line(f"  pass {i + 2}", each) for i, each in enumerate(outcome["each_pass"])]
    lines += [line("profiled", outcome["profiled_total"]), line("undisturbed", outcome["total"])]
    lines.append(line("first action", outcome["first_action"]))
    lines.append("")
    lines.append(
        f"{outcome['passes']:g} passes over {outcome['rows']:g} rows (prompt included); "
        f"{outcome['actions_per_second']:.1f} actions a second ({outcome['actions_executed_of_a_chunk']} executed of "
        f"{outcome['chunk_size']}), {outcome['replans_per_second']:.1f} replans a second"
    )
    lines.append(
        f"{outcome['calls']} calls of {outcome['batch_size']}, {outcome['type']}, {outcome['machine']['device']}, "
        f"{outcome['threads']} threads; stages make up {outcome['stages_over_total']:.1%} of the calls"
    )
    return "\n".join(lines)
