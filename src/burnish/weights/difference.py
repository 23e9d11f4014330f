"""An on-the-fly difference: tuned minus base, computed while it is merged and never stored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.weights.adapters import open_source
from burnish.weights.names import Heads, choose, embodiment
from burnish.weights.rounding import difference
from burnish.weights.sources import Checkpoint
from burnish.weights.tensorfile import Digests


class Difference:
    """Stands in for a Delta in `merge`; nothing was recorded about it, so no digest of the base is asked for.

    Args:
        base: the base of the merge.
        tuned: checkpoint or adapter.
        heads, include, exclude: as for `merge`.
    """

    def __init__(
        self, base: Checkpoint, tuned: Path | str, heads: Heads, include: Sequence[str], exclude: Sequence[str]
    ):
        self.base, self.tuned = base, open_source(tuned, base)
        self.path = self.tuned.path
        chosen = choose({"base": base.tensors, "tuned": self.tuned.tensors}, include, exclude, heads).chosen
        self.tensors: dict[str, dict[str, Any]] = {
            name: {"dtype": self.tuned.tensors[name].dtype, "shape": list(self.tuned.tensors[name].shape),
                   "group": group} for name, group in chosen.items()
        }  # fmt: skip
        self.meta: dict[str, Any] = {"tied": {}, "embodiment": embodiment(self.path) or embodiment(base.path)}

    def values(
        self, name: str, start: int, stop: int, out: np.ndarray, digests: Digests | None = None,
        base: np.ndarray | None = None, quick: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """As `Checkpoint.values`. Digests are the tuned model's.

        Args:
            base: the base's elements where they are at hand.
            quick: see `rounding.difference`.
        """
        if base is None:
            base = self.base.values(name, start, stop, np.empty(stop - start))
        return difference(self.tuned.values(name, start, stop, out, digests), base, out, quick)
