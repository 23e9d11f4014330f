"""The command line: parses, calls, prints. Nothing heavy is imported before a command runs."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from burnish.core.errors import BurnishError

# command: (module holding add_arguments(parser) and main(args), one line of help)
COMMANDS = {
    "demos": ("burnish.cli.demos", "record expert demonstrations as a LeRobot data set"),
    "questions": ("burnish.cli.questions", "make scene questions with answers from simulator states"),
    "inspect": ("burnish.cli.inspect", "say what a practitioner must know about a data set"),
    "pretrain": ("workshop.pretrain", "train a small VLM from scratch on scene questions"),
    "tower": ("workshop.build_vlm_cli", "build a VLM around a real language model that installs as a package"),
    "train": ("burnish.cli.train", "fine-tune a policy as a recipe says"),
    "eval": ("burnish.cli.eval", "measure a policy in closed loop"),
    "compare": ("burnish.cli.compare", "compare two evaluations, paired on the initial states"),
    "pairs": ("burnish.cli.pairs", "make preference pairs from rollouts of a policy, or import labels"),
    "verify": ("burnish.cli.verify", "check on a policy of yours that an estimate or a shortcut says what it should"),
    "anchor": ("burnish.cli.anchor", "keep statistics of a frozen policy's hidden states, for isolate"),
    "decode": ("burnish.cli.decode", "decode a chunk of action tokens, in figures and a picture"),
    "profile": ("burnish.cli.profile", "say where the time of a policy's call goes"),
    "run": ("burnish.experiments.pipeline", "run a whole recipe: data, training, evaluation, report"),
    "study": ("burnish.experiments.study", "train and measure several arms with several seeds, as one table"),
    "align": ("burnish.cli.align", "3D teachers, their cached features, and which layers to align"),
    "ship": ("workshop.package_base", "store a policy in half precision as a base that comes with the package"),
    "capability": ("burnish.cli.weights", "extract, merge and inspect what a fine-tune has learnt"),
    "report": ("burnish.cli.report", "write the HTML page of a run"),
    "pareto": ("burnish.experiments.pareto", "plot what a study's arms can do against what they still know"),
    "results": ("burnish.experiments.results", "write the tables of README and docs from results/"),
    "bench": ("bench", "measure burnish against its peers, as JSON"),
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
