"""One address for a robot whose policy changes from trial to trial, so that nobody at the robot knows which answers.

Between trials a robot that connects waits, and one that was connected is cut off: no policy acts while a person sets up
the scene.
"""

import asyncio
import logging
import threading
from contextlib import suppress
from typing import Any

from burnish.core.errors import BurnishError, one_line
from burnish.runtime.serve.wire import OVER, pack_openpi, unpack_openpi

NAMES = ("policy", "weights", "sampler", "tier", "cache", "watchdog", "max_mb")
"""Of a server's greeting: what would tell who answers."""
MOST_MB = 64
"""MiB of a message, where servers do not say their own limit (`max_mb`)."""
_LIMITS: dict[str, Any] = {"compression": None, "max_size": MOST_MB << 20, "close_timeout": 1}
log = logging.getLogger("burnish")


class Relay:
    """A port of this machine, for the robot's client at `address`, that passes openpi's frames on, both ways; of the
    robot's those of at most `max_mb` MiB.

    `asked` counts frames of the robot since the last `open`, `fault` is what a person should know, without a name.
    BurnishError where the port cannot be had, or a package is missing.
    """

    def __init__(self, port: int = 0, max_mb: int = MOST_MB):
        self.asked, self.fault, self._target = 0, "", ""
        self._robots, self._loop, self._opened = set[Any](), asyncio.new_event_loop(), asyncio.Event()
        threading.Thread(target=self._loop.run_forever, name="relay", daemon=True).start()
        try:
            self._server = self._call(self._listen(port, max_mb))
        except ImportError:
            raise BurnishError("a relay without websockets", "the package", "pip install 'burnish[serve]'") from None
        except (OSError, OverflowError) as error:
            raise BurnishError(f"cannot listen on port {port} ({one_line(error, 100)})", "a free port") from None
        self.address = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def open(self, target: str) -> None:
        """Let robots through to the server at `target`."""
        self.asked, self.fault, self._target = 0, "", target
        self._loop.call_soon_threadsafe(self._opened.set)

    def hold(self) -> None:
        """Cut robots off, and let them wait from now on; nothing is passed on when this returns."""
        self._call(self._cut())

    def close(self) -> None:
        self._call(self._cut())
        self._loop.call_soon_threadsafe(self._server.close)

    def _call(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    async def _listen(self, port: int, max_mb: int) -> Any:
        from websockets.asyncio.server import serve

        return await serve(self._robot, "127.0.0.1", port, origins=[None], **{**_LIMITS, "max_size": max_mb << 20})

    async def _cut(self) -> None:
        self._opened.clear()
        await asyncio.gather(*(robot.close(OVER, "this trial is over") for robot in self._robots))

    async def _robot(self, robot: Any) -> None:
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        while not self._opened.is_set():
            waits = [asyncio.ensure_future(one) for one in (robot.wait_closed(), self._opened.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if robot.close_code is not None:
                return
        self._robots.add(robot)
        try:
            async with connect(self._target, proxy=None, **_LIMITS) as server:
                await robot.send(_nameless(await asyncio.wait_for(server.recv(), 60)))
                ways = [asyncio.ensure_future(_pass(server, robot)), asyncio.ensure_future(_pass(robot, server, self))]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                if server.close_code in (1008, 1009):  # a limit of the server, which sending again would meet again
                    await robot.close(server.close_code, server.close_reason)
        except (OSError, WebSocketException, BurnishError) as error:
            if robot.close_code is None:
                self.fault = "the policy of this trial does not answer"
                log.warning("%s (%s)", self.fault, type(error).__name__)
        finally:
            self._robots.discard(robot)


async def _pass(source: Any, sink: Any, counter: Relay | None = None) -> None:
    from websockets.exceptions import ConnectionClosed

    with suppress(ConnectionClosed):
        async for frame in source:
            await sink.send(frame)
            if counter:
                counter.asked += 1


def _nameless(greeting: bytes | str) -> bytes:
    about = unpack_openpi(greeting)
    known = about if isinstance(about, dict) else {}
    return pack_openpi({key: "hidden" if key in NAMES else value for key, value in known.items()})
