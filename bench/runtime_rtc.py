"""What going on from an old chunk costs, on the shipped base, and that the guidance is the formula's."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

TARGETS = {
    "guided_identity_over_plain": "<= 1.05",
    "guided_vjp_over_plain": "<= 1.6",
    "rtc_gaussian_error": "<= 1e-9",
    "bid8_over_one": "<= 4",
}


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole calls of `act` for one observation, in turns, medians of process time.

    Figures:
        guided_identity_over_plain, guided_vjp_over_plain: a call with steering (delay 2) over one without.
        rtc_gaussian_error: white Gaussian data, greatest distance of guided rows from the rows that they go on from.
        bid8_over_one: eight chunks of one encoding over one chunk.
    """
    import torch

    from burnish.policies import load_policy
    from burnish.policies.base import Policy
    from burnish.runtime.observations import observations
    from burnish.sampling.steering import Steering

    torch.set_num_threads(1)
    policy: Policy = load_policy("small").eval()
    batch = observations(policy, 1, "", 0)
    draws = policy.draw(1, torch.Generator().manual_seed(0))
    raw = policy.act(batch, draws).raw[:, policy.n_action_steps // 2 :]
    eight = torch.stack([policy.draw(1, torch.Generator().manual_seed(k)).noise for k in range(8)], 1)
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: policy.act(batch, draws),
        "guided_identity": lambda: policy.act(batch, draws, steering=Steering(raw, 2, jacobian="identity")),
        "guided_vjp": lambda: policy.act(batch, draws, steering=Steering(raw, 2, jacobian="vjp")),
        "bid8": lambda: policy.candidates(batch, eight),
    }
    rounds = 5 if args.quick else 60
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds + 3):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if k >= 3:  # the first rounds warm up
                spent[name].append(1000 * (time.process_time() - start))
    middle = {name: statistics.median(values) for name, values in spent.items()}
    ratios = {name: middle[name] / middle["plain"] for name in calls if name != "plain"}
    figures = {"guided_identity_over_plain": ratios["guided_identity"], "guided_vjp_over_plain": ratios["guided_vjp"],
               "rtc_gaussian_error": gaussian_error(), "bid8_over_one": ratios["bid8"]}  # fmt: skip
    return figures, {"policy": "small", "calls": rounds, "process_ms": middle}


def gaussian_error() -> float:
    """Data N(0, 1), ten Euler steps, hard weights, no clip: the guided rows run straight to the old chunk's."""
    import torch

    from burnish.sampling.steering import Guide, Steering

    draws, steps = torch.Generator().manual_seed(0), 10
    noise = torch.randn(4, 16, 2, generator=draws, dtype=torch.float64)
    old = torch.randn(4, 16, 2, generator=draws, dtype=torch.float64)
    guide, x = Guide(Steering(old, 6, schedule="hard", jacobian="vjp", clip=1e12), noise, steps), noise
    for k in range(steps):
        t = torch.tensor(1 - k / steps, dtype=torch.float64)
        x = x - guide.velocity(lambda points, t=t: points * (2 * t - 1) / ((1 - t) ** 2 + t**2), x, t) / steps
    return float((x - old)[:, :6].abs().max())
