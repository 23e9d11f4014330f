"""`burnish questions`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  burnish questions --env tabletop --scenes 2000 --root data/questions --seed 2000000"
    parser.add_argument("--env", required=True, help="environment id; 'tabletop' takes turns over its families")
    parser.add_argument("--scenes", type=int, default=1000, help="number of images")
    parser.add_argument("--root", required=True, help="folder to write")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--camera", default="", help="default: the environment's first camera")
    parser.add_argument("--per-scene", type=int, default=0, help="questions kept for each image; 0 keeps all")
    parser.add_argument("--seed", type=int, default=0, help="first initial state")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 means one for each core")


def main(args: argparse.Namespace) -> int:
    from burnish.data.questions import make_questions, open_questions

    root = make_questions(
        args.env,
        args.scenes,
        args.root,
        image_size=args.image_size,
        camera=args.camera,
        per_scene=args.per_scene,
        seed=args.seed,
        workers=args.workers,
    )
    questions = open_questions(root)
    print(f"{len(questions.entries)} questions about {len(questions.images)} images in {root}")
    return 0
