"""Arrays and messages in msgpack, read with bounds: nothing but maps, lists, numbers, texts and plain arrays is made.

openpi writes an array as {b"__ndarray__": True, b"data", b"dtype", b"shape"} and a numpy scalar as {b"__npgeneric__",
b"data", b"dtype"}; vla-eval has the same keys as texts. Arrays are copies, never views of a frame.
"""

import math
import re
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError, one_line

MOST_PARTS, MOST_ENTRIES, MOST_TEXT = 1000, 1024, 10_000
"""Maps and lists in a message, entries of each, characters of a text."""
MOST_AXES = 5
OVER = 4001
"""Close code of a try that is over (`burnish trial`): such a connection is not sought again."""
LATE = "the deadline has passed"
"""How the refusal of a request begins that nobody wants an answer to any more."""
_DTYPE = re.compile(r"[<|=]?([iu][1248]|f[248]|b1)")


def msgpack() -> Any:
    """The package; raises BurnishError where it is missing."""
    try:
        import msgpack
    except ImportError:
        raise BurnishError("a server without msgpack", "the package", "pip install 'burnish[serve]'") from None
    return msgpack


def plain_array(data: Any, dtype: Any, shape: Any, what: str, order: str = "C") -> np.ndarray:
    """The array of `shape` in `data`; raises BurnishError, which names it `what`, where bytes and shape differ."""
    if isinstance(dtype, bytes):
        dtype = dtype.decode("ascii", "replace")
    if not isinstance(data, bytes):
        raise BurnishError(f"{what} has no data", "bytes")
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise BurnishError(f"{what} has the dtype {str(dtype)[:20]!r}", "integers, floats or flags, little-endian")
    kind = np.dtype(dtype)
    listed = isinstance(shape, list | tuple) and len(shape) <= MOST_AXES
    whole = listed and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    if not whole or math.prod(max(n, 1) for n in shape) >= 2**48:  # empty, and yet beyond what numpy can address
        raise BurnishError(f"{what} has the shape {str(shape)[:60]}", f"at most {MOST_AXES} whole numbers")
    if math.prod(shape) * kind.itemsize != len(data):
        raise BurnishError(f"{what} has the shape {str(shape)[:60]} and {len(data)} bytes", "as many as the shape says")
    return np.frombuffer(data, kind).reshape(shape, order=order).copy()  # type: ignore[call-overload]


def unpack(frame: bytes | str, hook: Any = None) -> Any:
    """The value in a frame of msgpack; `hook` makes something else of a map. Raises BurnishError for anything else."""
    parts = 0

    def counted(part: Any) -> Any:
        nonlocal parts
        parts += 1
        if parts > MOST_PARTS:  # a byte of input can become a list of 56
            raise ValueError(f"more than {MOST_PARTS} maps and lists")
        return hook(part) if hook and isinstance(part, dict) else part

    if isinstance(frame, str):
        raise BurnishError("a text message", "a binary one, in msgpack")
    package = msgpack()
    bounds = {"max_str_len": MOST_TEXT, "max_array_len": MOST_ENTRIES, "max_map_len": MOST_ENTRIES, "max_ext_len": 0}
    try:
        return package.unpackb(frame, object_hook=counted, list_hook=counted, **bounds)
    except (ValueError, TypeError, OverflowError, package.UnpackException) as error:
        raise BurnishError(f"a message that is no msgpack ({one_line(error, 100)})", "a small map") from None


def pack_openpi(value: Any) -> bytes:
    """msgpack as openpi-client reads it."""
    return msgpack().packb(value, default=_as_openpi)


def unpack_openpi(frame: bytes | str) -> Any:
    """What openpi-client packed; raises BurnishError for anything that it would not."""
    return unpack(frame, _from_openpi)


def _as_openpi(value: Any) -> dict[bytes, Any]:
    array = np.asarray(value)
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": array.dtype.str}
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def _from_openpi(part: dict[Any, Any]) -> Any:
    if b"__ndarray__" in part:
        return plain_array(part.get(b"data"), part.get(b"dtype"), part.get(b"shape"), "an array")
    if b"__npgeneric__" in part:
        value = part.get(b"data")
        if not isinstance(value, bool | int | float):
            raise BurnishError(f"a scalar with a {type(value).__name__} in it", "a number")
        return value
    return part
