"""A merge operator: half of every delta."""

import numpy as np

from burnish.weights.operators import Operator


def half(block):
    for delta in block.deltas:
        np.add(block.base, 0.5 * delta, out=block.base)


HALF = Operator(half)
