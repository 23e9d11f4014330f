"""`burnish verify score`: does the score of a flow policy order chunks as its exact log-probability does?"""

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.core.errors import BurnishError

if TYPE_CHECKING:
    from burnish.methods.prefer.draws import ScoreConfig
    from burnish.policies.flow import FlowPolicy

EPILOG = """examples:
  burnish verify score runs/lift/policy --data data/tabletop/quickstart
  burnish verify score runs/tuned/policy --reference runs/lift/policy --data data/tabletop/quickstart --draws 1 4 16

For each observation the chunk of the data set, one disturbed chunk and samples of the policy are compared. With
--reference the margins of preference optimisation are compared: how much more than the reference the policy prefers
one chunk to another. Divergences are exact; --probes estimates them where chunks are long.
"""


def verify_score(
    policy: "FlowPolicy", data: Path | str, *, reference: "FlowPolicy | None" = None, observations: int = 16,
    candidates: int = 4, draws: tuple[int, ...] = (1, 4, 16, 64), steps: int = 24, probes: int = 0,
    disturbance: float = 0.3, seed: int = 0, progress: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare scores with exact log-probabilities.

    Args:
        policy: a flow policy.
        data: LeRobot data set with its cameras.
        reference: the policy before preference optimisation; None compares plain differences of scores.
        observations, candidates: how many, and chunks for each.
        draws: numbers of draws to try.
        steps, probes: see burnish.runtime.flow_likelihood.ode_scores.
        disturbance: standard deviation of the noise on the disturbed chunk, in standard deviations of the actions.

    Returns:
        One row for each weight (elbo, uniform), number of draws, and shared or independent draws: rank_correlation,
        sign_agreement, both against the exact value.
    """
    import torch
    from tqdm import tqdm

    from burnish.methods.prefer.draws import ScoreConfig
    from burnish.runtime.flow_likelihood import agreement, ode_scores

    if steps < 1 or probes < 0 or not draws or min(draws) < 1 or not disturbance >= 0:
        raise BurnishError(f"steps {steps}, probes {probes}, draws {draws}, disturbance {disturbance}",
                           "steps and draws from 1, the others from 0")  # fmt: skip
    if reference is not None and reference.chunk_size != policy.chunk_size:
        raise BurnishError(f"a reference with chunks of {reference.chunk_size} steps", f"{policy.chunk_size}")
    models = [policy] if reference is None else [policy, reference]
    for model in models:
        model.eval()
    sets = _candidates(policy, Path(data), observations, candidates, disturbance, seed)
    with tqdm(total=len(sets) * len(models), desc="exact log-probabilities", unit="batch", disable=not progress) as bar:
        exact = []
        for batch, chunks in sets:
            values = []
            for model in models:
                values.append(ode_scores(model, batch, chunks, steps=steps, probes=probes, seed=seed))
                bar.update()
            exact.append(values[0] - values[1] if len(values) == 2 else values[0])
    truth = torch.cat(exact)
    uniform = ScoreConfig(times="uniform", weight="uniform")
    rows = []
    for name, config in (("elbo", ScoreConfig()), ("uniform", uniform)):
        for count in draws:
            for shared in (True, False):
                settings = replace(config, draws=count, shared=shared)
                found = torch.cat([_margin(models, batch, chunks, settings, seed) for batch, chunks in sets])
                rows.append({"weight": name, "draws": count, "shared": shared, **agreement(found, truth)})
    return rows


def _candidates(policy: "FlowPolicy", root: Path, count: int, candidates: int, disturbance: float, seed: int):
    """(batch, chunks [B, C, T, A]) in groups: the data's chunk, a disturbed one, samples of the policy."""
    import numpy as np
    import torch

    from burnish.core.seeding import generator
    from burnish.data.loader import RobotData

    if candidates < 2 or count < 1:
        raise BurnishError(f"{count} observations of {candidates} candidates", "at least 1 of 2")
    data = RobotData(root, policy.cameras, policy.chunk_size, min(count, 8), seed, augmented=False)
    random = generator("verify score", seed)
    spread = torch.from_numpy(data.actions.std(0))
    found = []
    for k in range(-(-count // 8)):
        batch = data.finish(data.raw(k), k)
        chunk = batch.pop("action")
        batch = {key: v for key, v in batch.items() if key in ("task", *_observed(policy, batch))}
        chunks = [chunk, chunk + disturbance * spread * torch.randn(chunk.shape, generator=random)]
        chunks += [policy.act(batch, policy.draw(len(chunk), random)).actions for _ in range(candidates - 2)]
        found.append((batch, torch.from_numpy(np.stack([c.float().cpu().numpy() for c in chunks], 1))))
    return found


def _observed(policy: "FlowPolicy", batch) -> list[str]:
    return [k for k in batch if k.startswith("observation.")]


def _margin(models, batch, chunks, config: "ScoreConfig", seed: int):
    """[B, C] scores, less those of the reference."""
    import torch

    from burnish.core.types import Draws
    from burnish.methods.prefer.draws import weigh
    from burnish.methods.prefer.scoring import one_set

    B, C = chunks.shape[:2]
    device = models[0].device
    rows = {k: v if isinstance(v, list) else v.to(device) for k, v in batch.items()}
    scores = []
    for m, model in enumerate(models):
        columns = []
        for c in range(C):
            label = () if config.shared else (m, c)
            sets = [one_set(model, replace(config, shared=True), "verify", seed, b, *label) for b in range(B)]
            draws = Draws(torch.stack([s.draws.noise for s in sets]), torch.stack([s.draws.time for s in sets]))
            with torch.no_grad():
                per_draw = model.scores(rows, chunks[:, c : c + 1].to(device), draws)
            columns.append(weigh(per_draw, torch.stack([s.weight for s in sets]).to(device)).mean(-1)[:, 0])
        scores.append(torch.stack(columns, 1).cpu())
    return scores[0] - scores[1] if len(scores) == 2 else scores[0]


def _as_figures(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """In the form of `burnish bench`, so that pages can show it."""
    from burnish.core.provenance import commit, machine

    against = ["--reference", args.reference] if args.reference else []
    numbers = ("observations", "candidates", "steps", "probes", "disturbance", "seed")
    given = [word for name in numbers for word in (f"--{name}", str(getattr(args, name)))]
    command = ["burnish", "verify", "score", args.policy, *against, "--data", str(args.data), *given]
    command += ["--draws", *map(str, args.draws)]
    versions = machine()
    return {
        "name": "verify score", "command": shlex.join(command), "device": versions.pop("device"),
        "versions": versions, "commit": commit(), "n": args.observations,
        "figures": {
            f"{figure}_{row['weight']}_{row['draws']}_{'shared' if row['shared'] else 'independent'}": row[figure]
            for figure in ("sign_agreement", "rank_correlation") for row in found["rows"]
        },
        "detail": found,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("policy", help="folder of a flow policy")
    add("--data", required=True, type=Path, help="LeRobot data set with the policy's cameras")
    add("--reference", default="", help="policy folder to take margins against")
    add("--observations", type=int, default=16, help="how many (default 16)")
    add("--candidates", type=int, default=4, help="chunks for each (default 4)")
    add("--draws", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of draws (default 1 4 16 64)")
    add("--steps", type=int, default=24, help="steps of the ODE (default 24)")
    add("--probes", type=int, default=0, help="random probes of the divergence; 0 takes it exactly")
    add("--disturbance", type=float, default=0.3, help="noise on the disturbed chunk, in standard deviations")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--output", default="", help="also write the JSON to this file")


def main(args: argparse.Namespace) -> int:
    from burnish.policies import load_policy
    from burnish.policies.flow import FlowPolicy

    models = [load_policy(path, device=args.device) for path in (args.policy, args.reference) if path]
    for model, path in zip(models, (args.policy, args.reference), strict=False):
        if not isinstance(model, FlowPolicy):
            raise BurnishError(f"{path} is no flow policy", "smolvla, pi0 or pi05; scores of tokens are exact")
    rows = verify_score(
        models[0], args.data, reference=models[1] if len(models) > 1 else None, observations=args.observations,
        candidates=args.candidates, draws=tuple(args.draws), steps=args.steps, probes=args.probes,
        disturbance=args.disturbance, seed=args.seed,
    )  # fmt: skip
    found = {"policy": args.policy, "reference": args.reference, "observations": args.observations,
             "candidates": args.candidates, "ode_steps": args.steps, "rows": rows}  # fmt: skip
    if args.output:
        from burnish.core.files import write_json

        write_json(Path(args.output), _as_figures(args, found))
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'weight':8s} {'draws':>5s} {'shared':>11s} {'rank correlation':>17s} {'sign agreement':>15s}")
    for row in rows:
        kind = "shared" if row["shared"] else "independent"
        print(f"{row['weight']:8s} {row['draws']:5d} {kind:>11s} {row['rank_correlation']:17.3f} "
              f"{row['sign_agreement']:15.3f}")  # fmt: skip
    return 0
