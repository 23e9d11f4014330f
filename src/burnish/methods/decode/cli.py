"""`burnish decode POLICY`: a real chunk by one or more decoders, in figures, and a picture of how its blocks freeze."""

import argparse
import json
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n  burnish decode runs/blocks/policy\n"
        "  burnish decode runs/blocks/policy --decoder pipelined --option preset=paper --picture blocks.png"
    )
    parser.add_argument("policy", help="a burnish_discrete policy folder")
    parser.add_argument("--decoder", action="append", default=[],
                        help="a decoder (repeatable); default: all that fit the policy")  # fmt: skip
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help="an option of the decode plan, e.g. conf=0.9 (repeatable)")  # fmt: skip
    parser.add_argument("--data", default="", help="data set whose observations are decoded; default: random pictures")
    parser.add_argument("--repeats", type=int, default=5, help="decodes to time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--picture", default="", help="draw the passes of a decoder (the first named, or pipelined) here"
    )
    parser.add_argument("--json", action="store_true")


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
        options[name] = yaml.safe_load(value)
    return options


def main(args: argparse.Namespace) -> int:
    import torch

    from burnish.methods.decode.observations import observations
    from burnish.methods.decode.timing import time_decoder
    from burnish.policies import load_policy
    from burnish.policies.rows import row_model

    policy = load_policy(args.policy, device=args.device)
    model = row_model(policy)
    with torch.no_grad():
        prompt = model.embed(observations(policy, 1, args.data))
    made, refused = _decoders(model, args.decoder, plan_options(args.option))
    rows = []
    for name, decode in made.items():
        timed = time_decoder(decode, prompt, model, args.repeats)
        rows.append({"decoder": name, **timed})
    if args.json:
        print(json.dumps({"decoders": rows, "refused": refused}, indent=1))
    else:
        _print(rows, refused, model.length)
    if args.picture:
        from burnish.methods.decode.picture import draw_decode

        name = next(iter(made)) if args.decoder or "pipelined" not in made else "pipelined"
        draw_decode(model, made[name](prompt), name, Path(args.picture))
    return 0


def _print(rows: list[dict[str, Any]], refused: dict[str, str], length: int) -> None:
    """A table; "same" is the share of tokens that equal those of the first decoder."""
    print(f"{'decoder':16s} {'passes':>6s} {'rows':>6s} {'ms a chunk':>10s} {'ms to first step':>16s} {'same':>6s}")
    for row in rows:
        print(
            f"{row['decoder']:16s} {row['passes']:6d} {row['rows']:6d} {row['ms']:10.1f} {row['first_step_ms']:16.1f} "
            f"{sum(a == b for a, b in zip(row['ids'], rows[0]['ids'], strict=True)) / length:6.0%}"
        )
    for name, reason in refused.items():
        print(f"{name:16s} does not fit: {reason}")


def _decoders(model: Any, names: list[str], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Decoders by name, and why others do not fit; one that was asked for by name must fit."""
    from burnish.methods.decode import DECODERS, make_decoder

    made, refused = {}, {}
    for name in names or [name for name in DECODERS if name != "auto"]:
        try:
            made[name] = make_decoder(name, model, **options)
        except BurnishError as error:
            if names:
                raise
            refused[name] = str(error)
    if not made:
        raise BurnishError("no decoder fits this policy with these options", "", "leave --option away")
    return made, refused
