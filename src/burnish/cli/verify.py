"""`burnish verify WHAT POLICY`: check on a policy of yours that an estimate or a shortcut says what it should.

A check is a module here with `add_arguments(parser)` and `main(args) -> int`.
"""

import argparse
from importlib import import_module

# name: one line of help
CHECKS: dict[str, str] = {
    "decode": "a token policy against the assumptions of fast decoding: look-ahead, leaks, drift, shift",
    "score": "a flow policy's score against its exact log-probability by the ODE",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  burnish verify score small --data data/lift"
    checks = parser.add_subparsers(dest="check", required=True, metavar="WHAT")
    for name, line in CHECKS.items():
        check = checks.add_parser(
            name, help=line, description=line[0].upper() + line[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        import_module(f"burnish.cli.verify_{name}").add_arguments(check)


def main(args: argparse.Namespace) -> int:
    return import_module(f"burnish.cli.verify_{args.check}").main(args)
