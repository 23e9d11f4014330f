"""A delta that is never stored: tuned minus base, computed while it is merged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.weights.extract import open_parent
from burnish.weights.names import choose, embodiment
from burnish.weights.rounding import Narrow, difference
from burnish.weights.sources import Stored


class Difference:
    """Stands in for a Delta in `merge`; nothing was recorded about it, so no hash of the base is asked for."""

    def __init__(
        self, base: Stored, tuned: Path | str, heads: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ):
        parent = open_parent(tuned, base, ())
        self.path, self.base, self.tuned = parent.path, base, parent.source
        slots = {"base": base.slots, "tuned": self.tuned.slots}
        self.known = set(base.slots) | set(self.tuned.slots)
        chosen = choose(slots, include, exclude, heads).chosen
        self.tensors: dict[str, dict[str, Any]] = {
            name: {"dtype": self.tuned.slots[name][0], "shape": list(self.tuned.slots[name][1]), "group": group,
                   "form": "live"}
            for name, group in chosen.items()
        }  # fmt: skip
        self.meta: dict[str, Any] = {
            "tied": {}, "base": {"tensors": {}, "path": str(base.checkpoint.path)},
            "embodiment": embodiment(self.path) or embodiment(base.checkpoint.path),
        }  # fmt: skip

    def raw(self, name: str, start: int, stop: int) -> np.ndarray:
        """Stored bits of the tuned model (not of the difference)."""
        return self.tuned.raw(name, start, stop)

    def fill(self, name: str, start: int, stop: int, out: np.ndarray, scratch: Narrow) -> np.ndarray:
        """Put elements start:stop of the difference into float64 `out`."""
        return self.fill_from(
            self.base.fill(name, start, stop, np.empty(stop - start), scratch), name, start, out, scratch
        )

    def fill_from(self, base: np.ndarray, name: str, start: int, out: np.ndarray, scratch: Narrow) -> np.ndarray:
        """As `fill`, where the base's elements (float64) are at hand."""
        self.tuned.fill(name, start, start + base.size, out, scratch)
        return difference(out, base, out)

    def release(self, name: str, start: int, stop: int) -> None:
        self.tuned.release(name, start, stop)
