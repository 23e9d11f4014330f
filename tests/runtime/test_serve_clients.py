"""Clients as others wrote them: openpi-client from its own environment, and LeRobot's RobotClient."""

import json
import pickle  # noqa: TID251 - LeRobot's protocol
import socket
import subprocess
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed

pytest.importorskip("msgpack")
pytest.importorskip("websockets")

from serve_fakes import Seen, served, watching  # noqa: E402

from bench.runtime_serve import OPENPI  # noqa: E402
from burnish.runtime.serve.lerobot import AsyncInference, Robot  # noqa: E402

TOKEN = "a-token-of-some-length"
PICTURE = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
needs_grpc = pytest.mark.skipif(not find_spec("grpc"), reason="needs grpcio (the extra serve-lerobot)")


def by_hand(call, base):
    seed = derive_seed(0, "", call)
    return torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(seed))[0].numpy() + base


@pytest.mark.skipif(not Path(OPENPI).exists(), reason=f"no {OPENPI}, a Python with openpi-client: scripts/setup.sh")
def test_openpi_client():
    with served(Seen(), watching(image=PICTURE, wrist_image=PICTURE), profile="libero", token=TOKEN) as one:
        command = [OPENPI, str(Path(__file__).with_name("openpi_client_check.py")), str(one.port)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found, base = json.loads(ran.stdout), 2 * PICTURE.mean() / 255 + np.arange(8).sum() / 8
    assert found["metadata"]["action_horizon"] == 4 and found["metadata"]["policy"] == "seen"
    np.testing.assert_allclose(found["actions"], by_hand(0, base), atol=1e-5)
    assert found["dtype"] == "float32" and found["timing"] == ["infer_ms", "queue_ms", "rows"]
    assert "without observation/image (it has prompt)" in found["error"] and found["again"] == [4, 7]
    expected = [*by_hand(2, base), by_hand(3, base)[0]]  # the refused one has no number
    np.testing.assert_allclose(found["broker"], expected, atol=1e-5)


class Arm:
    """LeRobot's robot interface over nothing: its state is the number of actions that it has executed."""

    def __init__(self):
        self.sent = []
        self.names = [f"m{i}.pos" for i in range(7)]
        self.observation_features = {**dict.fromkeys(self.names, float), "top": (8, 8, 3)}
        self.action_features = dict.fromkeys(self.names, float)

    def connect(self): ...
    def disconnect(self): ...

    def get_observation(self):
        return {**dict.fromkeys(self.names, 0.0), "top": PICTURE}

    def send_action(self, action):
        self.sent.append([action[name] for name in self.names])
        return action


@pytest.fixture
def robot(tmp_path, monkeypatch):
    """LeRobot's own RobotClient for an arm; its logs go where the test runs."""
    monkeypatch.chdir(tmp_path)
    from lerobot.async_inference import robot_client
    from lerobot.robots.so_follower import SO100FollowerConfig

    arm = Arm()
    monkeypatch.setattr(robot_client, "make_robot_from_config", lambda config: arm)

    def make(port, **changes):
        options = {"policy_type": "seen", "pretrained_name_or_path": "served", "actions_per_chunk": 50, "fps": 50,
                   "server_address": f"127.0.0.1:{port}", "task": "go", "aggregate_fn_name": "latest_only"}  # fmt: skip
        config = robot_client.RobotClientConfig(robot=SO100FollowerConfig(port="x"), **{**options, **changes})
        return robot_client.RobotClient(config), arm

    return make


@needs_grpc
def test_robot_client(robot):
    """The arm executes rows of the served chunks in their order, each labelled with its control step."""
    policy = Seen(("top",), 7)
    with served(policy, watching(top=255 - PICTURE), lerobot_port=0) as one:
        port = one.server.lerobot_port
        client, arm = robot(port)
        assert client.start()
        threads = [threading.Thread(target=client.receive_actions, daemon=True),
                   threading.Thread(target=client.control_loop, args=("go",), daemon=True)]  # fmt: skip
        [thread.start() for thread in threads]
        end = time.monotonic() + 20
        while len(arm.sent) < 25 and time.monotonic() < end:
            time.sleep(0.05)
        client.shutdown_event.set()
        [thread.join(5) for thread in threads]
        assert json.loads(one.server.metrics.stats(0))["requests"]["refused"] == 0
        assert one.server.metrics.distance._value.get() > 0.1  # what a watchdog sees does not disturb the client
        client.channel.close()
        for changes, said in (({"policy_type": "act"}, "--policy_type=seen"),
                              ({"pretrained_name_or_path": "other"}, "--pretrained_name_or_path=served")):  # fmt: skip
            stranger, _ = robot(port, **changes)
            heard = []
            stranger.logger = SimpleNamespace(error=heard.append, info=print, debug=print)
            assert not stranger.start() and said in heard[0]
            stranger.channel.close()
    assert len(arm.sent) >= 25 and client.latest_action >= 15
    chunks = [by_hand(call, PICTURE.mean() / 255) for call in range(len(policy.calls))]
    known = np.concatenate(chunks)
    assert all(np.abs(known - sent).max(1).min() < 1e-5 for sent in arm.sent)
    assert policy.calls[-1]["task"] == ["go"] and policy.calls[-1]["observation.state"].shape == (1, 7)


@needs_grpc
def test_calls_of_the_protocol(robot):
    """Labels, clipping to the chunk, observations of a policy that looks back, and what is refused."""
    import grpc
    from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
    from lerobot.transport import services_pb2 as messages
    from lerobot.transport.services_pb2_grpc import AsyncInferenceStub
    from lerobot.transport.utils import send_bytes_in_chunks

    from burnish.policies.base import Window

    policy = Seen(("top",), 7)
    policy.window = Window((-2, 0))
    names = [f"m{i}.pos" for i in range(7)]
    features = {"observation.state": {"dtype": "float32", "shape": (7,), "names": names},
                "observation.images.front": {"dtype": "image", "shape": (8, 8, 3), "names": None}}  # fmt: skip
    renamed = {"observation.images.front": "observation.images.top"}
    wanted = RemotePolicyConfig("seen", "served", features, 3, "cpu", renamed)
    with served(policy, lerobot_port=0, max_mb=1) as one:
        with grpc.insecure_channel(f"127.0.0.1:{one.server.lerobot_port}") as channel:
            stub = AsyncInferenceStub(channel)

            def send(step, value=0.0, data=None, **more):
                raw = {**dict.fromkeys(names, value), "front": PICTURE, "task": "go", **more}
                timed = data or pickle.dumps(TimedObservation(timestamp=float(step), timestep=step, observation=raw))
                return stub.SendObservations(send_bytes_in_chunks(timed, messages.Observation))

            def refused(call, said):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert said in caught.value.details() and "\n" not in caught.value.details()

            refused(lambda: send(0), "has not said Ready")
            stub.Ready(messages.Empty())
            refused(lambda: send(0), "before SendPolicyInstructions")
            refused(lambda: stub.SendPolicyInstructions(messages.PolicySetup(data=b"cos\nsystem\n.")), "a pickle that")
            stub.SendPolicyInstructions(messages.PolicySetup(data=pickle.dumps(wanted)))
            for step in range(5):
                send(step, float(step))
            data = stub.GetActions(messages.Empty()).data
            assert policy.calls[-1]["observation.state"][0, :, 0].tolist() == [2, 4]
            found = pickle.loads(data)  # noqa: S301
            assert [one.timestep for one in found] == [4, 5, 6] and found[1].timestamp == pytest.approx(4 + 1 / 30)
            assert found[0].action.shape == (7,) and stub.GetActions(messages.Empty()).data == b""
            refused(lambda: send(0, data=b"\x80\x04cos\nsystem\n."), "a pickle that is no observation")
            refused(lambda: send(0, data=b"\0" * (2 << 20)), "an observation of")
            send(5, front=np.zeros((8, 8), np.uint8))
            refused(lambda: stub.GetActions(messages.Empty()), "is uint8 [8, 8]")
            send(6, **{"m3.pos": "x"})
            refused(lambda: stub.GetActions(messages.Empty()), "an observation without m3.pos")
        with grpc.insecure_channel(f"127.0.0.1:{one.server.lerobot_port}") as channel:  # the connection broke
            stub = AsyncInferenceStub(channel)
            send(7, 7.0)
            assert pickle.loads(stub.GetActions(messages.Empty()).data)[0].timestep == 7  # noqa: S301


@needs_grpc
def test_an_end_waits_for_the_answer_of_a_robot():
    import grpc
    from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
    from lerobot.transport import services_pb2 as messages
    from lerobot.transport.services_pb2_grpc import AsyncInferenceStub
    from lerobot.transport.utils import send_bytes_in_chunks

    policy, features = Seen(("top",), 0), {"observation.images.top": {"dtype": "image", "shape": (8, 8, 3)}}
    wanted = RemotePolicyConfig("seen", "served", features, 3, "cpu", {"observation.images.top": [1]})
    with (
        served(policy, lerobot_port=0) as one,
        grpc.insecure_channel(f"127.0.0.1:{one.server.lerobot_port}") as channel,
    ):
        stub, policy.seconds = AsyncInferenceStub(channel), 0.3
        stub.Ready(messages.Empty())
        stub.SendPolicyInstructions(messages.PolicySetup(data=pickle.dumps(wanted)))
        timed = TimedObservation(timestamp=0.0, timestep=7, observation={"top": PICTURE, "task": "go"})
        stub.SendObservations(send_bytes_in_chunks(pickle.dumps(timed), messages.Observation))
        answer = stub.GetActions.future(messages.Empty())
        while not one.server.answering:
            time.sleep(0.01)
        one.stop()
        assert pickle.loads(answer.result(20).data)[0].timestep == 7  # noqa: S301


@needs_grpc
def test_robots_come_by_ipv6_too():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    with served(Seen(("top",), 0), host="::1", lerobot_port=0) as one:
        assert one.server.lerobot_port > 0


def test_a_robot_that_waits_for_its_actions_is_not_taken_over():
    """Only one whose connection broke: what a stranger sees would move another's arm."""
    server = SimpleNamespace(stopping=False, guests=0, counted=lambda: None)
    service = AsyncInference(server)
    service.robots = {"ipv4:127.0.0.1:1": Robot(waiting=1)}
    stranger = SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:2")
    with pytest.raises(BurnishError, match="has not said Ready"):
        service._robot(stranger)
    service.robots["ipv4:127.0.0.1:1"].waiting = 0
    assert service._robot(stranger) is service.robots["ipv4:127.0.0.1:2"] and len(service.robots) == 1


@pytest.mark.skipif(bool(find_spec("grpc")), reason="grpcio is installed")
def test_robots_need_grpcio():
    with pytest.raises(BurnishError, match=r"grpcio .*serve-lerobot"), served(Seen(), lerobot_port=0):
        pass
