"""`python -m bench NAME --json [--output FILE]`: measure burnish against its peers."""

import argparse
import sys

from bench import add_arguments, main
from burnish.core.errors import BurnishError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="One JSON object of figures, measured against peers side by side.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    try:
        sys.exit(main(parser.parse_args()))
    except BurnishError as error:
        sys.exit(f"bench: {error}")
