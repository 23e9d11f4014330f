"""LeRobot's AsyncInference over gRPC, for its RobotClient as it is; what it pickles is read as data (pickled.py).

The client says which policy it wants; that is compared with the one that is served, and nothing is loaded for it. Its
latest observation is answered, without a filter. Row i of an answer is labelled with its control step plus i, as
LeRobot's own server does. The client sends no token, so the port is open to this machine alone.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from burnish.core.errors import BurnishError, one_line
from burnish.runtime.serve.batcher import Busy
from burnish.runtime.serve.openpi import Extras, OpenPi
from burnish.runtime.serve.pickled import observation, settings, timed_actions

POLL, FORGOTTEN, PERIOD = 1.0, 60.0, 1 / 30
"""Seconds that a client waits for actions before it asks again, after which it counts as gone, and between the
timestamps of actions, as LeRobot's server has it (its client goes by control steps)."""


@dataclass
class Robot:
    """A client.

    Args:
        wanted: its RemotePolicyConfig; empty before it came.
        latest: the last observation, not answered yet.
        fresh: whether there is one.
        seen: earlier observations by control step, for a policy that looks back.
        calls: answers so far.
        at: when it was last heard of.
        waiting: its calls for actions that are under way.
    """

    wanted: dict[str, Any] = field(default_factory=dict)
    latest: dict[str, Any] = field(default_factory=dict)
    fresh: asyncio.Event = field(default_factory=asyncio.Event)
    seen: "OrderedDict[int, dict[str, Any]]" = field(default_factory=OrderedDict)
    calls: int = 0
    at: float = field(default_factory=time.monotonic)
    waiting: int = 0


@asynccontextmanager
async def listening(server: Any) -> AsyncIterator[None]:
    """Inside, LeRobot's client finds `server` on its `lerobot_port`.

    Raises:
        BurnishError: grpcio is not installed, or the port cannot be had.
    """
    try:
        import grpc.aio
        from lerobot.transport.services_pb2_grpc import add_AsyncInferenceServicer_to_server
    except ImportError as error:
        raise BurnishError(f"LeRobot's protocol without grpcio ({one_line(error, 100)})", "the package",
                           "pip install 'burnish[serve-lerobot]'") from None  # fmt: skip
    options = server.options
    pieces = max(4, options.max_mb) << 20  # a client sends pieces of 2 MiB
    limits = [("grpc.max_receive_message_length", pieces), ("grpc.so_reuseport", 0)]
    port = grpc.aio.server(options=limits, maximum_concurrent_rpcs=4 * options.clients)
    service = AsyncInference(server)
    add_AsyncInferenceServicer_to_server(service, port)
    try:
        host = f"[{options.host}]" if ":" in options.host else options.host
        number = port.add_insecure_port(f"{host}:{options.lerobot_port}")
    except RuntimeError as error:
        found = f"cannot listen on {options.host}:{options.lerobot_port} ({one_line(error, 100)})"
        raise BurnishError(found, "a free port", "--lerobot-port 0") from None
    await port.start()
    server.lerobot_port = number
    forgetting = asyncio.ensure_future(service.forget())
    try:
        yield
    finally:
        forgetting.cancel()
        await port.stop(2.0)


@contextmanager
def _counted(who: Any, what: str) -> Iterator[None]:
    """Inside, the number `what` of `who` is one more."""
    setattr(who, what, getattr(who, what) + 1)
    try:
        yield
    finally:
        setattr(who, what, getattr(who, what) - 1)


class AsyncInference:
    """The four calls of LeRobot's service, under its names."""

    def __init__(self, server: Any):
        self.server = server
        self.robots: dict[str, Robot] = {}

    async def Ready(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A client begins."""
        from lerobot.transport import services_pb2

        await self.server.warm.wait()
        self._forget()
        if len(self.robots) >= self.server.options.clients:
            await self._abort(context, Busy(f"{len(self.robots)} clients", f"{self.server.options.clients} at most"))
        self.robots[context.peer()] = Robot()
        self._forget()
        return services_pb2.Empty()

    async def SendPolicyInstructions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The policy that the client wants has to be the one that is served."""
        from lerobot.transport import services_pb2

        try:
            robot, wanted = self._robot(context), settings(request.data)
            self._check(wanted)
            robot.wanted = wanted
        except BurnishError as error:
            await self._abort(context, error)
        return services_pb2.Empty()

    async def SendObservations(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        """An observation in pieces; it replaces one that nobody has answered."""
        from lerobot.transport import services_pb2

        try:
            robot, data = self._robot(context), bytearray()
            if not robot.wanted:
                raise BurnishError("an observation before SendPolicyInstructions", "RobotClient.start() first")
            async for piece in request_iterator:
                if piece.transfer_state == services_pb2.TransferState.TRANSFER_BEGIN:
                    data.clear()
                data += piece.data
                if len(data) > self.server.options.max_mb << 20:
                    raise BurnishError(f"an observation of {len(data) >> 20} MiB", f"{self.server.options.max_mb} MiB",
                                       "smaller pictures, or --max-mb")  # fmt: skip
            self._take(robot, observation(bytes(data)))
        except BurnishError as error:
            self.server.metrics.request("refused")
            await self._abort(context, error)
        return services_pb2.Empty()

    async def GetActions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The chunk for the latest observation; nothing where none comes in time."""
        from lerobot.transport import services_pb2

        outcome, start = "", time.monotonic()
        try:
            robot = self._robot(context)
            with _counted(robot, "waiting"):
                with suppress(TimeoutError):
                    await asyncio.wait_for(robot.fresh.wait(), POLL)
                if not robot.fresh.is_set() or self.server.stopping:
                    return services_pb2.Actions(data=b"")
                robot.fresh.clear()
                outcome, start = "left", time.monotonic()  # unless something else comes of it
                with _counted(self.server, "answering"):
                    data = await self._answer(robot, robot.latest)
            outcome = "ok"
            return services_pb2.Actions(data=data)
        except BurnishError as error:
            outcome = "busy" if isinstance(error, Busy) else "refused"
            await self._abort(context, error)
        finally:
            if outcome:
                self.server.metrics.request(outcome, time.monotonic() - start)

    async def _answer(self, robot: Robot, timed: dict[str, Any]) -> bytes:
        service: OpenPi = self.server.service
        step = timed["timestep"]
        try:
            seen = [self._named(robot, one) for one in self._earlier(robot, timed)]
            row = service.robot_reader.row(seen[-1], seen[:-1])
        except BurnishError:
            robot.seen.pop(step, None)  # or what is wrong with it would spoil the next ones
            raise
        reply, _ = await service.ask(row, Extras(), robot.calls, key=id(robot))
        robot.calls += 1
        count = max(1, min(robot.wanted["actions_per_chunk"], service.policy.act_steps))
        return timed_actions(reply["actions"][:count].tolist(), step, timed["timestamp"], PERIOD)

    def _earlier(self, robot: Robot, timed: dict[str, Any]) -> list[dict[str, Any]]:
        """The observations that the policy's window asks for, by control step; else the nearest earlier one."""
        found = []
        for offset in self.server.service.policy.window.observations[:-1]:
            before = [one for step, one in robot.seen.items() if step <= timed["timestep"] + offset]
            found.append(before[-1] if before else next(iter(robot.seen.values()), timed["observation"]))
        return [*found, timed["observation"]]

    def _take(self, robot: Robot, timed: dict[str, Any]) -> None:
        reach = self.server.service.policy.window.reach
        robot.latest = timed
        if reach:
            robot.seen[timed["timestep"]] = timed["observation"]
            robot.seen.move_to_end(timed["timestep"])
            while len(robot.seen) > reach + 1:
                robot.seen.popitem(last=False)
        robot.fresh.set()

    def _named(self, robot: Robot, raw: dict[str, Any]) -> dict[str, Any]:
        """A robot's names of motors and cameras as LeRobot's keys, as its client's features and rename_map say."""
        found: dict[str, Any] = {"task": raw.get("task", "")}
        renamed = robot.wanted.get("rename_map")
        for key, feature in robot.wanted["lerobot_features"].items():
            names = feature.get("names") if isinstance(feature, dict) else None
            if key.startswith("observation.images."):
                value = raw.get(key.removeprefix("observation.images."))
            elif isinstance(names, list) and all(isinstance(name, str) for name in names):
                missing = [name for name in names if type(raw.get(name)) not in (int, float)]
                if missing:
                    raise BurnishError(f"an observation without {missing[0]}", f"numbers for {', '.join(names)[:200]}")
                value = [raw[name] for name in names]
            else:
                continue
            name = renamed.get(key) if isinstance(renamed, dict) else None
            found[name if isinstance(name, str) else key] = value
        return found

    def _check(self, wanted: dict[str, Any]) -> None:
        """Raise BurnishError where a client wants another policy than the one that is served."""
        service: OpenPi = self.server.service
        if wanted["policy_type"] != service.policy.name:
            found = f"a client that wants a policy of type {wanted['policy_type'][:40]!r}"
            raise BurnishError(found, f"{service.policy.name}, as served", f"--policy_type={service.policy.name}")
        names, asked = ("served", *service.names), wanted["pretrained_name_or_path"]
        if asked not in names:
            raise BurnishError(f"a client that wants the policy {asked[:100]!r}", f"one of {', '.join(names)}",
                               "--pretrained_name_or_path=served")  # fmt: skip

    def _robot(self, context: Any) -> Robot:
        """The client of a call; one whose connection broke goes on under a new port."""
        if self.server.stopping:
            raise Busy("the server is going down", "another one")
        peer = context.peer()
        if peer not in self.robots:
            host = peer.rpartition(":")[0]
            quiet = [one for one, robot in self.robots.items() if not robot.waiting]  # another robot's is taken by none
            old = [one for one in quiet if one.rpartition(":")[0] == host]
            if not old:
                raise BurnishError("a client that has not said Ready", "RobotClient.start() first")
            self.robots[peer] = self.robots.pop(min(old, key=lambda one: self.robots[one].at))  # the quiet one
        robot = self.robots[peer]
        robot.at = time.monotonic()
        self._forget()
        return robot

    async def forget(self) -> None:
        """For ever: clients that have left are counted no more, though nobody else calls."""
        while True:
            await asyncio.sleep(FORGOTTEN / 4)
            self._forget()

    def _forget(self) -> None:
        limit = time.monotonic() - FORGOTTEN
        self.robots = {peer: robot for peer, robot in self.robots.items() if robot.at > limit or robot.waiting}
        self.server.guests = len(self.robots)
        self.server.counted()

    async def _abort(self, context: Any, error: BurnishError) -> None:
        import grpc

        code = grpc.StatusCode.RESOURCE_EXHAUSTED if isinstance(error, Busy) else grpc.StatusCode.INVALID_ARGUMENT
        await context.abort(code, str(error))
