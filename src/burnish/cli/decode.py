"""`burnish decode POLICY`: a real chunk by one or more decoders, in figures, and a picture of how its blocks freeze."""

import argparse
import json
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n  burnish decode runs/blocks/policy --data data/tabletop/quickstart --count 32\n"
        "  burnish decode runs/blocks/policy --decoder pipelined --option preset=paper --picture blocks.png"
    )
    parser.add_argument("policy", help="a burnish_discrete policy folder")
    parser.add_argument("--decoder", action="append", default=[],
                        help="a decoder (repeatable); default: all that fit the policy")  # fmt: skip
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help="an option of the decode plan, e.g. conf=0.9 (repeatable)")  # fmt: skip
    parser.add_argument("--data", default="",
                        help="data set to decode, with action errors; default: random pictures")  # fmt: skip
    parser.add_argument("--count", type=int, default=4, help="observations, decoded one at a time")
    parser.add_argument("--repeats", type=int, default=3, help="timed decodes of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--picture", default="", help="draw the passes of a decoder (the first named, or pipelined) here"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", default="", help="also write the figures as JSON to this file")
    parser.add_argument("--own", action="store_true", help="the decoder and the options in the policy's config")
    parser.add_argument("--into", default="", metavar="FILE:LABEL",
                        help="add the first decoder's figures to the row LABEL of a result file")  # fmt: skip


def plan_options(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE items as options; values are YAML.

    Raises:
        BurnishError: an item without "=".
    """
    import yaml

    options = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise BurnishError(f"--option {item}", "NAME=VALUE")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BurnishError(f"--option {item} is unreadable", "NAME=VALUE, the value a number or word") from error
    return options


def main(args: argparse.Namespace) -> int:
    from burnish.policies import load_policy
    from burnish.runtime.decoders import compare_decoders

    found = compare_decoders(
        load_policy(args.policy, device=args.device), decoders=args.decoder, options=plan_options(args.option),
        own=args.own, data=args.data, count=args.count, repeats=args.repeats, picture=args.picture,
    )  # fmt: skip
    outcome = {
        "policy": args.policy, "options": args.option, "data": args.data, "count": args.count,
        "device": args.device, **found,
    }  # fmt: skip
    if args.output:
        from burnish.core.files import write_json

        write_json(Path(args.output), outcome)
    if args.into:
        _add_columns(args.into, next(iter(found["decoders"].values())))
    if args.json:
        print(json.dumps(outcome, indent=1))
    else:
        _print(**found)
    return 0


COLUMNS = {
    "passes": ("passes", "6.1f"), "rows": ("rows", "7.0f"), "ms": ("ms a chunk", "10.1f"), "p95": ("p95", "8.1f"),
    "first_step_ms": ("ms to step 1", "12.1f"), "left_to_right": ("left to right", "13.2f"),
    "action_error": ("action error", "12.4f"),
}  # fmt: skip


def _add_columns(target: str, figures: dict[str, Any]) -> None:
    """Put passes, rows, times and errors beside the success rate of the same decoder.

    Raises:
        BurnishError: no such file, or no such row in it.
    """
    from burnish.core.files import read_object, write_json

    name, _, label = target.rpartition(":")
    path = Path(name)
    if not path.is_file():
        raise BurnishError(f"--into {target}", "FILE:LABEL with an existing result file")
    result = read_object(path)
    rows = [row for row in result.get("rows", []) if row["label"] == label]
    if not rows:
        raise BurnishError(
            f"{path} has no row '{label}'", f"one of {', '.join(r['label'] for r in result.get('rows', []))}"
        )
    for row in rows:
        row |= {key: figures[key] for key in COLUMNS if key in figures}
    write_json(path, result)


def _print(decoders: dict[str, dict[str, Any]], refused: dict[str, str]) -> None:
    shown = {key: value for key, value in COLUMNS.items() if key in next(iter(decoders.values()))}
    print(" " * 16 + "  ".join(f"{title:>{form.partition('.')[0]}s}" for title, form in shown.values()))
    for name, row in decoders.items():
        print(f"{name:16s}" + "  ".join(f"{row[key]:{form}}" for key, (_, form) in shown.items()))
    for name, reason in refused.items():
        print(f"{name:16s}does not fit: {reason}")
