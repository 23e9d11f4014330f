"""`burnish verify decode POLICY`: does the checkpoint look ahead, leak into its prompt, drift, or shift?"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n  burnish verify decode runs/blocks/policy\n"
        "  burnish verify decode runs/blocks/policy --data data/tabletop/quickstart --count 8"
    )
    parser.add_argument("policy", help="a burnish_discrete policy folder")
    parser.add_argument("--data", default="", help="data set with true actions; without it pictures are random")
    parser.add_argument("--count", type=int, default=4, help="observations")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help="an option of the decode plan, e.g. conf=0.9 (repeatable)")  # fmt: skip
    parser.add_argument("--double", action="store_true", help="compute in float64, where rounding decides nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    """Prints one line for each check; the status is 1 where one fails."""
    from burnish.cli.decode import plan_options
    from burnish.policies import load_policy
    from burnish.runtime.decode_checks import verify_decode

    policy = load_policy(args.policy, device=args.device)
    options = plan_options(args.option)
    checks = verify_decode(policy, data=args.data, count=args.count, options=options, double=args.double)
    if args.json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        for check in checks:
            word = {True: "ok", False: "FAILED", None: "-"}[check.ok]
            numbers = "" if check.ok is None else f"{check.worst:.2g} (limit {check.limit:.2g})"
            print(f"{check.name:20s} {word:7s} {numbers:28s} {check.meaning}")
    return int(any(check.ok is False for check in checks))
