"""`burnish weights`: extract, merge and inspect what a fine-tune has learnt, as a vector of weights."""

import logging
import os
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from burnish.cli.parser import Arg, Group
from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.options import home
from burnish.core.outputs import require_file

log = logging.getLogger("burnish")

Output = Annotated[Path, Arg(short="-o")]
Patterns = Annotated[list[str], Arg(metavar="REGEX")]
Heads = Literal["refuse", "skip", "keep"]


def extract(
    base: str, tuned: str, *, output: Output, control: str | None = None, include: Patterns = (),
    exclude: Patterns = (), heads: Heads = "refuse", dtype: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto",
    rename: Annotated[list[str], Arg(metavar="REGEX=NAME")] = (), strict: bool = False, threads: int = 0,
    force: bool = False, verify: bool = False,
) -> int:  # fmt: skip
    """Write the difference of two fine-tunes, or of one and the base, as a task vector (delta).

    Args:
        base: what both were tuned from: folder, file, or a shipped base
        tuned: checkpoint or peft adapter that has learnt it
        output: folder to write; it appears when it is whole
        control: the same without it; default: the base
        include: only tensors like this; repeat at will
        exclude: no tensors like this; repeat at will
        heads: what to do with action and state heads that differ between robots
        dtype: of the delta; auto: fp32 for half-precision parents, else fp64, which gives the tuned model back exactly
        rename: change names of tuned and control before they are matched; repeat at will
        strict: refuse two runs that differ in more than their methods (seed, steps, data, recipe)
        threads: 0 means one for each core
        force: replace an earlier output
        verify: read everything back and check every element

    Example:
        burnish weights extract small runs/aux/policy --control runs/plain/policy -o runs/delta
    """
    _one_blas_thread()
    from burnish.weights.extract import extract

    output = Path(_path(str(output), "-o"))
    rules = [_pair(text, "--rename", "REGEX=NAME") for text in rename]
    parents = _path(base, "base"), _path(tuned, "tuned"), control and _path(control, "--control")
    delta = extract(*parents, output=output, include=include, exclude=exclude, heads=heads, dtype=dtype, rename=rules,
                    strict=strict, threads=threads, force=force)  # fmt: skip
    meta = delta.meta
    print(f"{output}: {len(delta.tensors)} tensors, norm {delta.norm():.4g}, {len(meta['skipped'])} left out")
    if meta["not_exact"]:
        print(f"  {meta['not_exact']} elements do not give the tuned model to the last bit (--dtype {dtype})")
    if meta["rounding_noise"] > 0.1:
        log.warning("about %.0f%% of it is rounding of half-precision parents; extract from float32 weights or from "
                    "adapters", 100 * meta["rounding_noise"])  # fmt: skip
    return verify_weights(output, threads=threads) if verify else 0


def merge(
    base: str, *, output: Output, delta: Annotated[list[str], Arg(metavar="DELTA=WEIGHT")] = (),
    tuned: Annotated[list[str], Arg(metavar="CHECKPOINT=WEIGHT")] = (), operator: str = "task",
    option: Annotated[list[str], Arg(metavar="NAME=VALUE")] = (),
    module: Annotated[list[str], Arg(metavar="REGEX=FACTOR")] = (), include: Patterns = (), exclude: Patterns = (),
    heads: Heads = "refuse", dtype: Literal["auto", "base", "fp64", "fp32", "bf16", "fp16"] = "auto",
    other_base: bool = False, threads: int = 0, force: bool = False, verify: bool = False,
) -> int:  # fmt: skip
    """Add weighted deltas to a base.

    Args:
        base: folder, file, or a shipped base
        output: folder to write; it appears when it is whole
        delta: a delta and its weight, 1 when not given (a folder of that very name comes first); repeat at will
        tuned: merge its difference to the base, without keeping that; repeat at will
        operator: task, linear, slerp, ties or dare
        option: an option of the operator; repeat at will
        module: multiplies the weights where it is found first; repeat at will
        include: only tensors like this; repeat at will
        exclude: no tensors like this; repeat at will
        heads: what to do with action and state heads that differ between robots
        dtype: of changed tensors; auto: as wide as base and tuned model
        other_base: the base need not be the one of the deltas
        threads: 0 means one for each core
        force: replace an earlier output
        verify: read everything back and check every element

    Examples:
        burnish weights merge small --delta runs/delta=1.1 -o runs/merged --verify
        burnish weights merge small --delta a=0.7 --delta b=0.4 --operator ties --option density=0.3 -o runs/both
    """
    _one_blas_thread()
    from burnish.weights.merge import merge

    output = Path(_path(str(output), "-o"))
    record = merge(
        _path(base, "base"), [_weighted(text, "--delta") for text in delta], output=output,
        tuned=[_weighted(text, "--tuned") for text in tuned], operator=operator,
        options=dict(_pair(text, "--option", "NAME=VALUE") for text in option),
        modules=[_factor(text, "--module", "REGEX=FACTOR") for text in module], include=include, exclude=exclude,
        heads=heads, dtype=dtype, other_base=other_base, threads=threads, force=force,
    )  # fmt: skip
    changed = sum(bool(entry["weights"]) for entry in record["tensors"].values())
    print(f"{output}: {changed} of {len(record['tensors'])} tensors changed, {record['operator']}")
    return verify_weights(output, threads=threads) if verify else 0


def control(
    delta: str, kind: Literal["permute", "flip", "noise", "rescale"], *, output: Output, norm_of: str | None = None,
    seed: int = 0, force: bool = False,
) -> None:  # fmt: skip
    """Make a vector to compare with: permuted, flipped, random, or just rescaled.

    Args:
        delta: folder of the delta
        kind: permute moves elements within their tensor, flip their signs, noise draws new ones, rescale keeps them
        output: folder to write; it appears when it is whole
        norm_of: scale to this delta's norm
        seed: of permute and noise
        force: replace an earlier output

    Example:
        burnish weights control runs/delta permute --norm-of runs/seeds -o runs/permuted
    """
    _one_blas_thread()
    from burnish.weights.control import control

    output = Path(_path(str(output), "-o"))
    delta, norm_of = _path(delta, "delta"), norm_of and _path(norm_of, "--norm-of")
    made = control(delta, kind, output=output, norm_of=norm_of or None, seed=seed, force=force)
    print(f"{output}: {kind} of {delta}, norm {made.norm():.4g}")


def inspect(
    delta: str, *, other: Annotated[list[str], Arg(metavar="DELTA")] = (), plots: Path | None = None,
    json: bool = False, output: Annotated[Path | None, Arg(metavar="FILE")] = None,
) -> None:  # fmt: skip
    """Say what a delta is made of: norms, energy by part, angles to other deltas, sign conflict.

    Args:
        delta: folder of the delta
        other: compare with it; repeat at will
        plots: write figures to this folder
        json: print one JSON object
        output: also write the JSON object to this file

    Example:
        burnish weights inspect runs/delta --other runs/seeds --plots runs/delta-plots
    """
    _one_blas_thread()
    from burnish.weights.inspect import draw, inspect, table

    output = output and Path(_path(str(output), "--output"))
    if output:
        require_file(output, "inspection")
    found = inspect(_path(delta, "delta"), [_path(one, "--other") for one in other])
    if plots:
        found["plots"] = [str(path) for path in draw(found, _path(str(plots), "--plots"))]
    if output:
        write_json(output, found)
    print(dumps(found, indent=1) if json else table(found))


def verify_weights(path: Path, *, threads: int = 0) -> int:
    """Check every element of a delta or a merged checkpoint.

    The exit status is 1 where one differs.

    Args:
        path: folder that extract or merge wrote
        threads: 0 means one for each core

    Example:
        burnish weights verify runs/merged
    """
    _one_blas_thread()
    from burnish.weights.verify import verify

    found = verify(path, threads)
    print(f"  verified: {found['elements'] - found['unequal']} of {found['elements']} elements are right")
    return 1 if found["unequal"] else 0


def convert(
    folder: Path, output: Path, *, camera: Annotated[list[str], Arg(metavar="NAME")] = (), chunk_size: int = 8,
    no_crop: bool = False, force: bool = False,
) -> None:  # fmt: skip
    """Write an OpenVLA-OFT folder again with its pickled heads (.pt) as safetensors, so that policies load it.

    Args:
        folder: as it is published: config.json, safetensors, action_head--*.pt, perhaps proprio_projector--*.pt
        output: folder to write; it appears when it is whole
        camera: name of a camera, the main one first; repeat at will. Default: agentview and wrist, as in LIBERO
        chunk_size: actions in a chunk: 8 for LIBERO, 25 for ALOHA
        no_crop: it was trained without random crops of its images
        force: replace an earlier output

    Example:
        burnish weights convert openvla-7b-oft-finetuned-libero-spatial oft
    """
    from burnish.weights.convert import convert

    found = convert(_path(str(folder), "folder"), _path(str(output), "output"), chunk_size=chunk_size, force=force,
                    cameras=camera or ["agentview", "wrist"], center_crop=not no_crop)  # fmt: skip
    heads = ", ".join(f"{name} ({count} tensors)" for name, count in found["heads"].items())
    print(f"{output}: {heads}, {found['copied']} files copied")


def _one_blas_thread() -> None:
    """One BLAS thread for each thread of ours; numpy reads this when it is first imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _path(text: str, flag: str) -> str:
    """`text` with `~` as the home folder; one that no file system can hold is refused."""
    path = home(text, flag)
    if not path or "\0" in path or max(map(len, path.split("/"))) > 255 or len(path) > 4095:
        raise BurnishError(f"{flag} '{text[:60]}' is no path", "a folder or a file")
    return path


def _pair(text: str, flag: str, form: str) -> tuple[str, str]:
    left, equals, right = text.rpartition("=")
    if not equals:
        raise BurnishError(f"{flag} '{text}'", form)
    return left, right


def _weighted(text: str, flag: str) -> tuple[str, float]:
    """PATH=WEIGHT. What exists as it stands is a path of weight 1, whatever = it holds; else the last = splits."""
    path, equals, weight = text.rpartition("=")
    if not equals or os.path.lexists(_path(text, flag)):
        return _path(text, flag), 1.0
    try:
        return _path(path, flag), float(weight)
    except ValueError as error:
        raise BurnishError(f"{flag} {text}: there is no such folder, and '{weight}' after its last = is no weight",
                           f"a folder, or one and a number: {flag} {path}=1.1") from error  # fmt: skip


def _factor(text: str, flag: str, form: str) -> tuple[str, float]:
    name, factor = _pair(text, flag, form)
    try:
        return name, float(factor)
    except ValueError as error:
        raise BurnishError(f"{flag} {text}: '{factor}' is no number", f"{form}, for instance vision=0.5") from error


COMMANDS = Group(
    "Extract, merge and inspect what a fine-tune has learnt, as a task vector.",
    {"extract": extract, "merge": merge, "control": control, "inspect": inspect, "verify": verify_weights,
     "convert": convert},
)  # fmt: skip
