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
    import sys

    import torch
    from tqdm import tqdm

    from burnish.policies import load_policy
    from burnish.runtime.observations import observations, split, true_tokens
    from burnish.sampling.timing import measure_decoder
    from burnish.sampling.token_model import token_model

    if args.count < 1 or args.repeats < 1:
        raise BurnishError(f"--count {args.count} --repeats {args.repeats}", "1 or more of each")
    if args.own and args.decoder:
        raise BurnishError(f"--own with --decoder {args.decoder[0]}", "one of them")
    policy = load_policy(args.policy, device=args.device)
    model = token_model(policy)
    batch = observations(policy, args.count, args.data)
    with torch.no_grad():
        prompts = split(model.embed(batch))
    truth = true_tokens(policy, batch) if args.data else None
    names, options = args.decoder, plan_options(args.option)
    if args.own:
        names, options = [policy.config.decoder_name], {**policy.config.decoder_options, **options}
    made, refused = _decoders(model, names, options)
    found = {}
    for name in tqdm(made, desc="decoders", unit="", file=sys.stderr, leave=False):
        found[name] = measure_decoder(
            made[name], prompts, model, repeats=args.repeats, truth=truth, actions=policy.policy.model.tokens.decode
        )
    outcome = {
        "policy": args.policy, "options": args.option, "data": args.data, "count": args.count,
        "device": args.device, "decoders": found, "refused": refused,
    }  # fmt: skip
    if args.output:
        from burnish.core.files import write_json

        write_json(Path(args.output), outcome)
    if args.into:
        _add_columns(args.into, next(iter(found.values())))
    if args.json:
        print(json.dumps(outcome, indent=1))
    else:
        _print(found, refused)
    if args.picture:
        from burnish.runtime.decode_plot import draw_decode

        name = next(iter(made)) if names or "pipelined" not in made else "pipelined"
        draw_decode(model, made[name](prompts[0]), name, Path(args.picture))
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


def _print(found: dict[str, dict[str, Any]], refused: dict[str, str]) -> None:
    shown = {key: value for key, value in COLUMNS.items() if key in next(iter(found.values()))}
    print(" " * 16 + "  ".join(f"{title:>{form.partition('.')[0]}s}" for title, form in shown.values()))
    for name, row in found.items():
        print(f"{name:16s}" + "  ".join(f"{row[key]:{form}}" for key, (_, form) in shown.items()))
    for name, reason in refused.items():
        print(f"{name:16s}does not fit: {reason}")


def _decoders(model: Any, names: list[str], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Decoders by name, and why others do not fit; one that was asked for by name must fit."""
    from burnish.sampling.token_model import DECODERS, make_decoder

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
