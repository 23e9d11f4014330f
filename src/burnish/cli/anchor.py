"""`burnish anchor`: statistics of a frozen policy's hidden states, for the objective `isolate`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  burnish anchor build small --questions data/questions -o anchor.safetensors"
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser(
        "build", help="build an anchor from a question folder", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a policy's backbone over questions and keep mean and variance of every layer's states.",
        epilog="example:\n  burnish anchor build small --questions data/questions -o anchor.safetensors",
    )  # fmt: skip
    build.add_argument("policy", help="policy folder or name of a shipped base: the one that training starts from")
    build.add_argument("--questions", required=True, help="question folder, see burnish questions")
    build.add_argument("-o", "--output", default="anchor.safetensors", help="file to write")
    build.add_argument("--samples", type=int, default=3000, help="questions to run; 0 means all")
    build.add_argument("--batch-size", type=int, default=64)
    build.add_argument("--tokens", choices=("apart", "pooled"), default="apart", help="image and text tokens")
    build.add_argument("--answers", action="store_true", help="count the tokens of answers too")
    build.add_argument("--covariance", action="store_true", help="keep full covariances, for distance=bures")
    build.add_argument("--device", default="", help="torch device; default: a GPU where there is one")


def main(args: argparse.Namespace) -> int:
    from pathlib import Path

    from burnish.core.errors import BurnishError
    from burnish.core.provenance import weights_hash
    from burnish.methods.isolate.anchor import Provenance, build, question_batches
    from burnish.policies import load_policy
    from burnish.policies.load import choose_device
    from burnish.policies.vqa import PROMPT

    if args.samples < 0 or args.batch_size < 1:
        raise BurnishError(f"--samples={args.samples}, --batch-size={args.batch_size}", "at least 0 and 1")
    device = choose_device(args.device)
    policy = load_policy(args.policy)
    base_hash = weights_hash(policy)  # before the cast: a run takes it from the weights as they are stored
    policy = policy.float().to(device)
    about = Provenance(
        base_hash, policy.num_layers, 0, "questions", Path(args.questions).name, 0, template=PROMPT,
        answers=args.answers, tokens=args.tokens, covariance=args.covariance,
    )  # fmt: skip
    samples = args.samples or 1 << 40
    size = min(args.batch_size, samples)
    anchor = build(policy, question_batches(Path(args.questions), samples, size, 0, device, progress=True), about)
    anchor.save(Path(args.output))
    groups = sorted({group for _, group in anchor.moments})
    print(f"{args.output}: {anchor.about.layers} layers of {anchor.about.width} channels, "
          f"{anchor.about.samples} questions, tokens {' and '.join(groups)}, base {base_hash}")  # fmt: skip
    return 0
