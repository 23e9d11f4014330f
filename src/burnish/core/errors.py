"""Errors that a user can fix: one clear line, shown without a stack trace by the command line."""

import re


class BurnishError(Exception):
    """Bad input. Says what was found, what was expected and, where there is one, the command that fixes it.

    Args:
        found: what is wrong, naming the file, key or value.
        expected: what would have been right.
        fix: a command or an action that fixes it.
    """

    def __init__(self, found: str, expected: str = "", fix: str = ""):
        parts = [found if len(found) <= 2000 else f"{found[:2000]}..."]  # a name in a stranger's file may be a book
        if expected:
            parts.append(f"expected {expected}")
        if fix:
            parts.append(f"try: {fix}")
        super().__init__(" ".join("; ".join(parts).splitlines()))  # so may a value in it have lines


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is lacking, as Python, torch (of CPU or GPU) and the system say it."""
    words = ("out of memory", "allocate memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def for_client(error: Exception, what: str = "this call") -> BurnishError:
    """What a server tells of an error: a BurnishError as it is, lack of memory for `what`; raises any other."""
    if isinstance(error, BurnishError):
        return error
    if out_of_memory(error):
        return BurnishError(f"not enough memory for {what}")
    raise error


def one_line(error: BaseException, most: int = 300) -> str:
    """The text of another library's error in one line of at most `most` characters; its type where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def plain(text: str) -> str:
    """One line for the terminal, without what a name in a file could make the terminal do."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", text)


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of an error's text, where the rest only repeats it; its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:most]
