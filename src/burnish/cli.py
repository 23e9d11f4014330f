"""The command line: parses, calls, prints. Nothing heavy is imported before a command runs."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from burnish.core.errors import BurnishError

# command: (module holding add_arguments(parser) and main(args), one line of help)
COMMANDS = {
    "demos": ("burnish.data.demos_cli", "record expert demonstrations as a LeRobot data set"),
    "questions": ("burnish.data.questions_cli", "make scene questions with answers from simulator states"),
    "inspect": ("burnish.data.inspect_cli", "say what a practitioner must know about a data set"),
    "pretrain": ("burnish.train.pretrain", "train a small VLM from scratch on scene questions"),
    "tower": ("burnish.policies.tower_cli", "build a VLM around a real language model that installs as a package"),
    "train": ("burnish.train.cli", "fine-tune a policy as a recipe says"),
    "eval": ("burnish.evaluate.cli", "measure a policy in closed loop"),
    "compare": ("burnish.evaluate.compare_cli", "compare two evaluations, paired on the initial states"),
    "pairs": ("burnish.evaluate.pairs_cli", "make preference pairs from rollouts of a policy, or import labels"),
    "verify": ("burnish.verify", "check on a policy of yours that an estimate or a shortcut says what it should"),
    "anchor": ("burnish.methods.isolate.cli", "keep statistics of a frozen policy's hidden states, for isolate"),
    "decode": ("burnish.runtime.decode_cli", "decode a chunk of action tokens, in figures and a picture"),
    "profile": ("burnish.runtime.profile_cli", "say where the time of a policy's call goes"),
    "run": ("burnish.pipeline", "run a whole recipe: data, training, evaluation, report"),
    "study": ("burnish.study", "train and measure several arms with several seeds, as one table"),
    "align": ("burnish.methods.align.cli", "3D teachers, their cached features, and which layers to align"),
    "ship": ("burnish.policies.ship", "store a policy in half precision as a base that comes with the package"),
    "capability": ("burnish.methods.capability.cli", "extract, merge and inspect what a fine-tune has learnt"),
    "report": ("burnish.report.cli", "write the HTML page of a run"),
    "pareto": ("burnish.report.pareto_cli", "plot what a study's arms can do against what they still know"),
    "results": ("burnish.report.results", "write the tables of README and docs from results/"),
    "bench": ("burnish.bench", "measure burnish against its peers, as JSON"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the module of `command` is imported, so that --help stays quick."""
    parser = argparse.ArgumentParser(prog="burnish", description="Post-training for vision-language-action policies.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, help_line) in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=help_line,
            description=help_line[0].upper() + help_line[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command:
            import_module(module).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `burnish` command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv and argv[0] in COMMANDS else None
    parser = build_parser(command)
    args, unknown = parser.parse_known_args(argv)
    if unknown and command not in ("train", "run", "study", "pretrain"):
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    args.overrides = unknown
    try:
        return import_module(COMMANDS[args.command][0]).main(args) or 0
    except BurnishError as error:
        print(f"burnish {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"burnish {args.command}: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
