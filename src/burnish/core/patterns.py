"""Regular expressions that a user or a file gives, in the grammar of Python's `re`, with an end to every search.

A group that repeats inside a repetition, such as (a+)+, can take longer than the universe. `re` has no limit of time.
"""

from typing import Any

from burnish.core.errors import BurnishError

MOST_SECONDS = 0.1
"""Of processor time, for one name; an ordinary search takes microseconds."""
LONGEST = 1000
"""Characters in an expression."""


def search(pattern: str, name: str, what: str) -> Any:
    """The first match of `pattern` in `name`, None without one; `what` begins the errors.

    Raises:
        BurnishError: no regular expression, one that is too long, or one that takes too much time.
    """
    return _run("search", pattern, what, name)


def fullmatch(pattern: str, name: str, what: str) -> Any:
    """As `search`, of the whole `name`."""
    return _run("fullmatch", pattern, what, name)


def substitute(pattern: str, replacement: str, name: str, what: str) -> str:
    r"""`name` with every match replaced; `replacement` may have \1 and \g<name>. Errors as of `search`."""
    return _run("sub", pattern, what, replacement, name)


def _run(method: str, pattern: str, what: str, *given: str) -> Any:
    import regex  # transformers has it too

    if len(pattern) > LONGEST:
        raise BurnishError(f"{what}: a regular expression of {len(pattern)} characters", f"at most {LONGEST}")
    try:
        return getattr(regex.compile(pattern), method)(*given, timeout=MOST_SECONDS)
    except TimeoutError:
        raise BurnishError(f"{what}: '{pattern[:100]}' takes too long on '{given[-1][:60]}'",
                           "a pattern without repetitions inside repetitions, such as (a+)+") from None  # fmt: skip
    except (regex.error, IndexError, RecursionError, OverflowError) as error:
        raise BurnishError(f"{what}: '{pattern[:100]}' is no regular expression ({error})") from None
