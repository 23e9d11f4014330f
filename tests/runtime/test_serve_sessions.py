"""Sessions of a policy server by name, its tokens in errors, and the folder that it records into."""

import fcntl

import numpy as np
import pytest

from burnish.core.errors import BurnishError
from burnish.core.outputs import MARK

pytest.importorskip("msgpack")
pytest.importorskip("prometheus_client")
client = pytest.importorskip("websockets.sync.client")

from serve_fakes import Seen, served  # noqa: E402

from burnish.policies import load_policy  # noqa: E402
from burnish.runtime.client import PolicyClient  # noqa: E402
from burnish.runtime.serve.metrics import Metrics  # noqa: E402
from burnish.runtime.serve.record import Recorder  # noqa: E402
from burnish.runtime.serve.wire import pack_openpi, unpack_openpi  # noqa: E402

TOKEN = "a-token-of-some-length"


def observation(**more):
    return {"observation.images.top": np.zeros((8, 8, 3), np.uint8), **more}


@pytest.fixture(scope="module")
def server():
    with served(Seen(("top",), 0)) as one:
        yield one


def test_a_session_goes_on_however_long_its_open_connection_rests(server, monkeypatch):
    from burnish.runtime.serve import openpi

    monkeypatch.setattr(openpi, "KEPT_SECONDS", 0.0)
    for calls in ([0, 1], [0]):
        with client.connect(server.address) as connection:
            connection.recv(timeout=20)
            for call in calls:
                connection.send(pack_openpi(observation(burnish={"session": "rests"})))
                assert unpack_openpi(connection.recv(timeout=20))["call"] == call


def test_a_client_that_begins_again_counts_from_there(server):
    with PolicyClient(server.address, session="again") as mine:
        found = [mine.infer(observation(), **more)["call"] for more in ({}, {}, {"reset": True}, {})]
        with pytest.raises(BurnishError, match="without observation.images.top"):
            mine.infer({}, reset=True)
        found.append(mine.infer(observation())["call"])
    assert found == [0, 1, 0, 1, 0]


def test_a_robot_is_not_led_by_another_policy_than_it_planned_with():
    """Chunks of another length or width are refused where a server comes back with them; other weights are not."""
    with served(Seen(("top",), 0)) as one:
        mine = PolicyClient(one.address, session="planned", patience=20)
        before = mine.infer(observation())["actions"]
    with served(Seen(("top",), 0), port=one.port):
        assert np.array_equal(mine.infer(observation(), call=0)["actions"], before) and mine.reconnects == 1
    shorter = Seen(("top",), 0)
    shorter.chunk_size = 3
    with served(shorter, port=one.port), pytest.raises(BurnishError, match="another policy .action_horizon changed"):
        mine.infer(observation())
    mine.close()


def test_robots_that_share_a_connection_go_on_from_chunks_of_their_own(tiny_smolvla):
    """Both have a chunk 0: that of the other robot is none to go on from."""
    policy = load_policy(tiny_smolvla)
    seen = {f"observation.images.{name}": np.zeros((*policy.view_sizes[name], 3), np.uint8) for name in policy.cameras}
    seen |= {"observation.state": np.zeros(policy.state_dim), "task": "go"}
    later = {"session": "one", "call": 1, "chunk": 0, "executed": 2, "delay": 2}
    with served(policy, async_mode="inpaint", width=1) as one, PolicyClient(one.address) as mine:
        plain = mine.infer(seen, session="one", call=1)["actions"]
        chunk = mine.infer(seen, session="one", call=0)["actions"]
        assert np.array_equal(mine.infer(seen, **later)["actions"][:2], chunk[2:4])
        mine.infer(seen, session="one", call=0)
        mine.infer(seen, session="two", call=0)
        assert np.array_equal(mine.infer(seen, **later)["actions"], plain)


def test_errors_show_no_token_of_an_address():
    with pytest.raises(BurnishError, match="127.0.0.1:1") as caught:
        PolicyClient(f"ws://any:{TOKEN}@127.0.0.1:1", patience=0.05)
    assert TOKEN not in str(caught.value)


def test_two_servers_do_not_record_into_one_folder(tmp_path):
    recorder = Recorder(tmp_path / "calls", 1, Metrics())
    recorder.close()
    (tmp_path / "calls").mkdir(exist_ok=True)
    with open(tmp_path / "calls" / MARK, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BurnishError, match="another process is writing"):
            Recorder(tmp_path / "calls", 1, Metrics())
