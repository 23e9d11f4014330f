"""What LeRobot's asynchronous client pickles, read as data: nothing is imported, looked up or called.

`read` walks the opcodes of a pickle (pickletools.genops); a name becomes an inert `Name` and a call an inert `Call`.
`plain` then makes numbers, texts, plain arrays and the two records that such a client sends, and refuses the rest.
`timed_actions` writes what the client unpickles: its own record, and `torch.tensor` of a list.
"""

import pickletools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from burnish.core.errors import BurnishError, one_line
from burnish.runtime.serve.wire import plain_array

MOST_OPCODES, DEEPEST, MOST_COPIES = 20_000, 12, 16
"""An observation has a few hundred opcodes. A picture may stand in it under several names; in all, arrays may have so
many times its bytes."""
HELPERS = "lerobot.async_inference.helpers"
RECORDS = ("TimedObservation", "RemotePolicyConfig")
_MULTIARRAY = ("numpy._core.multiarray", "numpy.core.multiarray")
_PUSH = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
         "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_MARK = object()


@dataclass(frozen=True)
class Name:
    """Of a class or a function; never looked up."""

    module: Any
    name: Any


@dataclass
class Call:
    """Of a class or a function; never made."""

    what: Any
    arguments: Any
    state: Any = None


def read_pickle(data: bytes) -> Any:
    """Plain values in a pickle; a record is a dict with its name under "record".

    Raises:
        BurnishError: it is damaged, too large, or holds anything that LeRobot's client does not send.
    """
    try:
        return plain(_walk(data), [MOST_OPCODES, MOST_COPIES * len(data)])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, struct.error) as error:
        found = f"a pickle that is no observation and no settings of LeRobot's client ({one_line(error, 80)})"
        raise BurnishError(found, "numbers, texts and plain arrays") from None


def _walk(data: bytes) -> Any:
    """The value at the end of a pickle, with inert names and calls."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    marks: list[int] = []

    def since_mark() -> list[Any]:
        start = marks.pop()
        if stack[start] is not _MARK:
            raise ValueError("a mark that has gone")
        part = stack[start + 1 :]
        del stack[start:]
        return part

    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name: Any = opcode.name
        if count > MOST_OPCODES:
            raise ValueError(f"more than {MOST_OPCODES} steps")
        if name == "STOP":
            return stack.pop()
        if name in _PUSH:
            stack.append(bytes(argument) if name == "BYTEARRAY8" else argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
            stack.append(_MARK)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("APPEND", "APPENDS"):
            part = [stack.pop()] if name == "APPEND" else since_mark()
            _kind(stack[-1], list).extend(part)
        elif name in ("SETITEM", "SETITEMS"):
            part = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
            keys = [_kind(key, str) for key in part[::2]]  # the hash of a tuple that holds another twice doubles
            _kind(stack[-1], dict).update(zip(keys, part[1::2], strict=True))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(Name(*argument.split(" ", 1)))
        elif name in ("STACK_GLOBAL", "REDUCE", "NEWOBJ"):
            second, first = stack.pop(), stack.pop()
            named = name == "STACK_GLOBAL"
            stack.append(Name(_kind(first, str), _kind(second, str)) if named else Call(first, second))
        elif name == "BUILD":
            state = stack.pop()
            _kind(stack[-1], Call).state = state
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the step {name}")  # INST, OBJ, EXT, PERSID and the like: no client sends them
    raise ValueError("no end")


def _kind[T](value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} was meant")
    return value


def plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """Numbers, texts, arrays, lists, dicts and records; whatever is shared counts each time that it is met.

    `budget`: values that may still be met, and bytes of arrays.
    """
    budget[0] -= 1
    if budget[0] < 0 or depth > DEEPEST:
        raise ValueError("too much, or too deep")
    if isinstance(value, str):
        value.encode()  # half a character, which a pickle can hold and no message
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        if abs(value) >= 2**63:
            raise ValueError("a number of more than 63 bits")
        return value
    if isinstance(value, list | tuple):
        return [plain(one, budget, depth + 1) for one in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a key that is no text")
        "".join(value).encode()
        return {key: plain(one, budget, depth + 1) for key, one in value.items()}
    if isinstance(value, Call) and isinstance(value.what, Name):
        return _called(value, value.what, budget, depth)
    raise ValueError(f"a {value.module}.{value.name}" if isinstance(value, Name) else f"a {type(value).__name__}")


def _called(call: Call, what: Name, budget: list[int], depth: int) -> Any:
    """What the few calls stand for that a client's pickle has: its two records, numpy's arrays and numbers."""
    if what.module == HELPERS and what.name in RECORDS and call.arguments == () and isinstance(call.state, dict):
        return {**plain(call.state, budget, depth + 1), "record": what.name}
    if what.module in _MULTIARRAY and what.name == "_reconstruct" and call.arguments[0] == Name("numpy", "ndarray"):
        _, shape, kind, fortran, data = call.state
        return _array(data, kind, plain(shape, budget, depth + 1), fortran, budget)
    if what == Name("numpy._core.numeric", "_frombuffer"):
        data, kind, shape, order = call.arguments
        return _array(data, kind, plain(shape, budget, depth + 1), order == "F", budget)
    if what.module in _MULTIARRAY and what.name == "scalar":
        return plain_array(call.arguments[1], _dtype(call.arguments[0]), (), "a number").item()
    raise ValueError(f"a call of {what.module}.{what.name}")


def _array(data: Any, kind: Any, shape: Any, fortran: Any, budget: list[int]) -> Any:
    budget[1] -= len(data)
    if budget[1] < 0:
        raise ValueError("the same bytes in too many arrays")
    return plain_array(data, _dtype(kind), shape, "an array", "F" if fortran else "C")


def _dtype(call: Any) -> str:
    if not isinstance(call, Call) or call.what != Name("numpy", "dtype"):
        raise ValueError("a type of numbers that is none")
    order, kind = call.state[1] if call.state else "<", _kind(call.arguments[0], str)
    return kind if order == "|" else f"{'<' if order in '<=' else order}{kind}"


def timed_actions(actions: Sequence[Sequence[float]], step: int, timestamp: float, period: float) -> bytes:
    """The pickle of LeRobot's list[TimedAction] for a chunk [T, A] whose row 0 belongs to control step `step`.

    Row i is labelled step + i and timestamp + i * period. Written opcode by opcode: nothing of LeRobot is imported.
    """
    parts = [b"\x80\x04]("]
    for i, row in enumerate(actions):
        tensor = b"ctorch\ntensor\n](" + b"".join(_float(value) for value in row) + b"e\x85R"
        number = b"\x8a\x08" + struct.pack("<q", step + i)
        fields = [("timestamp", _float(timestamp + i * period)), ("timestep", number), ("action", tensor)]
        state = b"".join(_text(name) + value for name, value in fields)
        parts.append(f"c{HELPERS}\nTimedAction\n".encode() + b")\x81}(" + state + b"ub")
    return b"".join([*parts, b"e."])


def _float(value: float) -> bytes:
    return b"G" + struct.pack(">d", float(value))


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def settings(data: bytes) -> dict[str, Any]:
    """The client's RemotePolicyConfig; raises BurnishError for anything else."""
    return _record(data, "RemotePolicyConfig", {"policy_type": str, "pretrained_name_or_path": str,
                                                "lerobot_features": dict, "actions_per_chunk": int})  # fmt: skip


def observation(data: bytes) -> dict[str, Any]:
    """The client's TimedObservation; raises BurnishError for anything else."""
    found = _record(data, "TimedObservation", {"timestamp": float, "timestep": int, "observation": dict})
    if not 0 <= found["timestep"] < 2**62:
        raise BurnishError(f"control step {found['timestep']}", "a number from 0")
    return found


def _record(data: bytes, name: str, kinds: dict[str, type]) -> dict[str, Any]:
    found = read_pickle(data)
    if not isinstance(found, dict) or found.get("record") != name:
        raise BurnishError(f"a pickle that is no {name}", "what LeRobot's RobotClient sends")
    wrong = [key for key, kind in kinds.items() if type(found.get(key)) is not kind]
    if wrong:
        raise BurnishError(f"a {name} whose {wrong[0]} is missing or of another kind", "what LeRobot's client sends")
    return found
