"""`burnish compare`: parses, calls, prints."""

import argparse
import json

EPILOG = """examples:
  burnish compare runs/lift/eval/base runs/lift/eval/tuned
  burnish compare base.jsonl tuned.jsonl --task-regex 'spatial/[0-4]$' --json
  burnish compare base/seed0 tuned/seed0 --a base/seed1 --b tuned/seed1      several runs of each arm

A and B are evaluation folders, or files with one JSON object per line: task, seed (or initial_state, or trial),
success. Trials are paired on task and initial state.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("A", help="first arm, for instance the base")
    parser.add_argument("B", help="second arm, for instance the tuned policy; differences are B minus A")
    parser.add_argument("--a", action="append", default=[], metavar="PATH", help="a further run of A; repeat at will")
    parser.add_argument("--b", action="append", default=[], metavar="PATH", help="a further run of B; repeat at will")
    parser.add_argument("--task-regex", metavar="REGEX", help="only tasks in which this is found")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    from burnish.evaluate.compare import compare

    found = compare([args.A, *args.a], [args.B, *args.b], task_regex=args.task_regex, seed=args.seed)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0
