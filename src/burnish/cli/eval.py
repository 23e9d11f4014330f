"""`burnish eval`: parses, calls, prints."""

import argparse
from pathlib import Path

EPILOG = """examples:
  burnish eval runs/lift/policy --env tabletop:lift --episodes 100 --output runs/lift/eval/tuned
  burnish eval small --env tabletop:lift --output runs/lift/eval/base
  burnish eval runs/lift/policy --env tabletop:lift --instruction-swap --output runs/lift/eval/swap
  burnish eval random_object --env tabletop:lift --output runs/lift/eval/chance
  burnish eval CHECKPOINT --env libero:spatial/3 --cameras agentview wrist --output runs/spatial3

The same command again continues a killed evaluation. `burnish compare` compares two of them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("policy", help="LeRobot policy folder, a shipped base (small), or expert, random_object")
    add("--env", required=True, help="environment id, e.g. tabletop:lift, metaworld:mt10, libero:spatial/3")
    add("--output", required=True, type=Path, help="folder of this evaluation")
    add("--episodes", type=int, default=100, help="for each task (default 100)")
    add("--first-state", type=int, default=1_000_000, help="first initial state, where they are unlimited")
    add("--seed", type=int, default=0, help="seed of the policy's noise (default 0)")
    add("--workers", type=int, default=0, help="simulator processes (default: one for each core)")
    add("--batch-size", type=int, default=0, help="episodes in flight (default: four for each worker)")
    add("--max-steps", type=int, default=0, help="limit in control steps (default: the environment's)")
    add("--image-size", type=int, help="side of the images in pixels (default: the policy's)")
    add("--cameras", nargs="+", help="the environment's cameras in the policy's order (default: same names)")
    add("--n-action-steps", type=int, help="actions executed of each chunk (default: the policy's)")
    add("--device", default="", help="torch device of the policy (default: a GPU where there is one)")
    add("--instruction-swap", action="store_true", help="name another object in the instruction")
    add("--no-video", action="store_true", help="film no episode")


def main(args: argparse.Namespace) -> int:
    from burnish.evaluate.rollout import evaluate, evaluate_expert

    shared = {
        "episodes": args.episodes,
        "output": args.output,
        "first_state": args.first_state,
        "seed": args.seed,
        "workers": args.workers,
        "max_steps": args.max_steps,
        "video": not args.no_video,
    }
    if args.policy in ("expert", "random_object"):
        found = evaluate_expert(args.env, which=args.policy, image_size=args.image_size or 128, **shared)
    else:
        found = evaluate(
            args.policy,
            args.env,
            batch_size=args.batch_size,
            image_size=args.image_size,
            cameras=args.cameras,
            n_action_steps=args.n_action_steps,
            device=args.device,
            instruction_swap=args.instruction_swap,
            **shared,
        )
    print(found)
    print(f"written to {args.output}")
    return 0
