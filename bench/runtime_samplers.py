"""Samplers of the shipped base on tabletop observations: passes, errors in units of its own spread; one pass distilled.

Observations are those of experts under way, 0 to 15 steps into an episode; the policy knows both families.
"""

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.runtime_caches import batch_of

OBSERVATIONS, NOISES = 48, 4
FIRST, FIRST_OF_TRAINING = 6_000_000, 7_000_000
FAMILIES = ("reach", "push")
STEPS, ROWS, UNLABELLED, LR = 400, 32, 1200, 2e-4


def measure(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and their detail.

    Figures:
        passes_euler_over_auto: passes of the cheapest Euler that keeps to the rule over those of the sampler chosen.
        auto_error: e / s of the sampler chosen, which the detail names.
        euler_one_error, own_error: e / s of one Euler step, and of the base's own number of them.
        one_pass_error, one_pass_kept: after 400 steps of grid distillation to one pass, on other observations; with
            --long alone.
    """
    from burnish.policies import load_policy

    torch.set_num_threads(1)
    quick = args.quick
    policy = load_policy("small").eval()
    batch = _observe(policy, 8 if quick else OBSERVATIONS, FIRST)
    found = _table(policy, batch, ("euler:1", "euler:5", "euler:10", "ab2:4") if quick else ())
    rows = {row["sampler"]: row for row in found["rows"]}
    euler = [row["passes"] for name, row in rows.items() if name.startswith("euler:") and row["ok"]]
    chosen = rows.get(found["sampler"], {"passes": 100, "error": 0.0})
    figures: dict[str, float] = {
        "passes_euler_over_auto": min(euler, default=100) / chosen["passes"], "auto_error": chosen["error"],
        "euler_one_error": rows["euler:1"]["error"], "own_error": rows[found["own"]]["error"],
    }  # fmt: skip
    if getattr(args, "long", False):
        begin = time.perf_counter()
        student = _distilled(2 if quick else STEPS, 64 if quick else UNLABELLED)
        row = _against(policy, student, batch)
        figures |= {"one_pass_error": row["error"], "one_pass_kept": row["kept"]}
        found["distilled"] = {**row, "steps": STEPS, "batch": ROWS, "seconds": time.perf_counter() - begin}
    return figures, found


def _observe(policy: Any, count: int, first: int) -> dict[str, Any]:
    """Observations along expert episodes, one of each."""
    from burnish.envs.base import make_env

    envs, seen = [make_env(f"tabletop:{family}", policy.image_size) for family in FAMILIES], []
    for i in range(count):
        env = envs[i % len(envs)]
        env.reset(first + i)
        expert = env.expert(0)
        for _ in range((7 * i) % 16):
            env.step(np.clip(expert.act(), -1, 1))
        seen.append(env.observe(policy.cameras))
    return batch_of(policy, seen)


def _table(policy: Any, batch: dict[str, Any], samplers: tuple[str, ...]) -> dict[str, Any]:
    from burnish.runtime.choose import CANDIDATES, draw_chunks, judge, own_sampler

    names = [own_sampler(policy), *(samplers or CANDIDATES)]
    return {**judge(draw_chunks(policy, batch, names, NOISES)), "own": own_sampler(policy)}


def _against(policy: Any, student: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The student's one step against the reference of the policy that it was made of, on the same noise."""
    from burnish.runtime.choose import REFERENCE, draw_chunks, judge

    reference = draw_chunks(policy, batch, [], NOISES)[REFERENCE]
    one = draw_chunks(student, batch, ["euler:1"], NOISES)["euler:1"]
    return judge({REFERENCE: reference, "euler:1": one})["rows"][0]


def _distilled(steps: int, count: int) -> Any:
    """The base after grid distillation to one step, by the method's own functions and without labels."""
    from burnish.methods.few_steps.objective import landing_error, teacher_points, times
    from burnish.policies import load_policy
    from burnish.runtime.executor import Runtime

    def solve(velocity: Any, noise: Tensor) -> Tensor:
        return teacher_points(velocity, noise, 1, 16)

    student, teacher = load_policy("small"), Runtime(load_policy("small").eval(), solver=solve)
    for _, parameter in student.backbone_parameters():
        parameter.requires_grad_(False)
    own = [p for p in student.parameters() if p.requires_grad]
    seen, draws = _observe(student, count, FIRST_OF_TRAINING), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(own, lr=LR, weight_decay=0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 20) * (1 - step / steps)
        rows = torch.randint(count, (min(ROWS, count),), generator=draws).tolist()
        part = {k: [v[i] for i in rows] if isinstance(v, list) else v[rows] for k, v in seen.items()}
        points = teacher.sample(teacher.encode(part), student.draw(len(rows), draws).noise)
        found = student.velocity(part, points[:, :-1], times(1, points))
        loss = landing_error(points, found)[..., : student.action_dim].square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"python -m bench runtime: distilling, step {step} of {steps}", file=sys.stderr)
    return student.eval()
