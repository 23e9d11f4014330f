"""`burnish capability`: parses, calls, prints."""

import argparse
import json
import os
import sys
from pathlib import Path

from burnish.core.errors import BurnishError

EPILOG = """examples:
  burnish capability extract --base small --tuned runs/aux/policy --control runs/plain/policy -o runs/delta
  burnish capability inspect runs/delta --plots runs/delta-plots
  burnish capability merge --base small --delta runs/delta=1.1 -o runs/merged --verify
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_extract(actions.add_parser("extract", help="difference of two fine-tunes, or of one and the base"))
    _add_merge(actions.add_parser("merge", help="add weighted deltas to a base"))
    sub = actions.add_parser("inspect", help="norms, energy by part, angles to other deltas, sign conflict; plots")
    sub.add_argument("delta")
    sub.add_argument("--other", action="append", default=[], metavar="DELTA", help="compare with it; repeat at will")
    sub.add_argument("--plots", default="", metavar="FOLDER", help="write pictures there")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument("--output", default="", metavar="FILE", help="also write the JSON object to this file")
    sub = actions.add_parser("control", help="a vector to compare with: permuted, flipped, random, or just rescaled")
    sub.add_argument("delta")
    sub.add_argument("--kind", required=True, choices=("permute", "flip", "noise", "rescale"))
    sub.add_argument("--norm-of", default="", metavar="DELTA", help="scale to this delta's norm")
    sub.add_argument("--seed", type=int, default=0)
    _add_output(sub)
    sub = actions.add_parser("verify", help="check every element of a delta or a merged checkpoint")
    sub.add_argument("path")
    sub.add_argument("--threads", type=int, default=0)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, help="folder to write; appears when it is whole")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--include", action="append", default=[], metavar="REGEX", help="only tensors like this")
    parser.add_argument("--exclude", action="append", default=[], metavar="REGEX", help="no tensors like this")
    parser.add_argument("--heads", default="refuse", choices=("refuse", "skip", "keep"),
                        help="action and state heads that differ between robots")  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="read everything back and check every element")


def _add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="what both were tuned from: folder, file, or a shipped base")
    parser.add_argument("--tuned", required=True, help="checkpoint or peft adapter that has the capability")
    parser.add_argument("--control", default=None, help="the same without it; the base when not given")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp64", "fp32", "bf16", "fp16"))
    parser.add_argument("--form", default="auto", choices=("auto", "dense", "lowrank"),
                        help="auto keeps two LoRA adapters as an exact low-rank delta")  # fmt: skip
    parser.add_argument("--rename", action="append", default=[], metavar="REGEX=NAME",
                        help="change names of tuned and control before they are matched")  # fmt: skip
    _add_selection(parser)
    _add_output(parser)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="folder, file, or a shipped base")
    parser.add_argument("--delta", action="append", default=[], metavar="DELTA=WEIGHT", help="repeat at will")
    parser.add_argument("--tuned", action="append", default=[], metavar="CHECKPOINT=WEIGHT",
                        help="merge its difference to the base, without keeping that")  # fmt: skip
    parser.add_argument("--operator", default="task", help="task, linear, slerp, ties or dare")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the operator")
    parser.add_argument("--module", action="append", default=[], metavar="REGEX=FACTOR",
                        help="multiplies the weights where it is found first")  # fmt: skip
    parser.add_argument("--dtype", default="auto", choices=("auto", "base", "fp32", "fp64", "bf16", "fp16"),
                        help="of changed tensors; auto: as wide as base and tuned model")  # fmt: skip
    parser.add_argument("--other-base", action="store_true", help="the base need not be the one of the deltas")
    _add_selection(parser)
    _add_output(parser)


def main(args: argparse.Namespace) -> int:
    # One BLAS thread for each of our own; numpy reads this when it is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return ACTIONS[args.action](args)


def _extract(args: argparse.Namespace) -> int:
    from burnish.weights.extract import extract

    delta = extract(
        args.base, args.tuned, args.control, output=args.output, include=args.include, exclude=args.exclude,
        heads=args.heads, dtype=args.dtype, form=args.form, threads=args.threads, force=args.force,
        rename=[_pair(text, "--rename", "REGEX=NAME") for text in args.rename],
    )  # fmt: skip
    meta = delta.meta
    print(f"{args.output}: {len(delta.tensors)} tensors, norm {delta.norm():.4g}, {len(meta['skipped'])} left out")
    if meta["not_exact"]:
        print(f"  {meta['not_exact']} elements do not give the tuned model to the last bit (--dtype {args.dtype})")
    if meta["rounding_noise"] > 0.1:
        print(f"  about {meta['rounding_noise']:.0%} of it is rounding of half-precision parents; "
              "extract from float32 weights or from adapters", file=sys.stderr)  # fmt: skip
    return _verified(args)


def _merge(args: argparse.Namespace) -> int:
    from burnish.weights.merge import merge

    record = merge(
        args.base, [_weighted(text) for text in args.delta], tuned=[_weighted(text) for text in args.tuned],
        output=args.output, operator=args.operator,
        options=dict(_pair(text, "--option", "NAME=VALUE") for text in args.option),
        modules=[(p, _number(f, "--module")) for p, f in (_pair(t, "--module", "REGEX=FACTOR") for t in args.module)],
        include=args.include, exclude=args.exclude, heads=args.heads, dtype=args.dtype, other_base=args.other_base,
        threads=args.threads, force=args.force,
    )  # fmt: skip
    changed = sum(bool(entry["weights"]) for entry in record["tensors"].values())
    print(f"{args.output}: {changed} of {len(record['tensors'])} tensors changed, {record['operator']}")
    return _verified(args)


def _verified(args: argparse.Namespace) -> int:
    if not args.verify:
        return 0
    return _verify(argparse.Namespace(path=args.output, threads=args.threads))


def _verify(args: argparse.Namespace) -> int:
    from burnish.weights.verify import verify

    found = verify(args.path, args.threads)
    print(f"  verified: {found['elements'] - found['unequal']} of {found['elements']} elements are right")
    return 1 if found["unequal"] else 0


def _inspect(args: argparse.Namespace) -> int:
    from burnish.weights.inspect import draw, inspect, table

    found = inspect(args.delta, args.other)
    if args.plots:
        found["plots"] = [str(path) for path in draw(found, args.plots)]
    if args.output:
        from burnish.core.files import write_json

        write_json(Path(args.output), found)
    print(json.dumps(found, indent=1) if args.json else table(found))
    return 0


def _control(args: argparse.Namespace) -> int:
    from burnish.weights.control import control

    delta = control(args.delta, args.kind, output=args.output, norm_of=args.norm_of or None, seed=args.seed,
                    threads=args.threads, force=args.force)  # fmt: skip
    print(f"{args.output}: {args.kind} of {args.delta}, norm {delta.norm():.4g}")
    return 0


ACTIONS = {
    "extract": _extract, "merge": _merge, "inspect": _inspect, "control": _control,
    "verify": _verify,
}  # fmt: skip


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    left, equals, right = text.rpartition("=")
    if not equals:
        raise BurnishError(f"{option} '{text}'", form)
    return left, right


def _weighted(text: str) -> tuple[str, float]:
    """DELTA=WEIGHT; without a weight it is 1."""
    if "=" not in text:
        return text, 1.0
    path, weight = _pair(text, "--delta", "DELTA=WEIGHT")
    return path, _number(weight, "--delta")


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise BurnishError(f"{option} has the weight '{text}'", "a number, for instance 1.1") from error
