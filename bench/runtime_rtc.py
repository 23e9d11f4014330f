"""What going on from an old chunk costs, on the shipped base, and that the guidance is the formula's."""

import argparse
import statistics
from typing import Any

from bench.runtime_executor import Calls, in_turns, ratio


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole calls of `act`, in turns, process time.

    Figures:
        guided_identity_over_plain, guided_vjp_over_plain: eight observations, a call with steering (delay 2) over one
            without; for one observation see the detail, where a pass backwards costs as much as it launches.
        rtc_gaussian_error: white Gaussian data, greatest distance of guided rows from the rows that they go on from.
        bid8_over_one: eight chunks of one encoding over one chunk.
    """
    import torch

    from burnish.policies import load_policy

    torch.set_num_threads(1)
    policy = load_policy("small").eval()
    rounds = 5 if args.quick else 60
    one, eight = (spent(policy, width, rounds) for width in (1, 8))
    detail: dict[str, Any] = {"policy": "small", "calls": rounds, "process_ms_1": one, "process_ms_8": eight}
    figures, detail["intervals"] = {}, {}
    for how in ("guided_identity", "guided_vjp"):
        detail[f"{how}_over_plain_1"] = ratio(one[how], one["plain"])[0]
        figures[f"{how}_over_plain"], detail["intervals"][how] = ratio(eight[how], eight["plain"])
    bid8 = statistics.median(one["bid8"]) / statistics.median(one["plain"])
    return {**figures, "rtc_gaussian_error": gaussian_error(), "bid8_over_one": bid8}, detail


def spent(policy: Any, width: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of process time of each kind of call for `width` observations."""
    import torch

    from burnish.runtime.observations import observations
    from burnish.sampling.steering import Steering

    batch = observations(policy, width, "", 0)
    draws = [policy.draw(width, torch.Generator().manual_seed(seed)) for seed in range(8)]
    raw = policy.act(batch, draws[0]).raw[:, policy.n_action_steps // 2 :]
    noise = torch.stack([one.noise for one in draws], 1)
    calls: Calls = {
        "plain": lambda: policy.act(batch, draws[0]),
        "guided_identity": lambda: policy.act(batch, draws[0], steering=Steering(raw, 2, jacobian="identity")),
        "guided_vjp": lambda: policy.act(batch, draws[0], steering=Steering(raw, 2, jacobian="vjp")),
        "bid8": lambda: policy.candidates(batch, noise),
    }
    return in_turns(calls, rounds)


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
