"""Which sampler is good enough for a policy: errors in units of its own sampling spread, on the user's observations.

For chunks of equal noise, e is the root mean square difference to 100 Euler steps, over observations, noises, steps and
real dimensions of the normalised actions; s is the standard deviation of those 100-step chunks over noises at one
observation. One Euler step of an exact field returns the mean of the actions, so e = s there: a sampler with e >= s is
no better than the mean action.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.outputs import require_file
from burnish.core.progress import progress_bar
from burnish.core.provenance import commit, machine, weights_hash
from burnish.core.reading import read_object
from burnish.core.types import Batch
from burnish.policies.base import Policy, require
from burnish.policies.keys import TASK
from burnish.policies.load import resolve
from burnish.runtime.executor import Runtime
from burnish.runtime.observations import observations
from burnish.sampling.solvers import Velocity, make_solver

RUNTIME = "runtime.json"
"""Beside a policy folder: the choice that "auto" means. The folder itself stays as LeRobot knows it."""
AUTO = "auto"
REFERENCE = "euler:100"
CANDIDATES = (
    *(f"euler:{n}" for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)), *(f"ab2:{n}" for n in (2, 3, 4, 5, 6, 8, 10)),
    *(f"midpoint:{n}" for n in (2, 4, 6, 8)), *(f"heun:{n}" for n in (3, 5)), *(f"dpm2m:{n}" for n in (3, 4, 5, 6, 10)),
)  # fmt: skip
LEAST = 32
"""Observations that a choice needs."""
TOGETHER = 8
"""Observations in one call."""


@dataclass(frozen=True)
class Rule:
    """What a sampler must keep to.

    Args:
        error: e at most, in units of s; 0.25 leaves 94 % of the variance explained.
        kept: least and greatest share of the spread.
        dimension: error of one dimension at most, in units of its own spread,
        floor: or this share of its range over the reference's actions, whichever is more.
        sides: of a dimension with two values (a gripper), instead: least share of steps on the reference's side.
        decided: where s is a smaller share of the range than this the policy hardly samples; then `error` and `kept`
            mean nothing and dimensions alone decide, by the floor.
    """

    error: float = 0.25
    kept: tuple[float, float] = (0.90, 1.10)
    dimension: float = 0.5
    floor: float = 0.025
    sides: float = 0.995
    decided: float = 0.01


def judge(drawn: dict[str, Tensor], rule: Rule = Rule()) -> dict[str, Any]:
    """Errors of samplers, and the one with the fewest passes that keeps to the rule; at equal passes the least error.

    Args:
        drawn: actions [n, K, T, A] by sampler, n observations with K noises each, REFERENCE among them.

    Returns:
        "sampler" (REFERENCE's name where none keeps to it), "spread" (s), "decided", "binary" (indices of dimensions
        with two values), "dimensions" (their spreads and ranges) and "rows", by passes: sampler, passes, error (e / s),
        kept, worst (greatest error of a dimension, in units of what it is allowed), sides, ok.
    """
    reference = drawn[REFERENCE]
    variance = reference.var(1, unbiased=True).mean((0, 1))
    flat = reference.flatten(0, 2)
    low, high = flat.amin(0), flat.amax(0)
    width, spread = high - low, variance.mean().sqrt().clamp_min(1e-6)
    binary = two_valued(flat)
    decided = bool(spread < rule.decided * width.square().mean().sqrt())
    allowed = rule.floor * width if decided else torch.maximum(rule.dimension * variance.sqrt(), rule.floor * width)
    allowed = allowed.clamp_min(1e-3)  # of a dimension that never moves, where rounding is all there is
    rows = []
    for name, actions in drawn.items():
        if name == REFERENCE:
            continue
        apart = (actions - reference).square().mean((0, 1, 2))
        error = float(apart.mean().sqrt() / spread)
        kept = float(actions.var(1, unbiased=True).mean().sqrt() / spread)
        middle = (low + high) / 2
        same = ((actions > middle) == (reference > middle)).float().mean((0, 1, 2))
        sides = float(same[binary].min()) if bool(binary.any()) else 1.0
        worst = float((apart.sqrt() / allowed)[~binary].amax()) if not bool(binary.all()) else 0.0
        whole = decided or (error <= rule.error and rule.kept[0] <= kept <= rule.kept[1])
        ok = whole and worst <= 1 and sides >= rule.sides
        rows.append({"sampler": name, "passes": make_solver(name).passes, "error": error, "kept": kept, "worst": worst,
                     "sides": sides, "ok": ok})  # fmt: skip
    rows.sort(key=lambda row: (row["passes"], row["error"]))
    return {
        "sampler": next((row["sampler"] for row in rows if row["ok"]), REFERENCE), "spread": float(spread),
        "decided": decided, "binary": binary.nonzero()[:, 0].tolist(),
        "dimensions": {"spread": variance.sqrt().tolist(), "range": width.tolist()}, "rows": rows,
    }  # fmt: skip


def two_valued(values: Tensor) -> Tensor:
    """bool [A]: dimensions of values [N, A] of which 98 % lie near one of two ends, each of which has its share.

    Ends are the 0.5 % and 99.5 % quantiles, near is within 15 % of their distance. A normal distribution has 7 % there.
    """
    some = values[:: 1 + len(values) // 2**19].double()  # torch's quantile takes no more
    low, high = some.quantile(0.005, 0), some.quantile(0.995, 0)
    near = 0.15 * (high - low)
    at_low, at_high = (values <= low + near).double().mean(0), (values >= high - near).double().mean(0)
    return (high > low) & (at_low + at_high >= 0.98) & (at_low >= 0.01) & (at_high >= 0.01)


@torch.no_grad()
def draw_chunks(policy: Policy, batch: Batch, samplers: Sequence[str], noises: int, *, seed: int = 0,
                progress: bool = False) -> dict[str, Tensor]:  # fmt: skip
    """Normalised actions [n, K, T, A] of each sampler and of REFERENCE, from equal noise, through the executor.

    Args:
        policy: one that supports "runtime".
        batch: n observations; each is encoded once.
        noises: K.
    """
    names = list(dict.fromkeys([*samplers, REFERENCE]))

    def every(velocity: Velocity, noise: Tensor) -> Tensor:
        return torch.stack([make_solver(name)(velocity, noise) for name in names])

    runtime, draws, found = Runtime(policy, solver=every), torch.Generator().manual_seed(seed), []
    with progress_bar(total=len(batch[TASK]), desc="samplers", unit="observations", shown=progress) as bar:
        for begin in range(0, len(batch[TASK]), TOGETHER):
            part = {key: value[begin : begin + TOGETHER] for key, value in batch.items()}
            rows = len(part[TASK])
            noise = policy.draw(rows * noises, draws).to(policy.device).noise
            actions = runtime.sample(runtime.encode(part).repeat(noises), noise)[..., : policy.action_dim]
            found.append(actions.unflatten(1, (rows, noises)).float().cpu())
            bar.update(rows)
    return dict(zip(names, torch.cat(found, 1), strict=True))


def compare_samplers(policy: Policy, data: Path | str, *, count: int = 48, noises: int = 4, seed: int = 0,
                     samplers: Sequence[str] = (), progress: bool = True) -> dict[str, Any]:  # fmt: skip
    """`judge` of a policy on observations of a data set, through the executor, each observation encoded once.

    Args:
        policy: one that supports "runtime".
        data: LeRobot data set.
        count: observations.
        noises: chunks of each.
        seed: of observations and noise.
        samplers: to compare; empty means CANDIDATES and what the policy's config says.
        progress: show a bar on stderr.

    Raises:
        BurnishError: fewer than LEAST observations or 2 noises; a policy or data set that does not fit.
    """
    require(policy, "runtime", "samplers")
    if count < LEAST or noises < 2:
        raise BurnishError(f"{count} observations with {noises} noises", f"at least {LEAST} and 2", f"--count {LEAST}")
    names = samplers or (own_sampler(policy), *CANDIDATES)
    for name in names:
        make_solver(name)
    batch = observations(policy.eval(), count, data, seed)
    drawn = draw_chunks(policy, batch, names, noises, seed=seed, progress=progress)
    rule = Rule()
    return {**judge(drawn, rule), "own": own_sampler(policy), "rule": asdict(rule), "reference": REFERENCE,
            "observations": count, "noises": noises, "seed": seed, "data": str(data), "module": weights_hash(policy),
            "observations_hash": _hash(batch)}  # fmt: skip


def own_sampler(policy: Policy) -> str:
    return f"euler:{policy.flow_parts().steps}"


@contextmanager
def using_sampler(policy: Policy, sampler: str) -> Iterator[None]:
    """Inside, a policy of the caller's uses this sampler; "" leaves it its own."""
    if sampler:
        require(policy, "runtime", f"sampler {sampler}")
    own = policy.sampler
    policy.sampler = sampler or own
    try:
        yield
    finally:
        policy.sampler = own


def _hash(batch: Batch) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(batch.items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()[:16]


def save_choice(outcome: dict[str, Any], folder: Path, output: Path, command: str = "") -> None:
    """Write `outcome` of `compare_samplers` to a file, with the hash of the policy folder it was measured on."""
    require_file(output, "choice of a sampler")
    if outcome["sampler"] == REFERENCE:
        raise BurnishError("no sampler keeps to the rule", "one, or the policy's own steps", "no --output")
    info = machine()
    made = {"command": command, "commit": commit(), "device": info.pop("device"), "versions": info}
    write_json(output, {"weights": weights_hash(folder), **outcome, **made})


def find_sampler(sampler: str, policy: Policy | Path | str) -> str:
    """What stands behind a user's word for a sampler, checked.

    Args:
        sampler: a name of sampling.solvers; a file of `save_choice`; "auto", which is RUNTIME beside the policy folder;
            or "" for the policy's own, which stays "".
        policy: it, its folder, or the name of a shipped base.

    Raises:
        BurnishError: no such sampler or file, or a choice that was made for other weights.
    """
    if sampler != AUTO and not sampler.endswith(".json"):
        return make_solver(sampler).name if sampler else ""
    if not isinstance(policy, str | Path):
        raise BurnishError(f"sampler {sampler} with a policy in memory", "a policy folder, or a name like ab2:4")
    folder = resolve(policy)
    path = folder.parent / RUNTIME if sampler == AUTO else Path(sampler)
    fix = f"burnish policy verify runtime {policy} DATA --output {folder.parent / RUNTIME if path.is_file() else path}"
    if not path.is_file():
        raise BurnishError(f"sampler {sampler}: there is no {path}", "a choice made on observations of yours", fix)
    kept = read_object(path)
    if kept.get("weights") != weights_hash(folder):
        raise BurnishError(f"{path} was made for other weights", f"those of {policy}", fix)
    return make_solver(str(kept.get("sampler"))).name
