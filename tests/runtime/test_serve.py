"""The policy server: what it says first, whose noise an answer has, what it refuses, how it batches and how it ends."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed
from burnish.policies.base import Window

pytest.importorskip("msgpack")
pytest.importorskip("prometheus_client")
client = pytest.importorskip("websockets.sync.client")

from serve_fakes import Seen, served, watching  # noqa: E402
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus  # noqa: E402

from burnish.runtime.client import Actor, PolicyClient  # noqa: E402
from burnish.runtime.serve.record import recorded  # noqa: E402
from burnish.runtime.serve.rows import Reader, profile_keys, read_keys  # noqa: E402
from burnish.runtime.serve.run import read_token, serve_policy  # noqa: E402
from burnish.runtime.serve.server import ServeOptions  # noqa: E402
from burnish.runtime.serve.wire import pack_openpi, unpack_openpi  # noqa: E402

HERE = Path(__file__).parent
FRAMES = {name: base64.b64decode(one) for name, one in json.loads((HERE / "frames_of_openpi.json").read_text()).items()}
TOKEN = "a-token-of-some-length"


def observation(task="go", value=0.0, **more):
    picture = np.full((8, 8, 3), 51, np.uint8)
    return {"observation/image": picture, "observation/wrist_image": picture, "prompt": task,
            "observation/state": np.full(8, value, np.float32), **more}  # fmt: skip


def by_hand(seed, value, base=0.0):
    """The fake policy's answer, in numpy."""
    noise = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(seed))[0].numpy()
    return noise + base + 8 * value


@pytest.fixture(scope="module")
def libero():
    with served(Seen(), profile="libero", width=4) as one:
        yield one


def get(one, path, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{one.port}{path}", headers=headers)) as r:  # noqa: S310
            return r.status, r.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(("profile", "cameras", "state"), [
    ("libero", ("image", "wrist_image"), 8), ("droid", ("a", "b"), 8), ("aloha", ("cam_left_wrist", "cam_high"), 8),
])  # fmt: skip
def test_frames_of_the_real_client_by_profile(profile, cameras, state):
    """What openpi-client's own packer wrote, byte for byte; views by name or by order, channels first or last."""
    policy = Seen(cameras, state)
    with served(policy, profile=profile) as one, client.connect(one.address) as connection:
        about = unpack_openpi(connection.recv(timeout=20))
        assert about["action_horizon"] == 4 and about["action_dim"] == 7 and about["state_dim"] == 8
        connection.send(FRAMES[profile])
        reply = unpack_openpi(connection.recv(timeout=20))
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    expected = by_hand(derive_seed(0, "", 0), 0.0, 2 * picture.mean() / 255 + np.arange(8).sum() / 8)
    np.testing.assert_allclose(reply["actions"], expected, atol=1e-5)
    assert reply["actions"].dtype == np.float32 and set(reply["server_timing"]) == {"infer_ms", "queue_ms", "rows"}
    last = policy.calls[-1][
        "observation.images.cam_left_wrist" if profile == "aloha" else f"observation.images.{cameras[0]}"
    ]
    top = 0.0 if profile != "aloha" else picture[-1, 0, 0] / 255
    assert last[0, 0, 0, 0].item() == pytest.approx(top)


def test_replies_say_how_far_an_observation_is_from_the_training_set():
    """In openpi-client's own frames; nothing else of a reply changes."""
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for known, least, most in ((picture, 0.0, 1e-3), (255 - picture, 0.1, 2.0)):
        dog = watching(image=known, wrist_image=known[::-1])
        with served(Seen(), dog, profile="libero") as one, client.connect(one.address) as to:
            about = unpack_openpi(to.recv(timeout=20))
            to.send(FRAMES["libero"])
            reply = unpack_openpi(to.recv(timeout=20))
            gauge = next(line for line in get(one, "/metrics")[1].splitlines() if line.startswith("burnish_watchdog"))
        assert about["watchdog"]["frames"] == 1 and least <= reply["watchdog"] <= most
        assert float(gauge.split()[1]) == pytest.approx(reply["watchdog"])
        expected = by_hand(derive_seed(0, "", 0), 0.0, 2 * picture.mean() / 255 + np.arange(8).sum() / 8)
        np.testing.assert_allclose(reply["actions"], expected, atol=1e-5)
    with pytest.raises(BurnishError, match="sees wrist_image"), served(Seen(), watching(image=picture)):
        pass


def test_a_call_is_answered_by_its_own_noise(libero):
    """Of its session and number, whoever else is connected; a name goes on with its next connection."""

    def run(names, session):
        with PolicyClient(libero.address, session=session) as mine:
            others = [PolicyClient(libero.address, session=name) for name in names]
            found = []
            for _ in range(2):
                for other in others:
                    other.infer(observation("other", 1.0))
                found.append(mine.infer(observation()))
            for other in others:
                other.close()
            return found

    alone, among = run([], "one"), run(["a", "b", "c"], "two")
    for call, reply in enumerate(alone):
        np.testing.assert_allclose(reply["actions"], by_hand(derive_seed(0, "one", call), 0.0, 0.4), atol=1e-6)
        assert reply["call"] == call and reply["seed"] == derive_seed(0, "one", call)
    np.testing.assert_allclose(among[1]["actions"], by_hand(derive_seed(0, "two", 1), 0.0, 0.4), atol=1e-6)
    assert set(alone[1]["server_timing"]) == {"infer_ms", "queue_ms", "rows", "prev_total_ms"}
    with client.connect(libero.address) as connection:  # a stock client in the same session: it goes on
        connection.recv()
        connection.send(pack_openpi(observation(burnish={"session": "one"})))
        assert unpack_openpi(connection.recv())["call"] == 2
        connection.send(pack_openpi(observation(burnish={"session": "one", "reset": True, "seed": 5})))
        reply = unpack_openpi(connection.recv())
        assert (reply["call"], reply["seed"]) == (0, 5)
        np.testing.assert_allclose(reply["actions"], by_hand(5, 0.0, 0.4), atol=1e-6)
    for _ in range(2):
        with client.connect(libero.address) as connection:  # and one without a name begins at 0 each time
            connection.recv()
            connection.send(FRAMES["scalars"])
            assert unpack_openpi(connection.recv())["call"] == 0


HUGE = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f8", b"shape": [2**30, 2**30]}
HOSTILE = {
    "text": ("hello", "a text message"),
    "pickle": (b"\x80\x04\x95" + b"\x00" * 30, "no msgpack"),
    "nested": (b"\x91" * 2000 + b"\xc0", "no msgpack"),
    "wide": (pack_openpi([[[0] * 1000] * 1000] * 2), "more than 1000 maps"),
    "no map": (pack_openpi([1, 2]), "no map"),
    "object dtype": (pack_openpi(observation(x=HUGE | {b"dtype": "|O", b"shape": [1]})), "the dtype '|O'"),
    "structured dtype": (pack_openpi(observation(x=HUGE | {b"dtype": "<f8,<f8"})), "the dtype"),
    "size": (pack_openpi(observation(x=HUGE)), "has the shape"),
    "axes": (pack_openpi(observation(x=HUGE | {b"shape": [1] * 60})), "has the shape"),
    "scalar": (pack_openpi(observation(x={b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"})), "a scalar with"),
    "bytes as keys": (pack_openpi({b"a": 1}), "no map of texts"),
    "missing view": (pack_openpi({"prompt": "x"}), "without observation/image (it has prompt)"),
    "float view": (pack_openpi(observation() | {"observation/image": np.zeros((8, 8, 3))}), "is float64 [8, 8, 3]"),
    "empty view": (pack_openpi(observation() | {"observation/image": np.zeros((0, 8, 3), np.uint8)}), "[0, 8, 3]"),
    "two axes": (pack_openpi(observation() | {"observation/image": np.zeros((8, 3), np.uint8)}), "[8, 3]"),
    "state": (pack_openpi(observation() | {"observation/state": np.zeros(3)}), "a state of 3 values"),
    "state nan": (pack_openpi(observation(value=np.nan)), "8 values, not all of them finite, in"),
    "state text": (pack_openpi(observation() | {"observation/state": "x"}), "no array of numbers"),
    "task": (pack_openpi(observation() | {"prompt": 3}), "prompt is no text"),
    "long task": (pack_openpi(observation("x" * 9_999_9)), "no msgpack"),
    "unknown": (pack_openpi(observation(burnish={"path": "/"})), "no map of what it may hold"),
    "seed": (pack_openpi(observation(burnish={"seed": -1})), "of another kind"),
    "call": (pack_openpi(observation(burnish={"call": True})), "of another kind"),
    "session": (pack_openpi(observation(burnish={"session": "x" * 300})), "of another kind"),
    "deadline": (pack_openpi(observation(burnish={"deadline_ms": float("nan")})), "of another kind"),
    "prefix": (pack_openpi(observation(burnish={"prefix": np.zeros((4, 7))})), "with P from 1 to 3"),
    "prefix kind": (pack_openpi(observation(burnish={"prefix": "x"})), "no array"),
    "prefix nan": (pack_openpi(observation(burnish={"prefix": np.full((1, 7), np.inf)})), "not finite"),
    "earlier": (pack_openpi(observation(burnish={"earlier": [{}]})), "too many"),
    "the policy fails": (pack_openpi(observation("bad")), "the policy cannot act on this: no such task"),
    "not finite": (pack_openpi(observation("nan")), "not finite"),
}  # fmt: skip


def test_hostile_frames_are_refused_in_a_line_and_the_connection_goes_on(libero):
    libero.server.service.policy.broken = "bad"
    with client.connect(libero.address) as connection:
        connection.recv(timeout=20)
        for name, (frame, said) in HOSTILE.items():
            connection.send(frame)
            reply = connection.recv(timeout=20)
            assert isinstance(reply, str) and said in reply and "\n" not in reply, (name, reply)
        connection.send(FRAMES["libero"])
        assert isinstance(connection.recv(timeout=20), bytes)


def test_rows_that_share_a_batch(libero):
    """Requests that wait are answered at once; what is wrong with one is told to its owner; prefixes keep apart."""
    policy = libero.server.service.policy
    policy.broken, policy.seconds = "bad", 0.2
    found: dict[int, dict] = {}
    tasks = ["first", "go", "bad", "nan", "go", "prefix"]

    def ask(i):
        with PolicyClient(libero.address, session=f"row {i}") as one:
            time.sleep(0 if i == 0 else 0.1)
            more = {"prefix": np.full((2, 7), 9.0)} if tasks[i] == "prefix" else {}
            try:
                found[i] = one.infer(observation(tasks[i], float(i)), **more)
            except BurnishError as error:
                found[i] = str(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    before = len(policy.calls)
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    policy.seconds = 0.0
    for i in (0, 1, 4, 5):
        expected = by_hand(derive_seed(0, f"row {i}", 0), float(i), 0.4)
        expected[: 2 * (i == 5)] = 9.0
        np.testing.assert_allclose(found[i]["actions"], expected, atol=1e-5)
    assert "no such task" in found[2] and "not finite" in found[3]
    sizes = [len(batch["task"]) for batch in policy.calls[before:]]
    assert max(sizes) >= 3 and all(
        "prefix" not in one["task"] or len(one["task"]) == 1 for one in policy.calls[before:]
    )


def test_exact_calls_have_one_width():
    policy = Seen()
    with served(policy, profile="libero", width=3, exact=True) as one, PolicyClient(one.address, session="x") as mine:
        found = mine.infer(observation())["actions"]
    np.testing.assert_allclose(found, by_hand(derive_seed(0, "x", 0), 0.0, 0.4), atol=1e-6)
    assert {len(batch["task"]) for batch in policy.calls} == {4} and len(policy.calls[-1]["task"][-1]) > 1000


def test_pages_metrics_and_limits():
    with served(Seen(), profile="libero", token=TOKEN, max_mb=1, rate=20, clients=1) as one:
        assert get(one, "/healthz")[0] == get(one, "/readyz")[0] == get(one, "/health")[0] == 200
        assert get(one, "/metrics")[0] == get(one, "/stats")[0] == 401
        for header in (f"Api-Key {TOKEN}", f"Bearer {TOKEN}"):
            assert get(one, "/metrics", Authorization=header)[0] == 200
        for wrong in ("", "Api-Key", "Api-Key x", "Basic !", "Bearer \xff", f"Digest {TOKEN}", f"Api-Key {TOKEN}x"):
            assert get(one, "/stats", Authorization=wrong)[0] == 401
        for options in ({}, {"additional_headers": {"Authorization": "Api-Key x"}}):
            with pytest.raises(InvalidStatus, match="401"):
                client.connect(one.address, **options)
        with pytest.raises(BurnishError, match="wrong or missing token"):
            PolicyClient(one.address, token="x", patience=5)
        with client.connect(one.address.replace("//", f"//any:{TOKEN}@")) as connection:
            connection.recv(timeout=20)
            with pytest.raises(InvalidStatus, match="503"):
                client.connect(one.address, additional_headers={"Authorization": f"Api-Key {TOKEN}"})
            with pytest.raises(ConnectionClosedError, match="1009"):
                connection.send(b"\0" * (1 << 20 | 1))
                connection.recv(timeout=20)
        with PolicyClient(one.address, TOKEN) as mine:
            assert mine.infer(observation())["actions"].shape == (4, 7)
            with pytest.raises(BurnishError, match="too large|message too big|exceeds|over"):
                mine.infer(observation(x=np.zeros(1 << 20, np.uint8)))
            with pytest.raises(BurnishError, match="more than 20 requests a second"):
                for _ in range(40):
                    mine.infer(observation())
            assert mine.infer(observation())["actions"].shape == (4, 7)  # it has come back
        stats = json.loads(get(one, "/stats", Authorization=f"Bearer {TOKEN}")[1])
        text = get(one, "/metrics", Authorization=f"Bearer {TOKEN}")[1]
        assert stats["requests"]["ok"] >= 21 and stats["p50_ms"] > 0 and stats["rows_per_batch"] == 1
        assert f'burnish_requests_total{{outcome="ok"}} {float(stats["requests"]["ok"])}' in text
        assert "burnish_request_quantile_seconds" in text and "burnish_queue_seconds_bucket" in text


def test_without_a_token_counts_are_read_under_the_machines_own_name_alone():
    """A page of elsewhere whose name has been led to this machine asks under that name."""
    with served(Seen(), profile="libero") as one:
        for path in ("/metrics", "/stats"):
            for host in (f"localhost:{one.port}", "127.0.0.1", "[::1]:1"):
                assert get(one, path, Host=host)[0] == 200
            for host in (f"evil.example:{one.port}", "127.0.0.1.evil.example", "", f"localhost:{one.port}@x"):
                assert get(one, path, Host=host)[0] == 403
        assert get(one, "/healthz", Host="probe")[0] == 200


def test_addresses_and_options_that_are_refused(tmp_path):
    for options, said in (
        ({"host": "0.0.0.0"}, "without a token.*secrets.token_urlsafe"),  # noqa: S104
        ({"host": "::", "token": TOKEN, "lerobot_port": 0}, "LeRobot's client sends no token"),
        ({"host": "192.0.2.1", "token": TOKEN}, "cannot listen on 192.0.2.1"),
        ({"width": 65}, "width is 65"),
        ({"wait_ms": float("nan")}, "wait_ms is nan"),
        ({"profile": "x"}, "one of lerobot, libero"),
    ):
        with pytest.raises(BurnishError, match=said):
            serve_policy(Seen(), ServeOptions(**{"port": 0, **options}))
    with pytest.raises(BurnishError, match="no policy at"):
        serve_policy(tmp_path / "none", ServeOptions(port=0))
    with pytest.raises(BurnishError, match="no token at .*secrets"):
        read_token(tmp_path / "token")
    for text in ("short", "two words that are long", "é" * 20, "x" * 600):
        (tmp_path / "token").write_text(text)
        with pytest.raises(BurnishError, match="holds no token"):
            read_token(tmp_path / "token")
    (tmp_path / "token").write_text(f" {TOKEN}\n")
    assert read_token(tmp_path / "token") == TOKEN


def test_keys_by_file_and_by_order(tmp_path):
    policy, path = Seen(("top", "side"), 3), tmp_path / "keys.yaml"
    path.write_text("images: {top: cams/a, side: b}\nstate: [joints, grip]\ntask: say\n")
    picture = np.zeros((3, 8, 8), np.uint8)
    sent = {"cams": {"a": picture}, "b": picture, "joints": [1, 2.5], "grip": 4, "say": "go"}
    row = Reader(policy, read_keys(policy, path)).row(sent)
    assert row.state.tolist() == [[1, 2.5, 4]] and row.images["top"].shape == (1, 8, 8, 3) and row.task == "go"
    for text, said in (("[1]", "no map of keys"), ("x: 1", "no map of keys"), ("images: {top: a}", "maps top;"),
                       ("images: {top: 1, side: b}", "than texts"), ("state: 3", "than keys"),
                       ("state: []", "than keys")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(BurnishError, match=said):
            read_keys(policy, path)
    assert profile_keys(policy, "libero").images == {"top": "observation/image", "side": "observation/wrist_image"}
    assert profile_keys(policy, "lerobot", ["x", "y"]).images["side"] == "observation.images.y"
    with pytest.raises(BurnishError, match="which profile libero has; try: --map"):
        profile_keys(Seen(("a", "b", "c")), "libero")
    with pytest.raises(BurnishError, match="cameras x for a policy"):
        profile_keys(policy, "libero", ["x"])


def test_a_policy_that_looks_back_sees_what_the_client_says_or_the_first_again():
    policy = Seen(("top",), 1)
    policy.window = Window((-1, 0))
    picture = np.zeros((8, 8, 3), np.uint8)

    def at(value):
        return {"observation.images.top": picture, "observation.state": np.array([value]), "task": ""}

    with served(policy) as one, PolicyClient(one.address) as mine:
        assert mine.metadata["observation_steps"] == [-1, 0]
        mine.infer(at(3.0))
        assert policy.calls[-1]["observation.state"].flatten().tolist() == [3, 3]
        assert policy.calls[-1]["observation.images.top"].shape == (1, 2, 3, 8, 8)
        actor = Actor(mine, replan=2, commit=False)
        for step in range(3):
            actor.act(at(float(step)))
        actor.reset()
        assert [call["observation.state"].flatten().tolist() for call in policy.calls[-2:]] == [[0, 0], [1, 2]]


def test_slow_and_dead_clients_cost_others_nothing(libero):
    """One that reads nothing stops only itself; the request of one that leaves is not computed."""
    policy = libero.server.service.policy
    slow = client.connect(libero.address)  # takes no reply
    for _ in range(3):
        slow.send(FRAMES["libero"])
    policy.seconds = 0.3
    blocker = threading.Thread(target=lambda: PolicyClient(libero.address).infer(observation("blocker")))
    blocker.start()
    time.sleep(0.1)
    dead = client.connect(libero.address)
    dead.recv(timeout=20)
    dead.send(pack_openpi(observation("dead")))
    time.sleep(0.05)
    dead.socket.close()
    blocker.join()
    policy.seconds = 0.0
    with PolicyClient(libero.address) as mine:
        assert mine.infer(observation("after"))["actions"].shape == (4, 7)
    slow.close()
    told = [task for batch in policy.calls for task in batch["task"]]
    assert "after" in told and "dead" not in told
    assert json.loads(get(libero, "/stats")[1])["requests"]["left"] >= 1


def test_recorded_calls_come_back(tmp_path):
    options = {"profile": "libero", "record": str(tmp_path / "calls"), "record_mb": 1}
    with served(Seen(), **options) as one, PolicyClient(one.address, session="s") as mine:
        replies = [mine.infer(observation("lift", float(i)))["actions"] for i in range(3)]
    found = list(recorded(str(tmp_path / "calls")))
    with pytest.raises(BurnishError, match="no recorded calls in none; expected some; try: .* --record none"):
        list(recorded("none"))
    assert [about["call"] for _, _, about in found] == [0, 1, 2] and {row.task for row, _, _ in found} == {"lift"}
    for (row, actions, _), reply in zip(found, replies, strict=True):
        assert np.array_equal(actions, reply) and row.images["image"].shape == (1, 8, 8, 3)
    with served(Seen(), **options) as one:
        one.server.service.recorder.left = 100  # full
        with PolicyClient(one.address) as mine:
            mine.infer(observation())
        assert 'burnish_recorded_calls_total{outcome="dropped"} 1.0' in get(one, "/metrics")[1]
    assert len(list(recorded(tmp_path / "calls"))) == 3
    (tmp_path / "calls" / "call-00000009.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(BurnishError, match="call-00000009"):
        list(recorded(tmp_path / "calls"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(BurnishError, match="other"):
        serve_policy(Seen(), ServeOptions(port=0, record=str(tmp_path / "other")))


PROGRAM = """
import sys; sys.path[:0] = {path!r}
from serve_fakes import Seen
from burnish.runtime.serve.run import serve_policy
from burnish.runtime.serve.server import ServeOptions
policy = Seen(seconds=0.0)
def ready(server, port, stop):
    policy.seconds = {seconds}
    print(port, flush=True)
serve_policy(policy, ServeOptions(port={port}, profile="libero"), ready=ready)
print("stopped", flush=True)
"""


def start(port=0, seconds=0.0):
    root = HERE.parents[1]
    code = PROGRAM.format(path=[str(HERE), str(root / "src")], port=port, seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_sigterm_answers_what_runs_and_a_client_finds_the_next_server():
    process, port = start(seconds=0.5)
    mine, found = PolicyClient(f"ws://127.0.0.1:{port}", session="s"), []
    stock = client.connect(f"ws://127.0.0.1:{port}")
    stock.recv(timeout=20)
    thread = threading.Thread(target=lambda: found.append(mine.infer(observation())))
    thread.start()
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.1)
    stock.send(FRAMES["libero"])
    assert "going down" in stock.recv(timeout=20)
    thread.join(20)
    assert found[0]["call"] == 0  # answered
    with pytest.raises(ConnectionClosedOK, match="1001"):
        stock.recv(timeout=20)
    assert process.wait(20) == 0 and process.stdout.read() == "stopped\n"
    replies: list = []
    thread = threading.Thread(target=lambda: replies.append(mine.infer(observation())))
    thread.start()
    time.sleep(0.2)
    with served(Seen(), profile="libero", port=port):
        thread.join(20)
        assert replies[0]["call"] == 1 and mine.reconnects == 1
        np.testing.assert_allclose(replies[0]["actions"], by_hand(derive_seed(0, "s", 1), 0.0, 0.4), atol=1e-6)
        mine.close()
