"""A WebSocket server around a policy: frames and clients bounded, strangers kept out, an end that leaves nothing.

A protocol is a file beside this one: a `Service`, which makes a `Session` for each connection that turns a frame into a
reply. The event loop does input and output only; one thread owns the policy. The port opens at once, and nobody is
greeted before the policy is loaded and warm. Without a token the server listens on this machine alone.
"""

import asyncio
import base64
import hmac
import logging
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol

from burnish.core.config import EXECUTOR_TIERS, CacheConfig
from burnish.core.errors import BurnishError, one_line
from burnish.core.options import check, option
from burnish.runtime.serve.batcher import Busy
from burnish.runtime.serve.metrics import Metrics

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MODES = ("none", "guided", "inpaint", "trained")
GRACE = 10.0
"""Seconds that running calls have when the server is asked to end."""
NEW_TOKEN = "python -c 'import secrets; print(secrets.token_urlsafe(32))' > token"
log = logging.getLogger("burnish")


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens, and what it lets clients do."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "0 takes a free one", least=0, most=65_535)
    token: str = option("", "what clients must send; without one the server listens on this machine alone")
    max_mb: int = option(16, "largest message in MiB", least=1, most=1024)
    rate: int = option(200, "requests a second of a connection", least=1, most=100_000)
    clients: int = option(32, "connections at once", least=1, most=1024)
    keepalive: bool = option(True, "ping clients; one that answers none for 40 s is cut off")
    lerobot_port: int = option(-1, "a port for LeRobot's asynchronous client; -1 means none", least=-1, most=65_535)
    profile: str = option("lerobot", "names of keys in observations", choices=("lerobot", "libero", "droid", "aloha"))
    map: str = option("", "file that names them instead", path=True)
    cameras: Sequence[str] = option([], "the client's cameras in the policy's order")
    width: int = option(8, "most requests in a call", least=1, most=64)
    wait_ms: float = option(3.0, "a request waits so long for others", least=0, most=1000)
    exact: bool = option(False, "calls of one width: an answer never depends on others, not even in its last bit")
    async_mode: str = option("none", "how a chunk goes on from a session's last one", choices=MODES)
    tier: str = option("", "run the policy by the executor; empty: as LeRobot does", choices=("", *EXECUTOR_TIERS))
    sampler: str = option(
        "", "of a flow-matching policy: name:passes, a file, or auto; empty: its config's Euler steps"
    )
    cache: CacheConfig = field(default_factory=CacheConfig)
    data: str = option("", "data set whose frame rate and names of actions clients are told", path=True)
    seed: int = option(0, "seed of the noise", least=0)
    record: str = option("", "folder for what is asked and answered", path=True)
    record_mb: int = option(1000, "most MiB to record", least=1, most=1_000_000)


class Session(Protocol):
    """One connection."""

    async def answer(self, frame: bytes | str) -> bytes | str | None:
        """The reply to a frame; None where the protocol has none. Raises BurnishError for a bad one."""
        ...

    def sent(self, seconds: float) -> None:
        """Told that the reply has gone, so many seconds after the frame came."""
        ...


class Service(Protocol):
    """A protocol around a policy that is loaded and warm."""

    greeting: bytes | None

    def session(self) -> Session: ...

    def refusal(self, error: BurnishError) -> bytes | str:
        """How an error is told."""
        ...

    def tasks(self) -> list[Awaitable[None]]:
        """What runs beside as long as the server does."""
        ...

    def count(self, clients: int) -> None:
        """Told how many are connected."""
        ...


class InThread:
    """A protocol whose sessions have a plain `answer(frame)`: each call runs in the policy's thread, one at a time."""

    greeting = None

    def __init__(self, server: "Server", make_session: Callable[[], Any], refuse: Callable[[BurnishError], bytes]):
        self.server, self.make_session, self.refusal = server, make_session, refuse

    def session(self) -> "_InThread":
        return _InThread(self.server, self.make_session())

    def tasks(self) -> list[Awaitable[None]]:
        return []

    def count(self, clients: int) -> None: ...


class _InThread:
    def __init__(self, server: "Server", inner: Any):
        self.server, self.inner = server, inner

    async def answer(self, frame: bytes | str) -> bytes | None:
        return await asyncio.get_running_loop().run_in_executor(self.server.thread, self.inner.answer, frame)

    def sent(self, seconds: float) -> None: ...


def serve(
    make: Callable[["Server"], Service], options: ServeOptions | None = None,
    ready: Callable[[int, Callable[[], None]], None] | None = None,
) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM; calls that are running are answered.

    Args:
        make: called once, in the policy's thread, when the port is open: loads the policy and warms it.
        options: where to listen, and limits.
        ready: called with the port, and a function that ends the server from any thread, once the policy is warm.

    Raises:
        BurnishError: a package is not installed, the address cannot be had, there is no token for an address that
            others reach, or whatever `make` raises.
    """
    options = options or ServeOptions()
    check(options, "options")
    try:
        import websockets.asyncio.server  # noqa: F401
    except ImportError:
        raise BurnishError("a server without websockets", "the package", "pip install 'burnish[serve]'") from None
    if options.host not in LOOPBACK and not options.token:
        raise BurnishError(f"--host {options.host} without a token: whoever reaches it could use the policy",
                           "a file with one", f"{NEW_TOKEN}, and --token-file token")  # fmt: skip
    if options.host not in LOOPBACK and options.lerobot_port >= 0:
        raise BurnishError(f"--lerobot-port on {options.host}: LeRobot's client sends no token", "this machine alone",
                           "--host 127.0.0.1, and ssh -L from the robot")  # fmt: skip
    with ThreadPoolExecutor(1, "policy") as thread:
        asyncio.run(Server(options, thread).run(make, ready))


class Server:
    """One running server.

    Attributes:
        options: limits.
        thread: the executor with the one thread that owns the policy.
        metrics: what is counted.
        service: the protocol; None until the policy is warm.
        stopping: whether it is going down.
        guests: clients of LeRobot's port, which is `lerobot_port`.
        answering: calls that are being answered.
        warm: set when clients may be answered.
    """

    def __init__(self, options: ServeOptions, thread: ThreadPoolExecutor):
        self.options, self.thread, self.metrics = options, thread, Metrics()
        self.service: Service | None = None
        self.stopping = False
        self.guests = self.answering = 0
        self.lerobot_port = -1
        self._clients: set[Any] = set()
        self.warm, self._stop = asyncio.Event(), asyncio.Event()

    async def run(self, make: Callable[["Server"], Service], ready: Any) -> None:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._signalled, number)
        async with await self._listen() as server, self._robots():
            log.info("loading the policy; clients wait until it is warm")
            self.service = await loop.run_in_executor(self.thread, make, self)
            tasks = [asyncio.ensure_future(one) for one in self.service.tasks()]
            self.warm.set()
            if ready:
                ready(server.sockets[0].getsockname()[1], lambda: loop.call_soon_threadsafe(self._stop.set))
            stop = asyncio.ensure_future(self._stop.wait())
            done, _ = await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            await self._end(server)
            for task in (stop, *tasks):
                task.cancel()
            await asyncio.gather(*(task for task in tasks if task not in done), return_exceptions=True)
            for task in done:
                task.result()  # a task that ends by itself ends with an error

    def _signalled(self, number: int) -> None:
        """A second signal ends the process: nothing else ends the loading of a policy."""
        if self._stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._stop.set()

    async def _listen(self) -> Any:
        from websockets.asyncio.server import serve as listen

        options = self.options
        limits: dict[str, Any] = {"compression": None, "max_size": options.max_mb << 20, "max_queue": 2}
        limits |= {"origins": [None]} | ({} if options.keepalive else {"ping_interval": None})
        try:
            return await listen(self._client, options.host, options.port, process_request=self._request, **limits)
        except (OSError, OverflowError) as error:
            found = f"cannot listen on {options.host}:{options.port} ({one_line(error, 100)})"
            raise BurnishError(found, "an address of this machine and a free port", "--port 0") from None

    def _robots(self) -> AbstractAsyncContextManager[None]:
        """LeRobot's port, where one is asked for."""
        if self.options.lerobot_port < 0:
            return nullcontext()
        from burnish.runtime.serve.lerobot import listening

        return listening(self)

    async def _end(self, server: Any) -> None:
        """No new clients and calls; what is being computed is still answered."""
        self.stopping = True
        server.close(close_connections=False)
        end = time.monotonic() + GRACE
        while self.answering and time.monotonic() < end:
            await asyncio.sleep(0.01)
        closing = [client.close(1001, "the server is going down") for client in list(self._clients)]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*closing, return_exceptions=True), 2.0)

    def _request(self, connection: Any, asked: Any) -> Any:
        """What is answered over HTTP; None lets the connection become a WebSocket."""
        path = asked.path.partition("?")[0]
        up = self.warm.is_set() and not self.stopping
        if path == "/healthz" or (path in ("/readyz", "/health") and up):  # the last is vla-eval's name of readiness
            return connection.respond(HTTPStatus.OK, '{"status": "ok"}\n')
        if path in ("/readyz", "/health"):
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, '{"status": "not ready"}\n')
        if self.options.token and not _has_token(asked.headers.get_all("Authorization"), self.options.token):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "wrong or missing token: Authorization: Api-Key TOKEN\n")
        if path in ("/metrics", "/stats") and not (self.options.token or _names_loopback(asked.headers)):
            return connection.respond(HTTPStatus.FORBIDDEN, f"expected the host {self.options.host}\n")
        if path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.metrics.text())
        if path == "/stats":
            return connection.respond(HTTPStatus.OK, self.metrics.stats(len(self._clients) + self.guests))
        if self.stopping or len(self._clients) >= self.options.clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.options.clients} clients at most\n")
        return None

    def counted(self) -> None:
        """Tell whoever wants to know how many clients there are."""
        number = len(self._clients) + self.guests
        self.metrics.clients.set(number)
        if self.service:
            self.service.count(number)

    async def _client(self, connection: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._clients.add(connection)
        self.counted()
        gone = asyncio.ensure_future(connection.wait_closed())
        try:
            with suppress(ConnectionClosed):
                await self._talk(connection, gone)
        finally:
            gone.cancel()
            self._clients.discard(connection)
            self.counted()

    async def _talk(self, connection: Any, gone: "asyncio.Future[None]") -> None:
        if not await _unless(gone, self.warm.wait()):
            return
        service = self.service
        assert service is not None  # noqa: S101 - set before `warm`
        session, stamps = service.session(), deque[float](maxlen=self.options.rate)
        if service.greeting is not None:
            await connection.send(service.greeting)
        async for frame in connection:
            start = time.monotonic()
            if len(stamps) == stamps.maxlen and start - stamps[0] < 1:
                await connection.close(1008, f"more than {self.options.rate} requests a second")
                return
            stamps.append(start)
            self.answering, outcome = self.answering + 1, "left"
            try:
                reply, told = await self._reply(session, frame, gone)
                if reply is not None:
                    await connection.send(reply)
                outcome = told
            finally:
                self.answering -= 1
                self.metrics.request(outcome, time.monotonic() - start)
            session.sent(time.monotonic() - start)

    async def _reply(
        self, session: Session, frame: bytes | str, gone: "asyncio.Future[None]"
    ) -> tuple[bytes | str | None, str]:
        """The reply to a frame, and what becomes of it; a client that leaves takes its request along."""
        assert self.service is not None  # noqa: S101
        try:
            if self.stopping:
                raise Busy("the server is going down", "another one")
            answered = await _unless(gone, session.answer(frame))
        except BurnishError as error:
            return self.service.refusal(error), "busy" if isinstance(error, Busy) else "refused"
        return answered, "left" if gone.done() else "ok"


async def _unless(gone: "asyncio.Future[None]", wanted: Any) -> Any:
    """The result of `wanted`, which is cancelled when the client has `gone`: None then."""
    task = asyncio.ensure_future(wanted)
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
    return task.result()


def _names_loopback(headers: Any) -> bool:
    """Whether a request is for this machine by its own name: a web page that had its name led here may read nothing."""
    hosts = headers.get_all("Host")
    return len(hosts) == 1 and re.fullmatch(r"(127\.0\.0\.1|\[::1\]|localhost)(:\d+)?", hosts[0]) is not None


def _has_token(headers: list[str], token: str) -> bool:
    """Whether an Authorization header has it, as Api-Key or Bearer, or as the password of a ws://any:TOKEN@host."""
    if len(headers) != 1:
        return False
    scheme, _, value = headers[0].partition(" ")
    if scheme.lower() == "basic":
        with suppress(ValueError):
            value = base64.b64decode(value).decode().partition(":")[2]
    elif scheme.lower() not in ("api-key", "bearer"):
        return False
    return hmac.compare_digest(value.strip().encode(errors="surrogatepass"), token.encode())
