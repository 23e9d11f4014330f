"""The bridge to vla-eval: its client's own frames are answered as it expects; hostile ones are refused in a line.

frames_of_vla_eval.json holds what the client of vla-eval sends in an episode, byte for byte: hello, episode_start,
three observations (a picture as PNG, a state in float64), episode_end.
"""

import base64
import json
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.seeding import generator
from burnish.core.types import Chunk, Draws
from burnish.policies.base import Policy, Window

msgpack = pytest.importorskip("msgpack")
client = pytest.importorskip("websockets.sync.client")

from burnish.runtime.serve.run import serve_benchmark  # noqa: E402
from burnish.runtime.serve.server import ServeOptions  # noqa: E402
from burnish.runtime.serve.vla_eval import VlaEval, pack_array, read_array, read_message  # noqa: E402

FRAMES = [base64.b64decode(one) for one in json.loads((Path(__file__).parent / "frames_of_vla_eval.json").read_text())]


class Mean(Policy):
    """Acts on the mean of what it sees, its state and its noise."""

    cameras, chunk_size, n_action_steps, action_dim, state_dim = ("image",), 4, 2, 7, 8
    view_sizes = {"image": (8, 8)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.batches = []

    def act(self, batch, draws=None, prefix=None):
        self.batches.append(batch)
        seen = batch["observation.images.image"].mean() + batch["observation.state"].sum()
        return Chunk((seen + draws.noise).detach())

    def draw(self, batch_size, generator):
        return Draws(torch.randn(batch_size, 4, 7, generator=generator), torch.ones(batch_size))

    def loss(self, batch, draws=None): ...
    def save(self, folder, *, home=None): ...


def message(kind, payload, number=1, **changes):
    content = {"type": kind, "payload": payload, "seq": number, "timestamp": 0.0} | changes
    return msgpack.packb(content, default=pack_array)


def unpack(frame):
    return msgpack.unpackb(frame)


def observation(**changes):
    plain = {"images": {"agentview": np.full((8, 8, 3), 51, np.uint8)}, "states": np.zeros(8), "task_description": "go"}
    return message("observation", plain | changes)


@pytest.fixture
def session():
    return VlaEval(Mean()).session()


@pytest.fixture
def address():
    """Of a server in a thread of its own."""
    ready, known = threading.Event(), []
    options = ServeOptions(port=0, keepalive=False, max_mb=1, clients=1)
    thread = threading.Thread(
        target=serve_benchmark, args=(Mean(), options),
        kwargs={"ready": lambda *found: (known.extend(found), ready.set())},
    )  # fmt: skip
    thread.start()
    assert ready.wait(20)
    yield f"127.0.0.1:{known[1]}"
    known[2]()
    thread.join(20)
    assert not thread.is_alive()


def test_an_episode_of_the_real_client(address):
    with client.connect(f"ws://{address}") as connection:
        replies = []
        for frame in FRAMES:
            connection.send(frame)
            if unpack(frame)["type"] in ("hello", "observation"):
                replies.append(unpack(connection.recv(timeout=20)))
    sent = [unpack(frame) for frame in FRAMES]
    hello, *actions = replies
    assert (hello["type"], hello["seq"]) == ("hello", sent[0]["seq"]) and hello["payload"]["protocol_version"] == 1
    assert hello["payload"]["observation_params"] == {"send_state": True}
    seen = [one for one in sent if one["type"] == "observation"]
    assert [one["seq"] for one in actions] == [one["seq"] for one in seen]
    assert {one["type"] for one in actions} == {"action"}
    found = [read_array(one["payload"]["actions"], "the action") for one in actions]
    assert all(action.shape == (7,) and action.dtype == np.float32 for action in found)
    # by hand: two actions of a chunk, then the next chunk, on the noise of this task and episode
    (task,) = [one["payload"]["task"] for one in sent if one["type"] == "episode_start"]
    episode = json.dumps({k: v for k, v in task.items() if isinstance(v, str | int)}, sort_keys=True)
    for step, action in enumerate(found):
        source = seen[0 if step < 2 else 2]["payload"]
        picture = read_array(source["images"]["agentview"], "").astype(np.float64)
        assert picture.shape == (16, 16, 3)
        noise = torch.randn(1, 4, 7, generator=generator(0, episode, step // 2))[0, step % 2].numpy()
        expected = picture.mean() / 255 + np.frombuffer(source["states"]["data"]).sum() + noise
        np.testing.assert_allclose(action, expected, atol=2e-3)  # the view is resized


def test_nobody_waits_for_what_a_first_call_builds():
    model, seen = Mean(), []
    serve_benchmark(model, ServeOptions(port=0), ready=lambda *found: (seen.append(len(model.batches)), found[2]()))
    assert seen == [1] and model.batches[0]["observation.images.image"].max() == 0


def test_noise_follows_the_episode_and_not_its_neighbours(session):
    def first(episode):
        session.answer(message("episode_start", {"task": {"name": "a", "episode_idx": episode}}))
        return read_array(unpack(session.answer(observation()))["payload"]["actions"], "")

    one, two, again = first(1), first(2), first(1)
    assert np.array_equal(one, again) and not np.array_equal(one, two)
    session.answer(message("episode_end", {"success": True}))


def test_views_and_cameras(session):
    model = Mean()
    named = VlaEval(model, ["wrist"], n_action_steps=1).session()
    named.answer(
        observation(images={"agentview": np.zeros((8, 8, 3), np.uint8), "wrist": np.full((4, 8, 3), 255, np.uint8)})
    )
    view = model.batches[0]["observation.images.image"]
    assert view.shape == (1, 3, 8, 8) and view.dtype == torch.float32 and float(view.min()) == 1
    for images, said in (({}, "views none without image"), ({"a": None, "b": None}, "views a, b without image")):
        assert said in unpack(session.answer(observation(images=images)))["payload"]["error"]
    model.window = Window((-1, 0))
    with pytest.raises(BurnishError, match="sees earlier observations too"):
        VlaEval(model)
    del model.window
    for arguments, said in (((["a", "b"],), "cameras a, b for a policy that sees image"), (((), 5), "5 action steps")):
        with pytest.raises(BurnishError, match=said):
            VlaEval(model, *arguments)


DEEP = b"\x91" * 2000 + b"\xc0"
WIDE = msgpack.packb([[[0] * 1000] * 1000] * 2)
HUGE = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f8", "shape": [2**30, 2**30]}


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ("text", "a text message"),
        (b"", "no msgpack"),
        (b"\xc1", "no msgpack"),
        (b"\x80\x80", "no msgpack"),
        (DEEP, "no msgpack"),
        (WIDE, "more than 1000 maps and lists"),
        (b"\xdf\xff\xff\xff\xff", "no msgpack"),
        (b"\xc7\x01\x05a", "no msgpack"),
        (b"\xa2\xff\xfe", "no msgpack"),
        (msgpack.packb([1]), "lacks type, payload or seq"),
        (message("action", {}), "a message of type 'action'"),
        (message(["x"], {}), "a message of type"),
        (message("hello", [1]), "payload is no map"),
        (message("hello", {}, seq="1"), "seq is no number"),
        (message("hello", {"protocol_version": 2}), "protocol 2; expected protocol 1"),
        (observation(task_description=3), "task_description is no text"),
        (observation(images=[1]), "views none"),
        (observation(images={b"a": 1, b"b": 2}), "views b'a'"),
        (observation(images={"a": [1, 2]}), "the view a is float64 [2]"),
        (observation(images={"a": np.zeros((8, 8, 4), np.uint8)}), "the view a is uint8 [8, 8, 4]"),
        (observation(images={"a": np.zeros((0, 8, 3), np.uint8)}), "the view a is uint8 [0, 8, 3]"),
        (observation(images={"a": {"__image__": True, "format": "png", "data": b"\x89PNG\r\n\x1a\n"}}), "the view a: "),
        (observation(images={"a": {"__image__": True, "format": "gif", "data": b""}}), "the dtype 'None'"),
        (observation(images={"a": {"__ndarray__": True, "data": "x"}}), "has no data"),
        (observation(states=HUGE), "has the shape"),
        (observation(states=HUGE | {"shape": [-1]}), "has the shape"),
        (observation(states=HUGE | {"shape": [1] * 60}), "has the shape"),
        (observation(states=HUGE | {"dtype": "O", "shape": [1]}), "has the dtype 'O'"),
        (observation(states=HUGE | {"dtype": "V8", "shape": [1]}), "has the dtype 'V8'"),
        (observation(states=HUGE | {"dtype": "i8,i8", "shape": [1]}), "has the dtype"),
        (observation(states=HUGE | {"dtype": "<f1"}), "has the dtype '<f1'"),
        (observation(states=HUGE | {"data": b"", "shape": [0, *[2**31 - 1] * 4]}), "has the shape"),
        (observation(states=[1, 2]), "a state of 2 values in payload/states; expected 8 finite numbers"),
        (observation(states=[float("nan")] * 8), "expected 8 finite numbers"),
        (observation(states=None), "the state is missing"),
    ],
)
def test_bad_frames_are_answered_in_one_line_and_the_session_goes_on(session, frame, said):
    reply = unpack(session.answer(frame))
    assert reply["type"] == "error" and said in reply["payload"]["error"] and "\n" not in reply["payload"]["error"]
    assert unpack(session.answer(observation()))["type"] == "action"


def lacking(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_task_of_other_keys_and_a_policy_that_fails_end_no_session(session, monkeypatch):
    assert session.answer(message("episode_start", {"task": {b"x": 1, "y": 2, "episode_idx": 3}})) is None
    assert session.episode == '{"episode_idx": 3, "y": 2}'
    with monkeypatch.context() as patched:
        patched.setattr(Mean, "act", lambda *args: torch.zeros(2) + torch.zeros(3))
        reply = unpack(session.answer(observation()))
        patched.setattr(Mean, "act", lacking)
        full = unpack(session.answer(observation()))
    assert reply["type"] == "error" and "cannot act on this" in reply["payload"]["error"]
    assert full["payload"]["error"] == "not enough memory for this call"
    assert unpack(session.answer(observation()))["type"] == "action"


def test_a_picture_of_absurd_size_is_never_unpacked(session):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (5000, 5000)).save(file, "PNG")
    bomb = {"__image__": True, "format": "png", "data": file.getvalue(), "shape": [5000, 5000, 3]}
    assert (
        "5000x5000 pixels; expected at most 4096"
        in unpack(session.answer(observation(images={"a": bomb})))["payload"]["error"]
    )


def admitted(address):
    """A connection, once the server has seen that the one before it is gone."""
    from websockets.exceptions import InvalidStatus

    for _ in range(100):
        try:
            return client.connect(f"ws://{address}")
        except InvalidStatus:
            time.sleep(0.1)
    raise AssertionError("the place of a client that went is not free after ten seconds")


def test_the_server_keeps_strangers_out(address):
    from websockets.exceptions import ConnectionClosedError, InvalidStatus

    with urllib.request.urlopen(f"http://{address}/health") as reply:  # noqa: S310
        assert reply.status == 200 and json.load(reply) == {"status": "ok"}
    with pytest.raises(InvalidStatus, match="403"):  # a page in a browser of this machine
        client.connect(f"ws://{address}", origin="http://evil.example").close()
    with client.connect(f"ws://{address}") as connection, pytest.raises(ConnectionClosedError, match="1009"):
        connection.send(b"\0" * (2**20 + 1))
        connection.recv(timeout=20)
    with admitted(address), pytest.raises(InvalidStatus, match="503"):
        client.connect(f"ws://{address}").close()
    with pytest.raises(BurnishError, match=f"cannot listen on {address} .*--port 0"):
        serve_benchmark(Mean(), ServeOptions(port=int(address.split(":")[1])))


def test_read_message_takes_what_the_client_sends():
    assert [read_message(frame)["type"] for frame in FRAMES][:2] == ["hello", "episode_start"]
