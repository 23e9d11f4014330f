"""`burnish report`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, help="folder that `burnish run` or `burnish train` wrote")
    parser.add_argument("--out", type=Path, help="where the page goes (default: RUN_FOLDER/report.html)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="also draw film strips and success rates")
    parser.epilog = (
        "The page is one file with everything inside; it shows what the folder holds.\n\n"
        "example:\n  burnish report runs/tabletop/quickstart"
    )


def main(args: argparse.Namespace) -> int:
    from burnish.report.page import write_report

    print(write_report(args.run_folder, args.out))
    if args.picture:
        from burnish.report.picture import write_picture

        print(write_picture(args.run_folder, args.picture))
    return 0
