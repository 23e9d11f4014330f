"""`burnish pairs`: parses, calls, prints."""

import argparse
from pathlib import Path

EPILOG = """examples:
  burnish pairs runs/lift/policy --env tabletop:lift --states 200 --rollouts 4 --root data/pairs/lift
  burnish pairs --labels labels.jsonl --root data/my_robot

The second form makes pairs of a data set that is there: one line {"chosen": [episode, frame], "rejected":
[episode, frame]} for each human or programmatic label. Killed or interrupted, the same command continues.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("policy", nargs="?", default="", help="LeRobot policy folder; left out with --labels")
    add("--env", default="", help="environment id, e.g. tabletop:lift")
    add("--root", required=True, type=Path, help="pair folder to make, or the data set that the labels are about")
    add("--states", type=int, default=100, help="initial states for each task (default 100)")
    add("--rollouts", type=int, default=4, help="rollouts for each of them (default 4)")
    add("--first-state", type=int, default=500_000, help="first initial state, where they are unlimited")
    add("--seed", type=int, default=0, help="seed of the policy's noise (default 0)")
    add("--image-size", type=int, default=0, help="side of the recorded images (default: the policy's)")
    add("--action-noise", type=float, default=0.0, help="noise on a branch's first chunk, share of half the range")
    add("--expert", action="store_true", help="where all rollouts failed, let the expert complete one")
    add("--ties", choices=["skip", "faster"], default="skip", help="what to do with two successes (default skip)")
    add("--leads", type=int, nargs="+", default=[0], help="frames before the parting at which chunks start (default 0)")
    add("--limit", type=int, default=0, help="at most so many pairs for each initial state (default: all)")
    add("--workers", type=int, default=0, help="simulator processes (default: one for each core)")
    add("--device", default="", help="torch device of the policy (default: a GPU where there is one)")
    add("--labels", type=Path, help="JSON lines of labels on the data set --root")
    add("--state-tolerance", type=float, default=0.0, help="how far the starts of a labelled pair may differ")


def main(args: argparse.Namespace) -> int:
    from burnish.core.errors import BurnishError
    from burnish.evaluate.pairs import collect, import_labels

    if args.labels:
        print(f"{import_labels(args.root, args.labels, args.state_tolerance)} pairs in {args.root}")
        return 0
    if not args.policy or not args.env:
        raise BurnishError("burnish pairs without a policy or without --env", "both, or --labels")
    made = collect(
        args.policy, args.env, args.root, states=args.states, rollouts=args.rollouts, first_state=args.first_state,
        seed=args.seed, image_size=args.image_size, action_noise=args.action_noise, expert=args.expert,
        ties=args.ties, leads=args.leads, limit=args.limit, workers=args.workers, device=args.device,
    )  # fmt: skip
    print(made)
    return 0
