"""Progress bars: drawn anew at a terminal, a line every ten seconds in a log."""

import sys
from collections.abc import Iterable
from typing import Any


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr, which appears after two seconds.

    Args:
        iterable: what to go through; None for a bar that is moved by `update`.
        shown: False draws nothing.
        **options: of tqdm (total, initial, desc, unit, leave, ...).
    """
    from tqdm import tqdm

    options = {"disable": not shown, "delay": 2, "file": sys.stderr} | options
    if not sys.stderr.isatty():
        options |= {"file": _Log(sys.stderr), "mininterval": 10, "maxinterval": 20, "ncols": 100, "ascii": " #"}
    return tqdm(iterable, **options)


class _Log:
    """A text stream where every state of the bar is a line of its own."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.replace("\r", "").strip()
        if line:
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()
