"""A merge operator: half of every delta."""

from burnish.weights.operators import operator


@operator("sample_half")
def half(block):
    return block.base + sum(0.5 * delta for delta in block.deltas)
