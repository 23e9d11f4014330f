"""Options that come from a recipe or a command line as a mapping."""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from burnish.core.errors import BurnishError


def refuse_unknown(kind: type, given: Iterable[str], where: str, what: str = "option") -> None:
    """Raise BurnishError for a name in `given` that is no field of the dataclass `kind`; `where` begins the message."""
    known = [f.name for f in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise BurnishError(f"{where}: unknown {what} '{unknown[0]}'", f"one of {', '.join(known)}")


def number(value: Any) -> bool:
    """Whether a value, from YAML for instance, is a finite number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
