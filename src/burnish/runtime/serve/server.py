"""A WebSocket server around a policy: calls one at a time, frames and clients bounded, an end that leaves nothing.

A protocol is a file beside this one: a `Session` for each connection that turns a frame into a reply. There is no
authentication, so the server listens on this machine alone unless told otherwise, and web pages are turned away.
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Protocol

from burnish.core.errors import BurnishError, one_line

MOST_FRAME = 32 * 2**20
"""Bytes of a message: four raw views of 1,500 x 1,500 pixels."""
MOST_CLIENTS = 64
LOOPBACK = ("127.0.0.1", "::1", "localhost")
log = logging.getLogger("burnish")


class Session(Protocol):
    """One connection."""

    def answer(self, frame: bytes | str) -> bytes | None:
        """The reply to a frame; None where the protocol has none. Raises nothing for a bad one, but says so."""
        ...


def serve(
    make_session: Callable[[], Session], host: str = "127.0.0.1", port: int = 8000,
    ready: Callable[[int, Callable[[], None]], None] | None = None,
) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM; a call that is running comes to its end.

    Args:
        make_session: called for each connection.
        host: address to listen on.
        port: 0 takes a free one.
        ready: called with the port, and a function that ends the server from any thread.

    Raises:
        BurnishError: websockets is not installed, or the address cannot be had.
    """
    try:
        import websockets.asyncio.server  # noqa: F401
    except ImportError:
        raise BurnishError("a server without websockets", "the package", "pip install 'burnish[serve]'") from None
    if host not in LOOPBACK:
        log.warning("listening on %s: whoever reaches it can use the policy", host)
    with ThreadPoolExecutor(1, "policy") as thread:
        asyncio.run(_serve(make_session, host, port, ready, thread))


async def _serve(
    make_session: Callable[[], Session], host: str, port: int,
    ready: Callable[[int, Callable[[], None]], None] | None, thread: ThreadPoolExecutor,
) -> None:  # fmt: skip
    from websockets.asyncio.server import serve as listen
    from websockets.exceptions import ConnectionClosed

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    clients: set[Any] = set()

    async def handle(connection: Any) -> None:
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        session = make_session()
        clients.add(connection)
        try:
            with suppress(ConnectionClosed):
                async for frame in connection:
                    reply = await loop.run_in_executor(thread, session.answer, frame)
                    if reply is not None:
                        await connection.send(reply)
        finally:
            clients.discard(connection)

    def request(connection: Any, asked: Any) -> Any:
        if asked.path == "/health":
            return connection.respond(HTTPStatus.OK, '{"status": "ok"}\n')
        if len(clients) >= MOST_CLIENTS:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{MOST_CLIENTS} clients at most\n")
        return None

    # No pings: a client that steps a simulator answers none, and would be cut off.
    options = {"compression": None, "max_size": MOST_FRAME, "max_queue": 4, "ping_interval": None, "origins": [None]}
    try:
        server = await listen(handle, host, port, process_request=request, **options)
    except (OSError, OverflowError) as error:
        found = f"cannot listen on {host}:{port} ({one_line(error, 100)})"
        raise BurnishError(found, "an address of this machine and a free port", "--port 0") from None
    async with server:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop.set)
        if ready:
            ready(server.sockets[0].getsockname()[1], lambda: loop.call_soon_threadsafe(stop.set))
        await stop.wait()
