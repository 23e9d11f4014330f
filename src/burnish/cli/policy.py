"""`burnish policy`: how fast a policy is, how it decodes, whether a shortcut says what it should; and serving it."""

import shlex
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

from burnish.cli.parser import Arg, Group
from burnish.cli.serve import serve
from burnish.core.errors import BurnishError
from burnish.core.outputs import require_file
from burnish.core.reading import parse_yaml

Options = Annotated[list[str], Arg(metavar="NAME=VALUE")]
Count = Annotated[int, Arg(least=1, most=1024)]
Repeats = Annotated[int, Arg(least=1, most=100_000)]
Threads = Annotated[int, Arg(least=0, most=1024)]
OrZero = Annotated[int, Arg(least=0, most=65_536)]


def profile(
    policy: str, *, data: str = "", set_: Annotated[list[str], Arg(metavar="FIELD=VALUE")] = (), batch_size: Count = 1,
    repeats: Repeats = 30, warmup: OrZero = 3, device: str = "", threads: Threads = 0,
    tier: Literal["", "exact", "fused", "compiled", "bf16"] = "", fps: Annotated[float, Arg(least=0)] = 0.0,
    json: bool = False, output: Path | None = None,
) -> None:  # fmt: skip
    """Say where the time of a policy's call goes.

    Args:
        policy: policy folder or the name of a shipped base
        data: data set whose observations are used; default: random images
        set_: a field of the policy's config, e.g. num_steps=5; repeat at will
        batch_size: observations in a call
        repeats: calls to time
        warmup: calls before that
        device: torch device; default: a GPU where there is one
        threads: CPU threads; 0 means torch's own number
        tier: run it through the executor; default: as LeRobot does
        fps: control steps a second, in which the delay is told; default: those of --data
        json: print JSON instead of a table
        output: write the figures as JSON to this file

    Examples:
        burnish policy profile small
        burnish policy profile small --tier exact
        burnish policy profile runs/decode/policy --set decoder=one_pass --data data/tabletop/lift --output profile.json
    """
    from burnish.core.files import write_json
    from burnish.runtime.profile import profile_policy

    if output:
        require_file(output, "profile")
    outcome = profile_policy(
        policy, overrides=read_options(set_, "--set"), data=data, batch_size=batch_size, repeats=repeats,
        warmup=warmup, device=device, threads=threads, tier=tier, fps=fps,
    )  # fmt: skip
    if output:
        write_json(output, outcome)
    print(dumps(outcome, indent=1) if json else profile_table(outcome))


def profile_table(outcome: dict[str, Any]) -> str:
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
    unsynchronised = []
    if launched := outcome.get("launched"):
        parts = ", ".join(f"{name} {share:.1%}" for name, share in launched.items())
        unsynchronised = [f"where no border waits for the device (for comparison; it misleads): {parts}", ""]
    lines += [
        line("profiled", outcome["profiled_total"]), line("undisturbed", outcome["total"]),
        line("first action", outcome["first_action"]), "", *unsynchronised,
        f"{outcome['passes']:g} forward passes over {outcome['rows']:g} token positions (prompt included); "
        f"{outcome['actions_per_second']:.1f} actions a second ({outcome['actions_executed_of_a_chunk']} executed of "
        f"{outcome['chunk_size']}), {outcome['replans_per_second']:.1f} replans a second",
        f"{outcome['launches']} {'kernels' if launched else 'operators'} launched"
        + (f"; late by {outcome['control_steps']} control steps (p95)" if outcome["control_steps"] else "")
        + (f"; the device works for {outcome['device_ms']:.1f} ms of a call" if launched else ""),
        f"{outcome['calls']} calls of {outcome['batch_size']}, {outcome['type']}, {outcome['machine']['device']}, "
        f"{outcome['threads']} threads; stages make up {outcome['stages_over_total']:.1%} of the calls",
    ]  # fmt: skip
    return "\n".join(lines)


def decode(
    policy: str, *, decoder: list[str] = (), option: Options = (), data: str = "", count: Count = 4,
    repeats: Repeats = 3, device: str = "",
    figure: Annotated[Path | None, Arg(old=("--picture",), metavar="PNG")] = None, json: bool = False,
    output: Path | None = None,
) -> None:  # fmt: skip
    """Decode a chunk of action tokens by one or more decoders, in figures.

    Args:
        policy: folder of a token policy
        decoder: a decoder; repeat at will; default: all that fit the policy
        option: an option of the decode plan, e.g. threshold=0.9; repeat at will
        data: data set to decode, with action errors; default: random images
        count: observations, decoded one at a time
        repeats: timed decodes of each
        device: torch device; default: a GPU where there is one
        figure: draw the forward passes of a decoder (the first named, or pipelined)
        json: print JSON instead of a table
        output: also write the figures as JSON to this file

    Examples:
        burnish policy decode runs/blocks/policy --data data/tabletop/quickstart --count 32
        burnish policy decode runs/blocks/policy --decoder pipelined --option preset=paper --figure blocks.png
    """
    from burnish.core.files import write_json
    from burnish.policies import load_policy
    from burnish.runtime.decoders import compare_decoders

    for place, kind in ((output, "table of decoders"), (figure, "figure")):
        if place:
            require_file(place, kind)
    model = load_policy(policy, device=device)
    found = compare_decoders(
        model, decoders=decoder, options=read_options(option, "--option"), data=data, count=count,
        repeats=repeats, figure=figure or "",
    )  # fmt: skip
    outcome = {"policy": policy, "options": option, "data": data, "count": count, "device": str(model.device), **found}
    if output:
        write_json(output, outcome)
    print(dumps(outcome, indent=1) if json else decoder_table(**found))


COLUMNS = {
    "passes": ("passes", "6.1f"), "rows": ("rows", "7.0f"), "ms": ("ms a chunk", "10.1f"), "p95": ("p95", "8.1f"),
    "first_step_ms": ("ms to step 1", "12.1f"), "left_to_right": ("left to right", "13.2f"),
    "action_error": ("action error", "12.4f"), "token_error": ("token error", "11.3f"),
}  # fmt: skip


def decoder_table(decoders: dict[str, dict[str, Any]], refused: dict[str, str]) -> str:
    """A line for each decoder, and why the others do not fit."""
    shown = {key: value for key, value in COLUMNS.items() if key in next(iter(decoders.values()))}
    lines = [" " * 16 + "  ".join(f"{title:>{form.partition('.')[0]}s}" for title, form in shown.values())]
    for name, row in decoders.items():
        lines.append(f"{name:16s}" + "  ".join(f"{row[key]:{form}}" for key, (_, form) in shown.items()))
    lines += [f"{name:16s}does not fit: {reason}" for name, reason in refused.items()]
    return "\n".join(lines)


def verify_decode(
    policy: str, *, data: str = "", count: Count = 4, option: Options = (), double: bool = False, device: str = "",
    json: bool = False,
) -> int:  # fmt: skip
    """Check a token policy against the assumptions of fast decoding: look-ahead, leaks, drift, shift.

    The exit status is 1 where a check fails.

    Args:
        policy: folder of a token policy
        data: data set with true actions; default: random images
        count: observations
        option: an option of the decode plan, e.g. threshold=0.9; repeat at will
        double: compute in float64, where rounding decides nothing
        device: torch device; default: a GPU where there is one
        json: print JSON instead of a table

    Examples:
        burnish policy verify decode runs/blocks/policy
        burnish policy verify decode runs/blocks/policy --data data/tabletop/quickstart --count 8
    """
    from burnish.policies import load_policy
    from burnish.runtime.verify import verify_decode

    checks = verify_decode(
        load_policy(policy, device=device), data=data, count=count, options=read_options(option, "--option"),
        double=double,
    )  # fmt: skip
    if json:
        print(dumps([vars(check) for check in checks], indent=1))
    else:
        for check in checks:
            word = {True: "ok", False: "FAILED", None: "-"}[check.ok]
            numbers = "" if check.ok is None else f"{check.worst:.2g} (limit {check.limit:.2g})"
            print(f"{check.name:20s} {word:7s} {numbers:28s} {check.meaning}")
    return int(any(check.ok is False for check in checks))


def verify_score(
    policy: str, data: Path, *, reference: str = "", observations: Count = 16,
    candidates: Annotated[int, Arg(least=2, most=64)] = 4,
    draws: Annotated[list[int], Arg(several=True, least=1, most=4096)] = (1, 4, 16, 64),
    steps: Annotated[int, Arg(least=1, most=4096)] = 24, probes: OrZero = 0,
    disturbance: Annotated[float, Arg(least=0)] = 0.3, seed: int = 0, device: str = "",
    json: bool = False, output: Path | None = None,
) -> None:  # fmt: skip
    """Check a flow policy's score against its exact log-probability by the ODE.

    For each observation the chunk of the data set, one disturbed chunk and samples of the policy are compared. With
    --reference the margins of preference optimisation are compared: how much more than the reference the policy
    prefers one chunk to another. Divergences are exact; --probes estimates them where chunks are long.

    Args:
        policy: folder of a flow policy
        data: LeRobot data set with the policy's cameras
        reference: policy folder to take margins against
        observations: how many
        candidates: chunks for each
        draws: numbers of draws
        steps: steps of the ODE
        probes: random probes of the divergence; 0 means none, it is taken exactly
        disturbance: noise on the disturbed chunk, in standard deviations
        seed: seed of observations, noise and draws
        device: torch device; default: a GPU where there is one
        json: print JSON instead of a table
        output: also write the JSON to this file

    Examples:
        burnish policy verify score runs/lift/policy data/tabletop/quickstart
        burnish policy verify score runs/tuned/policy data/tabletop/quickstart --reference runs/lift/policy --draws 1 4
    """
    from burnish.core.files import write_json
    from burnish.methods.prefer.verify import verify_score
    from burnish.policies import load_policy

    if output:
        require_file(output, "table of scores")
    numbers = {"observations": observations, "candidates": candidates, "steps": steps, "probes": probes,
               "disturbance": disturbance, "seed": seed}  # fmt: skip
    model = load_policy(policy, device=device)
    other = load_policy(reference, device=device) if reference else None
    rows = verify_score(model, data, reference=other, draws=draws, **numbers)
    found = {"policy": policy, "reference": reference, "observations": observations, "candidates": candidates,
             "ode_steps": steps, "rows": rows}  # fmt: skip
    if output:
        command = ["burnish", "policy", "verify", "score", policy, str(data)]
        command += ["--reference", reference] if reference else []
        command += [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
        command += ["--draws", *map(str, draws)]
        write_json(output, _as_figures(shlex.join(command), found, model.device))
    if json:
        print(dumps(found, indent=1))
        return
    print(f"{'weight':8s} {'draws':>5s} {'shared':>11s} {'rank correlation':>17s} {'sign agreement':>15s}")
    for row in rows:
        kind = "shared" if row["shared"] else "independent"
        print(f"{row['weight']:8s} {row['draws']:5d} {kind:>11s} {row['rank_correlation']:17.3f} "
              f"{row['sign_agreement']:15.3f}")  # fmt: skip


def verify_runtime(
    policy: str, data: Path, *, count: Annotated[int, Arg(least=32, most=1024)] = 48,
    noises: Annotated[int, Arg(least=2, most=64)] = 4, sampler: list[str] = (), seed: int = 0, device: str = "",
    json: bool = False, output: Path | None = None,
) -> int:  # fmt: skip
    """Check what a flow policy's runtime promises, and choose the sampler with the fewest passes that will do.

    Samplers are compared with 100 Euler steps; errors are in units of the policy's own spread over noises. The rule: an
    error of at most 0.25, 90 to 110 % of the spread kept, no dimension far off. Tiers of the executor and its caches
    are held against LeRobot's sampler; the exit status is 1 where the exact tier or a cache has other bits.

    Args:
        policy: folder of a flow policy
        data: LeRobot data set with the policy's cameras
        count: observations
        noises: chunks for each
        sampler: a sampler, name:passes; repeat at will; default: all kinds and the policy's own
        seed: seed of observations and noise
        device: torch device; default: a GPU where there is one
        json: print JSON instead of a table
        output: keep all of it in this file; as runtime.json beside the policy folder it is what --sampler auto takes

    Examples:
        burnish policy verify runtime runs/lift/policy data/tabletop/quickstart --output runs/lift/runtime.json
        burnish policy verify runtime small data/tabletop/quickstart --sampler euler:5 --sampler ab2:4
    """
    from burnish.policies import load_policy
    from burnish.policies.load import resolve
    from burnish.runtime.choose import save_choice
    from burnish.runtime.verify import verify_runtime

    if output:
        require_file(output, "choice of a sampler")
    found = verify_runtime(
        load_policy(policy, device=device), data, count=count, noises=noises, seed=seed, samplers=sampler
    )
    print(dumps(found, indent=1) if json else f"{promises(found)}\n\n{sampler_table(found)}")
    if output:
        words = ["burnish", "policy", "verify", "runtime", policy, str(data), "--count", str(count)]
        words += ["--noises", str(noises), "--seed", str(seed), "--output", str(output)]
        words += [word for name in sampler for word in ("--sampler", name)]
        save_choice(found, resolve(policy), output, shlex.join(words))
    return int(not found["tiers"]["exact"]["holds"] or not all(found["caches"].values()))


def promises(found: dict[str, Any]) -> str:
    """Tiers, caches and old pictures as lines of text."""

    def said(tier: dict[str, Any]) -> str:
        return (
            "equal bits" if tier["bitwise"] else f"{tier.get('spread', tier['relative']):.1e}, limit {tier['limit']:g}"
        )

    broken = ", ".join(name for name, equal in found["caches"].items() if not equal)
    return "\n".join([
        *(f"tier {name:8s} {said(tier):28s} {'ok' if tier['holds'] else 'PROMISE BROKEN'}"
          for name, tier in found["tiers"].items()),
        f"caches        {f'OTHER BITS: {broken}' if broken else 'equal bits'}",
        *(f"pictures {row['age']} steps old: error / s {row['images']:.2f}, with a state as old {row['prefix']:.2f}"
          for row in found["old_pictures"]),
    ])  # fmt: skip


def sampler_table(found: dict[str, Any]) -> str:
    """A line for each sampler, and what was chosen."""
    lines = [f"{'sampler':14s}{'passes':>6s}{'error / s':>11s}{'spread kept':>13s}{'worst dimension':>17s}"]
    for row in found["rows"]:
        mark = "  chosen" if row["sampler"] == found["sampler"] else "  ok" if row["ok"] else ""
        mark += "  the policy's own" if row["sampler"] == found["own"] else ""
        lines.append(f"{row['sampler']:14s}{row['passes']:6d}{row['error']:11.3f}{row['kept']:13.2f}"
                     f"{row['worst']:17.2f}{mark}")  # fmt: skip
    lines.append(f"s = {found['spread']:.4f} in normalised actions, over {found['noises']} noises at each of "
                 f"{found['observations']} observations; worst dimension in units of what it is allowed")  # fmt: skip
    if found["decided"]:
        lines.append("s is under 1 % of the actions' range: the policy hardly samples, and dimensions alone decide")
    if not any(row["ok"] for row in found["rows"]):
        lines.append("none keeps to the rule: the policy's own steps stay")
    return "\n".join(lines)


def _as_figures(command: str, found: dict[str, Any], device: Any) -> dict[str, Any]:
    """In the form of `python -m bench`, so that pages can show it."""
    from burnish.core.provenance import commit, machine

    versions = machine(device)
    return {
        "name": "verify score", "command": command, "device": versions.pop("device"),
        "versions": versions, "commit": commit(), "n": found["observations"],
        "figures": {
            f"{figure}_{row['weight']}_{row['draws']}_{'shared' if row['shared'] else 'independent'}": row[figure]
            for figure in ("sign_agreement", "rank_correlation") for row in found["rows"]
        },
        "detail": found,
    }  # fmt: skip


def read_options(given: list[str], flag: str) -> dict[str, Any]:
    """NAME=VALUE items as options; values are YAML.

    Raises:
        BurnishError: an item without "=", a name given twice, or a value that is no YAML.
    """
    options = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise BurnishError(f"{flag} {item}", "NAME=VALUE")
        if name in options:
            raise BurnishError(f"{flag} {name} twice", "each once")
        options[name] = parse_yaml(value, f"{flag} {item[:100]}")
    return options


VERIFY = Group(
    "Check on a policy of yours that an estimate or a shortcut says what it should.",
    {"decode": verify_decode, "score": verify_score, "runtime": verify_runtime},
)
COMMANDS = Group(
    "Profile a policy, decode with it, verify shortcuts on it, serve it.",
    {"profile": profile, "decode": decode, "verify": VERIFY, "serve": serve},
)
