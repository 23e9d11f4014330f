"""Stored bits to float64 and back, rounded exactly once (to nearest, ties to even)."""

import numpy as np

from burnish.methods.capability.tensorfile import BLOCK

_TIE = np.uint32(0x8000)
_LOW = np.uint32(0xFFFF)


class Narrow:
    """Scratch space of one thread for conversions of blocks of at most BLOCK elements."""

    def __init__(self):
        self._single = np.empty(BLOCK, np.float32)
        self._spare = np.empty(BLOCK, np.uint32)

    def widen(self, raw: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
        """Fill `out` (float64) with the values of stored bits `raw` [n <= BLOCK]; exact."""
        if dtype == "BF16":
            bits = self._single[: raw.size].view(np.uint32)
            bits[:] = raw
            np.left_shift(bits, 16, out=bits)
            out[:] = self._single[: raw.size]
        else:
            out[:] = raw
        return out

    def narrow(self, value: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
        """Fill `out` (stored bits) with float64 `value` [n <= BLOCK], rounded once.

        Going through float32 would round a bfloat16 twice. That differs only where the float32 lies exactly
        between two bfloat16, so those few are looked at again.
        """
        if dtype != "BF16":
            with np.errstate(over="ignore"):
                out[:] = value  # numpy rounds float64 to float16 and float32 in one step
            return out
        single = self._single[: value.size]
        bits, low = single.view(np.uint32), self._spare[: value.size]
        with np.errstate(over="ignore", invalid="ignore"):
            single[:] = value
            largest = single.max(initial=0.0)
        np.add(bits, _TIE, out=bits)  # rounds halves away from zero; they are mended below
        np.bitwise_and(bits, _LOW, out=low)
        ties = np.flatnonzero(low == 0) if value.size and not low.min() else ()
        np.right_shift(bits, 16, out=bits)
        np.copyto(out, bits, casting="unsafe")
        if len(ties):
            _mend_ties(value, out, ties)
        if np.isnan(largest):
            out[np.isnan(value)] = 0x7FC0
        return out


def _mend_ties(value: np.ndarray, out: np.ndarray, ties: np.ndarray) -> None:
    """Down where the float64 lies below the midpoint, or on it with an even lower neighbour."""
    upper = out[ties]
    lower = upper - np.uint16(1)
    middle = ((lower.astype(np.uint32) << 16) | _TIE).view(np.float32).astype(np.float64)
    exact, middle = np.abs(value[ties]), np.abs(middle)
    down = (exact < middle) | ((exact == middle) & (lower & 1 == 0))
    out[ties] = np.where(down, lower, upper)


def dot(a: np.ndarray, b: np.ndarray) -> float:
    """Inner product of two blocks. Not `a @ b`: there the BLAS would start threads of its own in each of ours."""
    return float(np.einsum("i,i->", a, b))


def widened(raw: np.ndarray, dtype: str) -> np.ndarray:
    """All of `raw` as float64 (for tensors that fit in memory)."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.astype(np.float64)


def narrowed(value: np.ndarray, dtype: str) -> np.ndarray:
    """All of float64 `value` as stored bits of `dtype`, rounded once; written apart from `Narrow` to check it.

    Works on the bits of the float64: a bfloat16 keeps 7 of its 52 fraction bits, so 45 are rounded off.
    """
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return value.astype({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])
    bits = np.ascontiguousarray(value, np.float64).view(np.uint64)
    even = (bits >> np.uint64(45)) & np.uint64(1)
    rounded = (bits + even + np.uint64((1 << 44) - 1)) >> np.uint64(45) << np.uint64(45)
    with np.errstate(over="ignore", invalid="ignore"):
        single = rounded.view(np.float64).astype(np.float32)
    found = (single.view(np.uint32) >> 16).astype(np.uint16)
    # Below the smallest normal number fewer bits are kept; there a scaled integer is rounded instead.
    tiny = np.abs(value) < 2.0**-126
    steps = np.rint(np.abs(value[tiny]) * 2.0**133).astype(np.uint16)
    found[tiny] = steps | (np.signbit(value[tiny]).astype(np.uint16) << 15)
    found[np.isnan(value)] = 0x7FC0
    return found
