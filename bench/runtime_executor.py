"""The executor's tiers against LeRobot's own sampler on equal noise: equal bits, and CPU time in turns, one thread."""

import argparse
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np

Calls = dict[str, Callable[[], Any]]


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shipped base, and tiny pi0 and pi05 with chunks of 50; for SmolVLA's own size see bench/real.py.

    Figures:
        exact_bitwise_<type>: the exact tier gave LeRobot's bits for one and for three observations; of discrete: keys
            that are kept, in a call and from call to call, gave the tokens and the passes of computing all anew.
        small_exact_over_lerobot: the shipped base, encoding and sampling.
        small_denoise_exact_over_lerobot, small_denoise_fused_over_lerobot, small_compiled_denoise_over_lerobot: all its
            denoising steps alone; not compiled in `--quick`.
        small_denoise_share_lerobot, ...: denoising steps' part of LeRobot's whole call.
        pi0_denoise_exact_over_lerobot, pi05_denoise_exact_over_lerobot: the same, tiny.
    """
    import torch

    torch.set_num_threads(1)
    rounds = 3 if args.quick else 60
    figures: dict[str, Any] = {}
    detail: dict[str, Any] = {"rounds": rounds}
    for kind, policy in _policies():
        tiers = ("exact", "fused") if args.quick or kind != "smolvla" else ("exact", "fused", "compiled")
        found, detail[kind] = compare(policy, tiers, rounds)
        figures[f"exact_bitwise_{kind}"] = detail[kind]["bitwise"]
        name = "small" if kind == "smolvla" else kind
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    figures["exact_bitwise_discrete"] = tokens_equal()
    return figures, detail


def compare(policy: Any, tiers: tuple[str, ...], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Ratios of LeRobot's time over each tier's, of tiers that keep their promise; and what stands behind them."""
    import torch

    from burnish.runtime.executor import Runtime
    from burnish.runtime.observations import observations

    batches = {rows: observations(policy, rows, "", rows) for rows in (1, 3)}
    inputs, _ = policy.begin(batches[1])
    noise = policy.draw(1, torch.Generator().manual_seed(0)).noise
    runtimes = {tier: Runtime(policy, tier=tier) for tier in tiers}
    parity, first = {}, {}
    for tier, runtime in runtimes.items():
        begin = time.perf_counter()
        parity[tier] = [runtime.verify(batch) for batch in batches.values()]
        first[tier] = time.perf_counter() - begin  # compilation is in here
    kept = [tier for tier in tiers if all(found["holds"] for found in parity[tier])]
    lerobot = policy.policy.model.sample_actions
    calls: Calls = {"lerobot": lambda: lerobot(*inputs, noise=noise),
                    "lerobot's steps": _lerobots_loop(policy, inputs, noise)}  # fmt: skip
    for tier in kept:
        sampler = runtimes[tier].sampler
        encoded = sampler.encode(inputs)
        calls[tier] = lambda sampler=sampler: sampler(inputs, noise)
        calls[f"{tier}'s steps"] = lambda sampler=sampler, encoded=encoded: sampler.sample(encoded, noise)
    with torch.no_grad():
        spent = in_turns(calls, rounds)
    pairs = {"denoise_share_lerobot": ("lerobot's steps", "lerobot")}
    for tier in kept:
        name = "compiled_denoise" if tier == "compiled" else f"denoise_{tier}"
        pairs[f"{tier}_over_lerobot"] = ("lerobot", tier)
        pairs[f"{name}_over_lerobot"] = ("lerobot's steps", f"{tier}'s steps")
    found = {figure: ratio(spent[one], spent[other]) for figure, (one, other) in pairs.items()}
    ratios, intervals = ({figure: value[i] for figure, value in found.items()} for i in (0, 1))
    equal = all(found["bitwise"] for found in parity["exact"])
    return ratios, {"bitwise": equal, "parity": parity, "process_ms": spent, "intervals": intervals,
                    "steps": policy.flow_steps, "first_calls_s": first}  # fmt: skip


def tokens_equal() -> bool:
    """Whether a tiny burnish_discrete decodes alike with kept keys (of blocks, of its prompt) and without."""
    from burnish.policies import load_policy
    from burnish.runtime.caches import keeping
    from burnish.runtime.observations import observations
    from burnish.sampling.kept import Kept
    from burnish.sampling.token_model import make_decoder
    from workshop.tiny import make_tiny

    with TemporaryDirectory() as place:
        policy = load_policy(make_tiny("burnish_discrete", place + "/p", overrides={"block_size": 7})).eval()
    model, equal = policy.token_model(), True
    for rows in (1, 3):
        batch = observations(policy, rows)
        prompt = model.embed(batch)
        found = [make_decoder("pipelined", model, cache=cache)(prompt) for cache in (True, False)]
        with keeping(policy, Kept()):
            found += [make_decoder("pipelined", model)(model.embed(batch)) for _ in range(2)]
        equal &= all(one.ids.equal(found[0].ids) and one.passes == found[0].passes for one in found)
    return equal


def in_turns(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of process time of each call, one after the other in every round; three rounds warm up."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 3):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if i >= 3:
                spent[name].append(1000 * (time.process_time() - begin))
    return spent


def ratio(above: list[float], below: list[float]) -> tuple[float, list[float]]:
    """The median over rounds of the quotient of two calls that stood beside one another, and its 95 % interval
    (bootstrap over rounds). What slows a shared machine down for a while slows both.
    """
    quotients = np.array(above) / np.array(below)
    draws = np.random.default_rng(0).choice(quotients, (2000, len(quotients)))
    return float(np.median(quotients)), np.quantile(np.median(draws, 1), [0.025, 0.975]).tolist()


def _lerobots_loop(policy: Any, inputs: list[Any], noise: Any) -> Callable[[], Any]:
    """LeRobot's Euler loop over an encoding that is already there."""
    from lerobot.policies.common.flow_matching import euler_integrate

    model, seen = policy.policy.model, {}
    real = model.denoise_step

    def note(*, x_t: Any, timestep: Any, **given: Any) -> Any:
        seen.update(given)
        return real(x_t=x_t, timestep=timestep, **given)

    with patch.object(model, "denoise_step", note):
        model.sample_actions(*inputs, noise=noise)
    steps = policy.flow_steps
    return lambda: euler_integrate(lambda x, t: real(x_t=x, timestep=t, **seen), noise, steps)


def _policies() -> Any:
    """(type, policy): the shipped base and tiny ones of the other types, their adaptive norms not at zero."""
    import torch

    from burnish.policies import load_policy
    from workshop.tiny import make_tiny

    yield "smolvla", load_policy("small").eval()
    for kind in ("pi0", "pi05"):
        with TemporaryDirectory() as place:
            folder = make_tiny(kind, place + "/p", overrides={"chunk_size": 50, "n_action_steps": 50})
            policy = load_policy(folder).eval()
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "norm.dense.weight" in name:
                    weight.normal_(std=0.2, generator=draws)
        yield kind, policy
