"""The policy server under load: its overhead, what batching gains over a blocking loop, 10,000 calls of 16 clients.

`python -m bench.runtime_serve [--quick]` runs this part of `python -m bench runtime` alone. The policy is a stand-in
that sleeps ms + per_row * rows, so that only the server is measured; it runs in a process of its own, the clients here.
The peer is a loop that infers inside the event loop, as openpi's server does, on the same wire and the same stand-in.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SIDE = 224
OPENPI = os.environ.get("BURNISH_OPENPI_PYTHON") or str(Path(sys.prefix, "openpi", "bin", "python"))
"""A Python that has openpi-client, which wants an older numpy than burnish; set-up makes one inside .venv."""


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures, detail); clients that are not installed are "n/a".

    `serve_echo_...` is the same exchange with a bare websockets server that does not look at what it gets: what the
    wire, the client and the machine take of `serve_overhead_...`.
    """
    calls = 300 if args.quick else 3000
    alone, echo = load(1, calls, 0, 0), load(1, calls, 0, 0, "--echo")
    batched = load(8, calls // 60, 40, 4)
    one = load(8, calls // 120, 40, 4, "--width", "1")
    blocking = load(8, calls // 120, 40, 4, "--blocking")
    many = load(16, 20 if args.quick else 625, 2, 0.25, "--width", "16")
    refused, hostile = hostile_frames()
    figures = {
        "serve_overhead_p50_ms": alone["p50_ms"], "serve_overhead_p99_ms": alone["p99_ms"],
        "serve_echo_p50_ms": echo["p50_ms"], "serve_echo_p99_ms": echo["p99_ms"],
        "serve_batched_over_blocking": batched["per_second"] / blocking["per_second"],
        "serve_batched_over_one": batched["per_second"] / one["per_second"],
        "serve_errors": many["errors"], "serve_memory_growth": many["memory_growth"],
        "hostile_refused": refused, "openpi_client": openpi_client(), "lerobot_client": lerobot_client(),
    }  # fmt: skip
    detail = {"alone": alone, "echo": echo, "batched": batched, "width_1": one, "blocking": blocking, "many": many,
              "hostile": hostile, "request_bytes": len(request())}  # fmt: skip
    return figures, detail


def observation() -> dict[str, Any]:
    picture = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    return {"observation/image": picture, "observation/wrist_image": picture, "prompt": "lift the red cube",
            "observation/state": np.zeros(8, np.float32)}  # fmt: skip


def request() -> bytes:
    from burnish.runtime.serve.wire import pack_openpi

    return pack_openpi(observation())


@contextlib.contextmanager
def server(*options: Any):
    """(process, [port, LeRobot's port]) of the stand-in's server."""
    command = [sys.executable, "-m", "bench.runtime_serve", "--serve", *map(str, options)]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def load(clients: int, calls: int, ms: float, per_row: float, *options: Any) -> dict[str, Any]:
    """Latency, requests a second, errors and growth of memory of `clients` that ask `calls` times each."""
    from burnish.runtime.client import PolicyClient

    sent, took, errors = observation(), [], []
    gate = threading.Barrier(clients + 1)

    def ask(port: int) -> None:
        with PolicyClient(f"ws://127.0.0.1:{port}") as one:
            for i in range(calls + 2):
                if i == 2:  # the first two are warm-up
                    gate.wait()
                start = time.perf_counter()
                try:
                    one.infer(sent)
                except Exception as error:  # noqa: BLE001 - counted, whatever it is
                    errors.append(repr(error))
                if i >= 2:
                    took.append(time.perf_counter() - start)

    with server("--ms", ms, "--per-row", per_row, *options) as (process, ports):
        threads = [threading.Thread(target=ask, args=(ports[0],)) for _ in range(clients)]
        [thread.start() for thread in threads]
        gate.wait()
        start, before = time.perf_counter(), memory(process.pid)
        while len(took) < 0.2 * clients * calls:
            time.sleep(0.02)
        settled = memory(process.pid)  # after a fifth, when the buffers of all clients are there
        [thread.join() for thread in threads]
        wall, after = time.perf_counter() - start, memory(process.pid)
    quantiles = np.quantile(took, [0.5, 0.95, 0.99]) * 1000
    return {
        "clients": clients, "calls": clients * calls, "p50_ms": quantiles[0], "p95_ms": quantiles[1],
        "p99_ms": quantiles[2], "per_second": clients * calls / wall, "errors": len(errors), "first_errors": errors[:3],
        "rss_mb": [before, settled, after], "memory_growth": after / settled - 1,
    }  # fmt: skip


def memory(pid: int) -> float:
    """MiB that a process holds."""
    (line,) = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def hostile_frames() -> tuple[float, dict[str, str]]:
    """The share of hostile frames and pickles that are refused in a line, and what was said."""
    from websockets.sync.client import connect

    from burnish.core.errors import BurnishError
    from burnish.runtime.serve.pickled import read_pickle
    from burnish.runtime.serve.wire import pack_openpi, unpack_openpi

    array = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f8", b"shape": [2**30, 2**30]}
    frames = {
        "object": pack_openpi({"x": array | {b"dtype": "|O", b"shape": [1]}}), "size": pack_openpi({"x": array}),
        "structured": pack_openpi({"x": array | {b"dtype": "<f8,<f8"}}), "no map": pack_openpi([1]), "empty": b"",
        "nested": b"\x91" * 5000 + b"\xc0", "wide": pack_openpi([[[0] * 1000] * 1000] * 2), "text": "x",
        "announced": b"\xdf\xff\xff\xff\xff", "pickle": b"\x80\x04cos\nsystem\n.",
        "state": pack_openpi({"prompt": "x"}),
    }  # fmt: skip
    pickles = {
        "global": b"cos\nsystem\n(S'x'\ntR.", "inst": b"(S'x'\nios\nsystem\n.", "long": b"\x8b\x7f\xff\xff\xff.",
        "reduce": b"\x80\x04cos\nsystem\n\x8c\x01x\x85R.", "deep": b"\x80\x04]" + b"\x85" * 60 + b".",
    }  # fmt: skip
    said = {}
    with server() as (_, ports), connect(f"ws://127.0.0.1:{ports[0]}") as connection:
        connection.recv(timeout=20)
        for name, frame in frames.items():
            connection.send(frame)
            reply = connection.recv(timeout=20)
            said[name] = reply if isinstance(reply, str) and "\n" not in reply else "ANSWERED"
        connection.send(request())
        said["afterwards"] = "served" if "actions" in unpack_openpi(connection.recv(timeout=20)) else "ANSWERED"
    for name, data in pickles.items():
        try:
            said[f"pickle: {name}"] = "ANSWERED" if read_pickle(data) is not None else "ANSWERED"
        except BurnishError as error:
            said[f"pickle: {name}"] = str(error)
    return sum(one != "ANSWERED" for one in said.values()) / len(said), said


def openpi_client() -> bool | str:
    """Whether the real openpi-client is served."""
    if not Path(OPENPI).exists():
        return "n/a"
    code = """if True:
        import sys, numpy as np
        from openpi_client.websocket_client_policy import WebsocketClientPolicy
        picture = np.zeros((224, 224, 3), np.uint8)
        seen = {"observation/image": picture, "observation/wrist_image": picture, "observation/state": np.zeros(8)}
        reply = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1])).infer(seen | {"prompt": "x"})
        print(reply["actions"].shape == (16, 7))"""
    with server() as (_, ports):
        command = [OPENPI, "-c", code, str(ports[0])]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return ran.stdout.strip() == "True"


def lerobot_client() -> bool | str:
    """Whether LeRobot's own messages are served; its RobotClient as a whole is driven by tests/runtime."""
    if not find_spec("grpc"):
        return "n/a"
    import pickle  # noqa: TID251 - LeRobot's protocol

    import grpc
    from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
    from lerobot.transport import services_pb2 as messages
    from lerobot.transport.services_pb2_grpc import AsyncInferenceStub
    from lerobot.transport.utils import send_bytes_in_chunks

    names, picture = [f"m{i}.pos" for i in range(8)], np.zeros((SIDE, SIDE, 3), np.uint8)
    views = {f"observation.images.{name}": {"dtype": "image", "shape": picture.shape, "names": None}
             for name in ("image", "wrist_image")}  # fmt: skip
    features = {**views, "observation.state": {"dtype": "float32", "shape": (8,), "names": names}}
    seen = {**dict.fromkeys(names, 0.0), "image": picture, "wrist_image": picture, "task": "x"}
    with server("--lerobot") as (_, ports), grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        stub = AsyncInferenceStub(channel)
        stub.Ready(messages.Empty())
        wanted = pickle.dumps(RemotePolicyConfig("stand-in", "served", features, 50))
        stub.SendPolicyInstructions(messages.PolicySetup(data=wanted))
        for step in (3, 9):
            timed = pickle.dumps(TimedObservation(timestamp=0.0, timestep=step, observation=seen))
            stub.SendObservations(send_bytes_in_chunks(timed, messages.Observation))
            found = pickle.loads(stub.GetActions(messages.Empty()).data)  # noqa: S301
            if [one.timestep for one in found] != list(range(step, step + 16)):
                return False
    return True


def stand_in(ms: float, per_row: float) -> Any:
    """A policy that sleeps."""
    import torch

    from burnish.core.types import Chunk, Draws
    from burnish.policies.base import Policy

    class StandIn(Policy):
        name, cameras, chunk_size, n_action_steps = "stand-in", ("image", "wrist_image"), 16, 8
        action_dim, state_dim, image_size = 7, 8, SIDE

        def act(self, batch, draws=None, prefix=None):
            time.sleep((ms + per_row * len(batch["task"])) / 1000)
            return Chunk(draws.noise)

        def draw(self, batch_size, generator):
            return Draws(torch.randn(batch_size, 16, 7, generator=generator), torch.ones(batch_size))

        def loss(self, batch, draws=None): ...
        def save(self, folder, *, home=None): ...

    policy = StandIn()
    policy.weight = torch.nn.Parameter(torch.ones(1))
    return policy


def serve(args: argparse.Namespace) -> None:
    from burnish.runtime.serve.run import serve_policy
    from burnish.runtime.serve.server import ServeOptions

    policy = stand_in(args.ms, args.per_row)
    if args.blocking or args.echo:
        asyncio.run(blocking(policy, args.echo))
        return
    robots = 0 if args.lerobot else -1
    options = ServeOptions(port=0, profile="libero", width=args.width, rate=100_000, lerobot_port=robots)

    def ready(server: Any, port: int, _: Any) -> None:
        print(json.dumps([port, server.lerobot_port]), flush=True)

    serve_policy(policy, options, ready=ready)


async def blocking(policy: Any, echo: bool) -> None:
    """A server that infers inside its event loop, one request at a time; as an `echo` it does not look at requests."""
    from websockets.asyncio.server import serve as listen
    from websockets.exceptions import ConnectionClosed

    from burnish.core.seeding import generator
    from burnish.runtime.serve.rows import Reader, profile_keys, stack
    from burnish.runtime.serve.wire import pack_openpi, unpack_openpi

    reader = Reader(policy, profile_keys(policy, "libero"))
    fixed = pack_openpi({"actions": np.zeros((16, 7), np.float32), "server_timing": {}})
    about = {"action_horizon": 16, "n_action_steps": 8, "prefix": False, "observation_steps": [0]}

    async def client(connection: Any) -> None:
        with contextlib.suppress(ConnectionClosed):
            await connection.send(pack_openpi(about))
            async for frame in connection:
                if echo:
                    await connection.send(fixed)
                    continue
                seen = unpack_openpi(frame)
                seen.pop("burnish", None)
                draws = policy.draw(1, generator(0))
                chunk = policy.act(stack(policy, [reader.row(seen)]), draws).actions[0].numpy()
                await connection.send(pack_openpi({"actions": chunk, "server_timing": {}}))

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with listen(client, "127.0.0.1", 0, compression=None, max_size=None) as one:
        print(json.dumps([one.sockets[0].getsockname()[1], -1]), flush=True)
        await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for flag in ("quick", "serve", "blocking", "echo", "lerobot"):
        parser.add_argument(f"--{flag}", action="store_true")
    for flag, value in (("ms", 0.0), ("per-row", 0.0)):
        parser.add_argument(f"--{flag}", type=float, default=value)
    parser.add_argument("--width", type=int, default=8)
    given = parser.parse_args()
    if given.serve:
        serve(given)
    else:
        print(json.dumps(dict(zip(("figures", "detail"), measure(given), strict=True)), indent=1, default=float))
