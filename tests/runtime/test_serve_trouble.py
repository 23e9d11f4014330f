"""What goes wrong while a server runs costs one client an answer; what cannot work at all is refused at the start."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from burnish.core.config import CacheConfig
from burnish.core.errors import BurnishError
from burnish.core.provenance import weights_hash
from burnish.core.types import Chunk
from burnish.policies import load_policy

pytest.importorskip("msgpack")
pytest.importorskip("prometheus_client")
pytest.importorskip("websockets")

from serve_fakes import Seen, served  # noqa: E402

from burnish.runtime.caches import Reuse  # noqa: E402
from burnish.runtime.client import PolicyClient  # noqa: E402
from burnish.runtime.serve import lerobot  # noqa: E402
from burnish.runtime.serve.batcher import Batcher, _Request  # noqa: E402
from burnish.runtime.serve.metrics import Metrics  # noqa: E402
from burnish.runtime.serve.openpi import Extras, OpenPi  # noqa: E402
from burnish.runtime.serve.record import Recorder  # noqa: E402
from burnish.runtime.serve.rows import Reader, Row, profile_keys  # noqa: E402
from burnish.runtime.serve.server import InThread, ServeOptions, Server  # noqa: E402
from burnish.runtime.serve.wire import pack_openpi  # noqa: E402

HERE, TOKEN = Path(__file__).parent, "a-token-of-some-length"
LACKING = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class Small(Seen):
    """Rows of which it can hold so many at once, and which may be acted on when they are old."""

    capabilities = frozenset({"prefix", "runtime"})
    most = 1

    def act(self, batch, draws=None, prefix=None):
        if len(batch["task"]) > self.most:
            raise LACKING
        actions = super().act(batch, draws, prefix).actions
        return Chunk(actions, actions)


def asked(task, value=0, key=None):
    picture = np.full((1, 8, 8, 3), value, np.uint8)
    row = Row({"image": picture, "wrist_image": picture}, np.zeros((1, 8), np.float32), task)
    return _Request(row, 0, None, None, key, 1e9, None)


def test_rows_that_do_not_fit_together_are_answered_alone_and_one_that_does_not_fit_is_told_so():
    batcher = Batcher(Small(), None, Metrics())
    found = batcher._answers([asked("a"), asked("b")])
    assert [one.actions.shape for one in found] == [(4, 7)] * 2
    batcher.policy.most = 0
    assert [str(one) for one in batcher._answers([asked("a")] * 2)] == ["not enough memory for this call"] * 2
    batcher.policy.act = lambda *_: torch.zeros(())[3]
    assert "cannot act on this" in str(batcher._answers([asked("a")])[0])


def test_a_comparison_without_memory_ends_no_server(caplog):
    batcher = Batcher(Small(), None, Metrics())

    def lacks():
        raise LACKING

    batcher._after = lacks
    batcher._compare()
    assert "not enough memory for a comparison of old pictures" in caplog.text


def test_a_comparison_counts_for_the_robot_that_was_compared(tmp_path):
    """Also where the call of another one, made alone after both failed, never came to its end."""
    policy = Small()
    policy.most = 2
    measured = {"spread": 100.0, "binary": [], "module": weights_hash(policy)}
    (tmp_path / "runtime.json").write_text(json.dumps(measured))
    reuse = Reuse(CacheConfig("images", 9, measured=str(tmp_path / "runtime.json")), policy)
    batcher = Batcher(policy, None, Metrics(), reuse=reuse)
    batcher._answers([asked("a", key="a"), asked("b", key="b")])
    policy.broken = "b"
    one, other = batcher._answers([asked("a", 9, "a"), asked("b", 9, "b")])
    assert one.actions.shape == (4, 7) and "no such task" in str(other)
    batcher._compare()
    assert [len(reuse._anchors[key].errors) for key in "ab"] == [1, 0]


@pytest.mark.parametrize(("mode", "change", "said"), [
    ("guided", {"sampler": "heun:3"}, "heun"), ("inpaint", {"sampler": "midpoint:2"}, "midpoint"),
    ("trained", {}, "trained for 0"), ("guided", {"relative": True}, "relative to the state"),
])  # fmt: skip
def test_a_mode_that_cannot_work_is_refused_at_the_start(tiny_smolvla, mode, change, said, monkeypatch):
    policy = load_policy(tiny_smolvla)
    policy.config.use_relative_actions = change.pop("relative", False)
    with pytest.raises(BurnishError, match=said), served(policy, async_mode=mode, width=1, **change):
        pass


def test_more_delay_than_was_trained_is_answered(tiny_smolvla):
    policy = load_policy(tiny_smolvla)
    policy.rtc_training_max_delay = 2
    service = OpenPi(Batcher(policy, None, Metrics(), mode="trained"), profile_keys(policy, "lerobot"), mode="trained")
    last = torch.zeros(6, 7)
    assert [service._old(Extras(delay=delay), last).delay for delay in (1, 2, 5)] == [1, 2, 2]


def test_a_sampler_is_for_a_policy_that_has_one_and_for_as_long_as_the_server_runs(tiny_smolvla):
    with pytest.raises(BurnishError, match="sampler ab2:3"), served(Seen(), sampler="ab2:3"):
        pass
    policy = load_policy(tiny_smolvla)
    with served(policy, sampler="ab2:3", width=1):
        assert policy.sampler == "ab2:3"
    assert policy.sampler == ""


def test_a_client_that_leaves_as_its_answer_comes_is_counted():
    from websockets.exceptions import ConnectionClosedOK

    class Leaving:
        async def send(self, frame):
            raise ConnectionClosedOK(None, None)

        async def __aiter__(self):
            yield b"a frame"

    async def talk():
        server = Server(ServeOptions(), None)
        server.service = InThread(server, lambda: SimpleNamespace(answer=lambda frame: frame), None)
        server.warm.set()
        with pytest.raises(ConnectionClosedOK):
            await server._talk(Leaving(), asyncio.get_running_loop().create_future())
        return json.loads(server.metrics.stats(0))["requests"], server.answering

    assert asyncio.run(talk()) == ({"ok": 0, "refused": 0, "busy": 0, "left": 1}, 0)


def test_a_robot_that_leaves_as_it_is_answered_is_counted_and_one_that_only_waits_is_not():
    pytest.importorskip("grpc")
    server = Server(ServeOptions(), None)
    service, robot = lerobot.AsyncInference(server), lerobot.Robot()
    service.robots["peer"] = robot
    service._answer = lambda *_: asyncio.sleep(60)

    async def leaves():
        call = asyncio.ensure_future(service.GetActions(None, SimpleNamespace(peer=lambda: "peer")))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        return json.loads(server.metrics.stats(0))["requests"]["left"], server.answering

    assert asyncio.run(leaves()) == (0, 0)
    robot.fresh = asyncio.Event()
    robot.fresh.set()
    assert asyncio.run(leaves()) == (1, 0)


@pytest.mark.parametrize("address", [
    f"ws://{TOKEN}@127.0.0.1", "ws://127.0.0.1:80a0", "ws://127.0.0.1:99999", f"{TOKEN}@127.0.0.1", "http://127.0.0.1",
])  # fmt: skip
def test_an_address_that_is_none_is_told_at_once_and_without_its_token(address):
    with pytest.raises(BurnishError, match="the address .*127.0.0.1.*ws://HOST:PORT") as caught:
        PolicyClient(address, patience=60)
    assert TOKEN not in str(caught.value) and caught.value.__cause__ is None


def test_a_call_that_ends_each_connection_is_given_up_when_patience_is(monkeypatch):
    """It was sent again for ever, as fast as the server could hang up."""
    from websockets.exceptions import ConnectionClosedError
    from websockets.sync import client

    sent = []

    def send(frame):
        sent.append(frame)
        if len(sent) > 50:
            raise AssertionError("for ever")
        raise ConnectionClosedError(None, None)

    monkeypatch.setattr(client, "connect", lambda *_, **__: SimpleNamespace(
        recv=lambda timeout: pack_openpi({}), send=send, close=lambda: None))  # fmt: skip
    with pytest.raises(BurnishError, match="has not answered for 0.5 s"):
        PolicyClient(patience=0.5).infer({"task": "go"})
    assert 2 <= len(sent) <= 5


def test_a_client_that_waits_for_a_server_says_so(caplog):
    with pytest.raises(BurnishError, match="no policy server at ws://127.0.0.1:9"):
        PolicyClient("ws://127.0.0.1:9", patience=2.5)
    assert caplog.text.count("no policy server at ws://127.0.0.1:9 yet") == 1 and "waiting" in caplog.text


def test_a_policy_that_is_told_nothing_is_warned_about_once(caplog):
    """As where a client sends another key for the instruction: nothing else would say so."""
    policy = Seen(("top",), state_dim=0)
    reader = Reader(policy, profile_keys(policy, "lerobot"))
    for _ in range(2):
        reader.row({"observation.images.top": np.zeros((8, 8, 3), np.uint8), "prompt": "lift"})
    assert caplog.text.count("no instruction in task: the policy is told none (it has observation.images.top") == 1


def test_a_server_says_that_it_loads(caplog):
    with caplog.at_level("INFO", "burnish"), served(Seen()):
        assert "loading the policy" in caplog.text


def test_a_server_without_a_greeting_is_hung_up_on(monkeypatch):
    from websockets.sync import client

    for greeting in (b"\xc1", TimeoutError("none came")):
        ended = []

        def recv(timeout, said=greeting):
            if isinstance(said, Exception):
                raise said
            return said

        monkeypatch.setattr(client, "connect",
                            lambda *_, ended=ended, recv=recv, **__: SimpleNamespace(  # noqa: PIE800
                                recv=recv, close=lambda: ended.append(1)))  # fmt: skip
        with pytest.raises(BurnishError):
            PolicyClient(patience=0.0)
        assert ended == [1]


def test_a_robot_that_has_left_is_counted_no_more(monkeypatch):
    monkeypatch.setattr(lerobot, "FORGOTTEN", 0.0)
    counts = []
    server = SimpleNamespace(guests=2, counted=lambda: counts.append(server.guests))
    service = lerobot.AsyncInference(server)
    service.robots = {"gone": lerobot.Robot(), "waits": lerobot.Robot(waiting=1)}

    async def run():
        task = asyncio.ensure_future(service.forget())
        while not counts:
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(run())
    assert list(service.robots) == ["waits"] and counts[0] == 1


def test_a_disk_that_fails_counts_calls_as_failed(tmp_path, monkeypatch, caplog):
    from safetensors import SafetensorError, numpy

    def fails(*_):
        raise SafetensorError("I/O error: Input/output error (os error 5)")

    monkeypatch.setattr(numpy, "save_file", fails)
    metrics = Metrics()
    recorder = Recorder(tmp_path / "calls", 1, metrics)
    recorder.put(asked("a").row, np.zeros((4, 7), np.float32), {})
    recorder.close()
    assert 'burnish_recorded_calls_total{outcome="failed"} 1.0' in metrics.text()
    assert "os error 5" in caplog.text and not list((tmp_path / "calls").glob("call-*"))


PROGRAM = """
import os, signal, threading
from burnish.runtime.serve.server import ServeOptions, serve
def make(server):
    os.kill(os.getpid(), signal.{name})
    while not server._stop.is_set():
        pass
    os.kill(os.getpid(), signal.{name})
    threading.Event().wait()
serve(make, ServeOptions(port=0))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_a_server_that_is_still_loading(name):
    code = PROGRAM.format(name=name)
    ran = subprocess.run([sys.executable, "-c", code], timeout=40, check=False)
    assert ran.returncode in (-2, -15)
