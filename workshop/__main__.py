"""`python -m workshop NAME`: make the shipped base, the scene teacher or the language VLM again."""

import argparse
import sys
from importlib import import_module

from burnish.core.errors import BurnishError

COMMANDS = {
    "pretrain": ("workshop.pretrain", "train a small VLM from scratch on scene questions"),
    "blind": ("workshop.blind", "make a base forget how a word finds its object, for auxiliary losses"),
    "build-vlm": ("workshop.build_vlm", "build a VLM around a real language model that installs as a package"),
    "package-base": ("workshop.package_base", "store a policy in half precision as a base that comes with the package"),
    "align-gradients": ("workshop.align_figures", "draw coherence and conflict of the gradients over training"),
    "align-tokens": ("workshop.align_figures", "draw what image tokens see before and after alignment"),
    "probe": ("workshop.probe", "how well a linear map reads from hidden states where the objects of a scene are"),
    "real": ("workshop.real", "write a policy of real size with random weights, for measuring"),
    "teacher": ("workshop.scene_train", "train the scene3d teacher and measure it on held-out scenes"),
    "policy-table": ("workshop.policy_table", "write the table of policies and their verbs anew"),
    "coverage": ("workshop.coverage", "simulate how often intervals of studies hold the truth"),
    "sequential": ("workshop.sequential", "simulate what looking after every trial costs, beside a fixed test"),
    "retrieval": ("workshop.retrieval", "measure retrieval on other episodes, beside pixels, chance and controls"),
    "watchdog": ("workshop.watchdog", "measure whether the distance to the training set predicts failure"),
}


def main(argv: list[str]) -> int:
    """Parse, call; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m workshop", description="How what is shipped was made.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    for name, (module, line) in COMMANDS.items():
        one = commands.add_parser(name, help=line, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv[:1]:
            import_module(module).add_arguments(one)
    args, overrides = parser.parse_known_args(argv)
    args.overrides = overrides
    if args.overrides and args.command != "pretrain":
        parser.error(f"unknown arguments: {' '.join(args.overrides)}")
    try:
        return import_module(COMMANDS[args.command][0]).main(args) or 0
    except BurnishError as error:
        print(f"workshop {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
