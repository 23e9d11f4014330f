"""Policies that answer late: what a robot does while its next chunk is computed, with the delay counted in steps.

At a replan the observation of step k goes to the policy; its chunk A, whose row 0 is for step k, is there at k + d.
Until then the robot executes what the old chunk Y had for these steps, then A from row d on; after s steps the next
replan is due. Before the first chunk it stands still. Noise is that of (initial state, replan): modes are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.config import DelayConfig
from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.core.reading import read_object
from burnish.core.seeding import generator
from burnish.core.types import Batch, Chunk, Draws
from burnish.envs.base import EnvSpec, Observation
from burnish.evaluate.batching import BatchedPolicy, Request
from burnish.evaluate.scheduler import Measurement, Planned
from burnish.evaluate.simulators import Finished
from burnish.policies.base import Policy, require
from burnish.sampling.steering import MODES, Steering, weights

CANDIDATES = 8
"""Chunks of which bidirectional decoding keeps the one nearest to the old one."""
COMMITTING = (*MODES, "tokens")
"""Modes that tell the policy what will have been executed."""


@dataclass(frozen=True)
class Plan:
    """A chunk [H, A] in environment units, row 0 first, and as the model has it: [H, A_model] (flow matching), or as
    tokens, long [H, A], with the replans since each was decided.
    """

    actions: np.ndarray
    raw: Tensor | None = None
    tokens: Tensor | None = None
    ages: Tensor | None = None

    def after(self, steps: int) -> "Plan":
        """What is left when so many rows are executed; never filled up."""
        return Plan(
            self.actions[steps:], *(None if x is None else x[steps:] for x in (self.raw, self.tokens, self.ages))
        )


class DelayedPolicy(BatchedPolicy):
    """As BatchedPolicy, but `act` returns whole plans, made in the knowledge of what is executed meanwhile.

    Args:
        policy, cameras, seed, width, n_action_steps: see BatchedPolicy; n_action_steps is s, the steps to a replan.

    Raises:
        BurnishError: rows that the delay needs do not exist, a mode that the policy has not got, or an environment that
            does not say how a robot stands still.
    """

    def __init__(self, policy: Policy, cameras: dict[str, str], seed: int, width: int, n_action_steps: int, *,
                 delay: DelayConfig, spec: EnvSpec):  # fmt: skip
        super().__init__(policy, cameras, seed, width, n_action_steps)
        self.delay, self.spec, left = delay, spec, policy.act_steps - n_action_steps
        d = delay.steps
        if delay.mode != "sync" and d > min(n_action_steps, left):
            found = f"a delay of {d} steps with chunks of {policy.act_steps}, {n_action_steps} executed of each"
            fits = policy.act_steps // 2
            fix = f"--n-action-steps {fits}" if d <= fits else "a shorter delay, or mode sync"
            raise BurnishError(found, f"at most {min(n_action_steps, left)}: the old chunk bridges the delay", fix)
        if d and not spec.relative:
            raise BurnishError(f"{spec.task_id} does not say how its robot stands still", "EnvSpec.relative")
        if delay.mode in MODES:
            require(policy, "steering", f"mode {delay.mode}")
        if delay.mode == "tokens":
            require(policy, "prefix", "mode tokens")
        if delay.carry:
            require(policy, "carry", "carry")
        self.carries = delay.mode == "tokens" and policy.supports("carry")
        self.mask = int(policy.token_model().mask_id or 0) if self.carries else 0

    def plans(self, requests: Sequence[Request]) -> tuple[list[Plan], float]:
        """A plan for each request, and the milliseconds of the call."""
        chunk, elapsed = self.timed(requests)
        raw = [None] * len(requests) if chunk.raw is None else list(chunk.raw.cpu())
        actions = chunk.actions[: len(requests)].float().cpu().numpy()
        plans = [Plan(a, r) for a, r in zip(actions, raw, strict=False)]
        if self.carries and chunk.tokens is not None:
            ages = [self._carried(request.rest)[1] for request in requests]
            plans = [replace(plan, tokens=found.view(age.shape), ages=age)
                     for plan, found, age in zip(plans, chunk.tokens.cpu(), ages, strict=False)]  # fmt: skip
        if self.delay.mode == "ensemble":
            plans = [_mean(plan, request.rest) for plan, request in zip(plans, requests, strict=True)]
        return plans, elapsed

    def sample(self, rows: Sequence[Request], batch: Batch, draws: Draws) -> Chunk:
        d, mode, rests = self.delay.steps, self.delay.mode, [row.rest for row in rows]
        known = next((rest for rest in rests if rest is not None), None)
        if self.carries and known is None:
            return self.runner.act(batch, draws, **self._until())
        if (
            known is None
            or mode in ("sync", "naive", "ensemble")
            or (d == 0 and mode in COMMITTING and not self.carries)
        ):
            return self.runner.act(batch, draws)
        has = torch.tensor([rest is not None for rest in rests])
        filled = [known if rest is None else rest for rest in rests]
        if mode == "bid":
            return self._nearest(rows, batch, draws, has, np.stack([rest.actions for rest in filled]))
        if mode == "tokens":
            return self._tokens(batch, draws, has, filled)
        raw = torch.stack([rest.raw for rest in filled]).to(self.device)
        options = {"jacobian": self.delay.jacobian, "schedule": self.delay.schedule, "clip": self.delay.clip or None}
        more: dict[str, Any] = {"steering": Steering(raw, has * d, has * raw.shape[1], mode=mode, **options)}
        return self.runner.act(batch, draws, **more)

    def _tokens(self, batch: Batch, draws: Draws, has: Tensor, rests: list[Plan]) -> Chunk:
        """Decoded behind the committed rows, as far as anybody executes; and with what the old chunk had left."""
        plain = None if has.all() else self.runner.act(batch, draws, **self._until())
        done = torch.from_numpy(np.stack([rest.actions[: self.delay.steps] for rest in rests])).to(self.device)
        more: dict[str, Any] = {"prefix": done, **self._until()}
        if self.delay.carry:
            more["carry"] = torch.stack([self._carried(rest)[0].flatten() for rest in rests])
        going = self.runner.act(batch, draws, **more)
        if plain is None:
            return going
        tokens = None if going.tokens is None else torch.where(has[:, None], going.tokens.cpu(), plain.tokens.cpu())
        return Chunk(torch.where(has[:, None, None], going.actions, plain.actions), tokens=tokens)

    def _until(self) -> dict[str, Any]:
        """Rows that are executed before the next chunk is there are all that have to be final."""
        return {"until": min(self.policy.act_steps, self.n_action_steps + self.delay.steps)} if self.carries else {}

    def _carried(self, rest: Plan | None) -> tuple[Tensor, Tensor]:
        """Tokens [H, A] to go on with, MASK where none is young enough, and their ages in the chunk to come."""
        ids = torch.full((self.policy.act_steps, self.policy.action_dim), self.mask)
        ages = torch.zeros_like(ids)
        if rest is not None and rest.tokens is not None and rest.ages is not None and self.delay.carry:
            n = len(rest.tokens)
            ids[:n] = torch.where(rest.ages < self.delay.carry, rest.tokens, self.mask)
            ages[:n] = (rest.ages + 1) * (ids[:n] != self.mask)
        return ids, ages

    def _nearest(self, rows: Sequence[Request], batch: Batch, draws: Draws, has: Tensor, old: np.ndarray) -> Chunk:
        """Of several chunks the one whose overlap with the old chunk is nearest, weighted as in `weights` (the backward
        half of bidirectional decoding, Liu et al., 2408.17355).
        """
        noises = [draws.noise.cpu()]
        for j in range(1, CANDIDATES):
            each = [self.policy.draw(1, generator(self.seed, r.task, r.initial_state, r.replan, j)) for r in rows]
            noises.append(torch.cat([one.noise for one in each]))
        found = self.runner.candidates(batch, torch.stack(noises, 1).to(self.device)).actions.cpu()
        n = old.shape[1]
        pull = weights(torch.tensor([self.delay.steps]), torch.tensor([n]), n, self.delay.schedule)[0]
        apart = ((found[:, :, :n] - torch.from_numpy(old)[:, None]).norm(dim=-1) * pull).sum(-1)
        best = torch.where(has, apart.argmin(1), 0)
        return Chunk(found[torch.arange(len(found)), best])

    def idle(self, last: np.ndarray | None) -> np.ndarray:
        """[A] of a robot that stands still: no motion, and of what is held the last command, first the lower limit."""
        held = self.spec.action_low if last is None else last
        return np.where(self.spec.relative, 0, held).astype(np.float32)


def _mean(plan: Plan, old: Plan | None) -> Plan:
    """The mean of old and new plan where both speak."""
    if old is None:
        return plan
    actions, n = plan.actions.copy(), len(old.actions)
    actions[:n] = (actions[:n] + old.actions) / 2
    return Plan(actions)


@dataclass
class Ahead(Planned):
    """An episode under delay: the plan that is left, what was executed, and of which replan (-1 standing still)."""

    rest: Plan | None = None
    executed: list[np.ndarray] = field(default_factory=list)
    chunk: list[int] = field(default_factory=list)
    commit_error: float = 0.0


class DelayedMeasurement(Measurement):
    """Measures episodes of a DelayedPolicy."""

    policy: DelayedPolicy

    def request(self, run: Ahead, observation: Observation) -> Request:
        return Request(observation, run.episode.task, run.episode.initial_state, len(run.latency_ms), run.rest)

    def again(self, run: Planned) -> Ahead:
        return Ahead(run.episode)

    def ask(self, asked: list[Request]) -> tuple[Sequence[Any], float]:
        return self.policy.plans(asked)

    def planned(self, run: Ahead, plan: Plan, milliseconds: float) -> np.ndarray:
        policy, number = self.policy, len(run.latency_ms)
        d, s, mode = policy.delay.steps, policy.n_action_steps, policy.delay.mode
        if mode == "sync" or run.rest is None:
            last = run.executed[-1] if run.executed else None
            lead, first, of = np.stack([policy.idle(last)] * d) if d else plan.actions[:0], 0, -1
        else:
            lead, first, of = run.rest.actions[:d], d, number - 1
            if mode in COMMITTING and d:
                run.commit_error = max(run.commit_error, float(np.abs(lead - plan.actions[:d]).max()))
        rows = np.concatenate([lead, plan.actions[first:s]])
        run.executed += list(rows)
        run.chunk += [of] * len(lead) + [number] * (s - first)
        run.rest = plan.after(s)
        run.latency_ms.append(round(milliseconds, 3))
        return rows

    def extras(self, run: Ahead, reply: Finished) -> dict[str, Any]:
        rows, chunk = np.stack(run.executed)[: reply.steps], np.array(run.chunk)[: reply.steps]
        moving = rows[:, np.asarray(self.policy.spec.relative, bool)] if self.policy.spec.relative else rows
        found = motion(moving, chunk)
        if self.policy.delay.mode in COMMITTING:
            found["commit_error"] = run.commit_error
        return {"motion": found}


def motion(actions: np.ndarray, chunk: np.ndarray) -> dict[str, float]:
    """How smoothly [N, A] actions go on, of which row i is of chunk `chunk[i]` (-1: standing still).

    Returns:
        "border": mean of |a_k - a_(k-1)| where the chunk changes; "inner": inside chunks; rests are in neither.
        "jerk": mean of the absolute second difference. "idle": steps standing still. Means over nothing are left out.
    """
    apart = np.linalg.norm(np.diff(actions, axis=0), axis=1)
    both = (chunk[1:] >= 0) & (chunk[:-1] >= 0)
    same = chunk[1:] == chunk[:-1]
    parts = {"border": apart[both & ~same], "inner": apart[both & same], "jerk": np.abs(np.diff(actions, 2, axis=0))}
    return {name: float(part.mean()) for name, part in parts.items() if part.size} | {"idle": float((chunk < 0).sum())}


def measured_steps(measured: str, fps: float) -> int:
    """Control steps, at `fps` a second, of a quantile of a latency that was measured, rounded up.

    Args:
        measured: p50, p95 or p99, a colon, and a file: of `burnish policy profile`, a server's /stats, or the
            summary.json of an evaluation.
    """
    name, colon, path = measured.partition(":")
    if not colon or name not in ("p50", "p95", "p99"):
        raise BurnishError(f"a delay of '{measured[:100]}'", "steps, or p50, p95, p99 of a file", "p95:profile.json")
    found, median = read_object(Path(path)), name if name != "p50" else "median"
    places = [found.get(f"{name}_ms"), *(part.get(key) for place in ("total", "latency_ms") for key in {name, median}
                                         if isinstance(part := found.get(place), dict))]  # fmt: skip
    ms = next((value for value in places if number(value)), None)
    if ms is None or not 0 < ms <= 1e7:  # a server that nobody has asked says 0
        raise BurnishError(f"{path} has no latency", "profile.json, a server's /stats or an evaluation's summary.json",
                           "burnish policy profile POLICY --output profile.json")  # fmt: skip
    return ceil(ms * fps / 1000 - 1e-9)
