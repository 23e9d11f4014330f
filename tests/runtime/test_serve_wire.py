"""Bytes from outside: whatever they are, they become plain values or one BurnishError, and nothing else happens."""

import base64
import json
import os
import pickle  # noqa: TID251 - attacks are pickles
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError

pytest.importorskip("msgpack")

from burnish.runtime.serve import pickled  # noqa: E402
from burnish.runtime.serve.openpi import read_extras  # noqa: E402
from burnish.runtime.serve.wire import pack_openpi, plain_array, unpack_openpi  # noqa: E402

FRAMES = {name: base64.b64decode(one) for name, one in
          json.loads((Path(__file__).parent / "frames_of_lerobot.json").read_text()).items()}  # fmt: skip
PICTURE = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


def quiet(read, data):
    """The value, or None where it is refused in a line."""
    try:
        return read(data)
    except BurnishError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return None


LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
LEAVES |= st.binary(max_size=16)
ARRAY = st.fixed_dictionaries({
    b"__ndarray__": st.just(True), b"data": st.binary(max_size=32) | LEAVES,
    b"dtype": st.sampled_from(["<f4", "|u1", "|O", "<f8,<f8", "<U4", ">i2", "V8", "<M8[s]", b"<f4", ""]) | LEAVES,
    b"shape": st.lists(st.integers(-2, 2**40), max_size=7) | LEAVES,
})  # fmt: skip
SCALAR = st.fixed_dictionaries({b"__npgeneric__": st.just(True), b"data": LEAVES, b"dtype": LEAVES})
KEYS = st.text(max_size=6) | st.binary(max_size=4)
VALUES = st.recursive(
    LEAVES | ARRAY | SCALAR,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data):
    quiet(unpack_openpi, data)
    quiet(pickled.read_pickle, data)
    quiet(pickled.read_pickle, b"\x80\x04" + data + b".")


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_any_structure(value):
    import msgpack

    found = quiet(unpack_openpi, msgpack.packb(value))
    quiet(read_extras, found)
    quiet(pickled.read_pickle, pickle.dumps(value, 4))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FRAMES)), st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_damaged_pickles_of_the_real_client(name, where, bits):
    data = bytearray(FRAMES[name])
    where %= len(data)
    data[where : where + len(bits)] = bits
    quiet(pickled.observation, bytes(data))
    quiet(pickled.settings, bytes(data[:where]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["u1", "i4", "f2", "f4", "f8", "b1"]), st.lists(st.integers(0, 3), max_size=4), st.booleans())
def test_arrays_come_back(kind, shape, turned):
    array = (np.arange(int(np.prod(shape))) % 2).astype(kind).reshape(shape)
    array = array.T if turned else array
    for found in (unpack_openpi(pack_openpi({"a": array}))["a"], pickled.read_pickle(pickle.dumps({"a": array}))["a"],
                  pickled.read_pickle(pickle.dumps({"a": array}, 3))["a"]):  # fmt: skip
        assert np.array_equal(found, array) and found.dtype == array.dtype and found.shape == array.shape
        assert found.flags.writeable and found.flags.owndata or found.base.flags.owndata


def test_pickles_of_the_real_client_are_read():
    wanted = pickled.settings(FRAMES["settings"])
    assert (wanted["policy_type"], wanted["actions_per_chunk"]) == ("smolvla", 5)
    assert wanted["lerobot_features"]["observation.state"]["names"] == [f"m{i}.pos" for i in range(7)]
    for protocol in (2, 3, 4, 5):
        if protocol == 2:  # bytes are a call of codecs there, which no client of today writes
            assert quiet(pickled.observation, FRAMES["observation2"]) is None
            continue
        found = pickled.observation(FRAMES[f"observation{protocol}"])
        assert (found["timestep"], found["timestamp"], found["must_go"]) == (7, 1.5, True)
        seen = found["observation"]
        assert np.array_equal(seen["top"], PICTURE) and np.array_equal(seen["turned"], PICTURE[::-1])
        assert seen["m6.pos"] == 0.75 and type(seen["m6.pos"]) is float and seen["task"] == "lift the red cube"


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def laughs():
    value: list = [0]
    for _ in range(12):
        value = [value] * 10
    return value


def itself():
    value: list = []
    value.append(value)
    return value


def doubled(begin, end):
    """Between the two a tuple of tuples, each of which holds the one before it twice."""
    return b"\x80\x04" + begin + b"()\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(200)) + b"t" + end


FROM_BUFFER, TYPE = b"cnumpy._core.numeric\n_frombuffer\n(", b"cnumpy\ndtype\nX\x02\0\0\0u1\x85R"


def same_bytes(count):
    """Arrays of the very same 10,000 bytes."""
    one = FROM_BUFFER + b"h\0" + TYPE + b"J\x10\x27\0\0\x85X\x01\0\0\0CtR"
    return b"\x80\x04B\x10\x27\0\0" + bytes(10_000) + b"q\0(" + one * count + b"t."


ATTACKS = {
    "a key that doubles": lambda: doubled(b"}", b"K\x01s."),
    "a name that doubles": lambda: doubled(b"", b"X\x01\0\0\0x\x93."),
    "a type that doubles": lambda: doubled(FROM_BUFFER + b"C\0cnumpy\ndtype\n", b"\x85R)X\x01\0\0\0CtR."),
    "a shape that doubles": lambda: doubled(FROM_BUFFER + b"C\0" + TYPE, b"X\x01\0\0\0CtR."),
    "one picture many times": lambda: same_bytes(400),
    "half a character": lambda: b"\x80\x04X\x03\0\0\0\xed\xa0\x80.",
    "half a character as a key": lambda: b"\x80\x04}X\x03\0\0\0\xed\xa0\x80K\x01s.",
    "a mark that was taken": lambda: b"\x80\x04](a](Na.",
    "os.system": lambda: pickle.dumps(Evil(os.system, ("touch owned",))),
    "in an observation": lambda: FRAMES["observation4"].replace(b"lift the red cube", b"x")[:-1],
    "eval by GLOBAL": lambda: b"cbuiltins\neval\n(S'1'\ntR.",
    "INST": lambda: b"(S'touch owned'\nios\nsystem\n.",
    "OBJ": lambda: b"(cos\nsystem\nS'touch owned'\no.",
    "by memo": lambda: b"\x80\x04cos\nsystem\n\x94h\x00\x8c\x0btouch owned\x85R.",
    "build a class": lambda: b"\x80\x04cos\nsystem\n}b.",
    "billion laughs": lambda: pickle.dumps(laughs()),
    "holds itself": lambda: pickle.dumps(itself()),
    "torch tensor": lambda: pickle.dumps({"x": torch.zeros(2)}),
    "object array": lambda: pickle.dumps({"x": np.array([Evil(os.system, ("touch owned",))], object)}),
    "extension": lambda: b"\x82\x01.",
    "persistent": lambda: b"Pfile\n.",
    "long number": lambda: pickle.dumps({"x": 10**400}),
    "truncated": lambda: pickle.dumps({"a": 1})[:-4],
    "empty": lambda: b"",
    "memo without end": lambda: b"\x80\x04h\xff.",
    "array of another size": lambda: FRAMES["observation4"].replace(b"K\x08K\x08K\x03", b"K\x08K\x09K\x03"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_pickles_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ATTACKS[name]()
    with pytest.raises(BurnishError):
        pickled.read_pickle(data)
    with pytest.raises(BurnishError):
        pickled.observation(data)
    assert not Path("owned").exists()


def test_marks_cost_no_walk_over_all_that_lies_before_them():
    start = time.process_time()
    assert pickled.read_pickle(b"\x80\x04(" + b"N" * 6000 + b"(t" * 3000 + b"t.")[-1] == []
    assert time.process_time() - start < 1


def test_a_picture_may_have_several_names():
    assert [one.shape for one in pickled.read_pickle(same_bytes(8))] == [(10_000,)] * 8


@pytest.mark.parametrize(("change", "said"), [
    ({"timestep": -1}, "control step"), ({"timestep": 2**62}, "control step"), ({"timestep": "7"}, "timestep is"),
    ({"timestamp": 1}, "timestamp is"), ({"observation": []}, "observation is"),
])  # fmt: skip
def test_records_of_another_kind(change, said, monkeypatch):
    whole = pickled.observation(FRAMES["observation4"])
    monkeypatch.setattr(pickled, "read_pickle", lambda data: {**whole, **change})
    with pytest.raises(BurnishError, match=said):
        pickled.observation(b"")
    with pytest.raises(BurnishError, match="no RemotePolicyConfig"):
        pickled.settings(b"")


def test_answers_are_what_a_client_unpickles(monkeypatch):
    """By a stand-in for LeRobot's module, which needs grpcio to be imported."""
    import sys
    from dataclasses import dataclass
    from types import ModuleType

    @dataclass
    class TimedAction:
        timestamp: float
        timestep: int
        action: torch.Tensor

    module = ModuleType(pickled.HELPERS)
    module.TimedAction = TimedAction
    monkeypatch.setitem(sys.modules, pickled.HELPERS, module)
    for parent in ("lerobot.async_inference",):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    chunk = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    found = pickle.loads(pickled.timed_actions(chunk.tolist(), 2**40, 1.5, 0.25))  # noqa: S301
    assert [one.timestep for one in found] == [2**40 + i for i in range(300)]
    assert found[2].timestamp == 2.0 and found[0].action.dtype == torch.float32 and found[0].action.device.type == "cpu"
    assert np.array_equal(torch.stack([one.action for one in found]).numpy(), chunk)


def test_an_array_is_a_copy_and_says_what_is_wrong():
    data = np.arange(4, dtype="<i2").tobytes()
    found = plain_array(data, "<i2", [2, 2], "x")
    found += 1
    assert np.frombuffer(data, "<i2")[0] == 0
    for arguments, said in (((3, "<i2", [2]), "no data"), ((data, 3, [2]), "the dtype '3'"),
                            ((data, "<i2", 4), "shape 4"), ((data, "<i2", [True, 4]), "shape"),
                            ((data, "<i2", [2**31]), "shape")):  # fmt: skip
        with pytest.raises(BurnishError, match=f"x has .*{said}"):
            plain_array(*arguments, "x")
