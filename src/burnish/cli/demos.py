"""`burnish demos`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--env", required=True, help="tabletop:lift, metaworld:mt10, libero:spatial, libero:goal/3, ..."
    )
    parser.add_argument("--episodes", type=int, required=True, help="demonstrations in all, shared by the tasks")
    parser.add_argument("--root", type=Path, required=True, help="folder of the data set to make")
    parser.add_argument("--image-size", type=int, default=96, help="height and width in pixels (default 96)")
    parser.add_argument("--cameras", default="", help="views to record, separated by commas; default: the first one")
    parser.add_argument("--seed", type=int, default=0, help="first initial state (default 0)")
    parser.add_argument("--workers", type=int, default=0, help="simulator processes; 0 means one for each core")
    parser.add_argument("--geometry", action="store_true", help="also keep depth and object masks of every frame")
    parser.epilog = (
        "Only solved episodes enter the data set. Killed or interrupted, the same command continues.\n\n"
        "example:\n  burnish demos --env tabletop:lift --episodes 200 --root data/lift --cameras front,wrist"
    )


def main(args: argparse.Namespace) -> int:
    from burnish.data.demos import make_demos

    summary = make_demos(
        args.env,
        args.episodes,
        args.root,
        image_size=args.image_size,
        cameras=[camera for camera in args.cameras.split(",") if camera],
        seed=args.seed,
        workers=args.workers,
        geometry=args.geometry,
    )
    print(summary)
    return 0
