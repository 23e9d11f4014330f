"""A thin client of `burnish policy serve`, without torch: calls that outlive a lost connection, and a queue of actions.

actor = Actor(PolicyClient("ws://127.0.0.1:8000"))
while True:
    robot.send(actor.act(robot.observe()))
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError, one_line
from burnish.runtime.realtime.queue import ActionQueue, Asked
from burnish.runtime.serve.wire import LATE, OVER, pack_openpi, unpack_openpi

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds between two attempts to connect."""
PLANNED = ("action_horizon", "action_dim", "observation_steps", "prefix", "async")
"""Of a server's greeting: what a client goes by, and no other server may change under it."""
log = logging.getLogger("burnish")


class Late(BurnishError):
    """The server has taken a call up too late: its deadline had passed."""


class PolicyClient(AbstractContextManager["PolicyClient"]):
    """Calls of a served policy, one at a time; thread-safe.

    Args:
        address: ws://host:port, or wss:// behind a proxy.
        token: what the server asks for, "" where it asks for nothing.
        session: noise is drawn from the server's seed, this name and the number of the call; default: a random one.
        patience: seconds for which a lost connection is sought again, and a server that does not answer awaited.

    Attributes:
        metadata: what the server says of its policy.
        reconnects: how often the connection was lost.

    Raises:
        BurnishError: no server in time, a wrong token, or after a lost connection a policy of another shape.
    """

    def __init__(self, address: str = "ws://127.0.0.1:8000", token: str = "", session: str = "",
                 patience: float = 60.0):  # fmt: skip
        self.address, self.token, self.patience = address, token, patience
        self._shown = without_token(address)
        self.session, self.calls, self.reconnects = session or secrets.token_hex(8), 0, 0
        self._lock, self.metadata = threading.Lock(), dict[str, Any]()
        self._connection = self._connect(time.monotonic() + patience)

    def infer(self, observation: dict[str, Any], **extras: Any) -> dict[str, Any]:
        """The reply to an observation: "actions" [T, A] and timings.

        A call whose connection is lost is sent again under its number, so that its noise is the same.

        Args:
            observation: under the keys of the server's profile.
            **extras: see `burnish.runtime.serve.openpi.Extras`.

        Raises:
            BurnishError: the server's own words, or it cannot be reached in time.
        """
        with self._lock:
            self.calls = 0 if extras.get("reset") else self.calls  # also where this very call fails
            number = extras.setdefault("call", self.calls)
            frame = pack_openpi({**observation, "burnish": {"session": self.session, **extras}})
            reply = self._exchange(frame)
            if isinstance(reply, str):
                raise (Late if reply.startswith(LATE) else BurnishError)(f"{self._shown}: {reply}")
            self.calls = number + 1
            return unpack_openpi(reply)

    def _exchange(self, frame: bytes) -> bytes | str:
        from websockets.exceptions import ConnectionClosed

        end, lost = time.monotonic() + max(0.1, self.patience), 0
        while time.monotonic() < end:
            try:
                self._connection.send(frame)
                return self._connection.recv(timeout=max(0.1, end - time.monotonic()))
            except TimeoutError:
                break
            except (ConnectionClosed, OSError) as error:
                if isinstance(error, ConnectionClosed) and error.rcvd and error.rcvd.code in (1008, 1009, OVER):
                    if error.rcvd.code != OVER:
                        self._connection = self._connect(end)
                    raise BurnishError(f"{self._shown}: {error.rcvd.reason or 'too large'}") from None
                log.warning("connection to %s lost (%s)", self._shown, one_line(error, 80))
                self.reconnects, lost = self.reconnects + 1, lost + 1
                time.sleep(min(LONGEST_PAUSE, (lost - 1) * FIRST_PAUSE))  # this very call may be what ends it
                self._connection = self._connect(end)
        self._connection.close()
        raise BurnishError(f"{self._shown} has not answered for {self.patience:g} s", "an answer")

    def _connect(self, end: float) -> Any:
        """A connection whose server has said what it serves."""
        from websockets.exceptions import InvalidStatus, WebSocketException
        from websockets.sync.client import connect
        from websockets.uri import parse_uri

        try:
            parse_uri(self.address)
        except (WebSocketException, ValueError):  # whose own words hold the token
            raise BurnishError(f"the address {self._shown}", "ws://HOST:PORT") from None
        headers = {"Authorization": f"Api-Key {self.token}"} if self.token else {}
        pause = FIRST_PAUSE
        while True:
            try:
                left = max(0.1, end - time.monotonic())
                connection = connect(self.address, compression=None, max_size=None, additional_headers=headers,
                                     open_timeout=left, proxy=None)  # fmt: skip
                with ExitStack() as failed:
                    failed.callback(connection.close)
                    about = unpack_openpi(connection.recv(timeout=left))
                    if other := [key for key in PLANNED if about.get(key) != (self.metadata or about).get(key)]:
                        found = f"{self._shown} now serves another policy ({', '.join(other)} changed)"
                        raise BurnishError(found, "the one that it served before", "a new client")
                    self.metadata = about
                    failed.pop_all()
                return connection
            except (OSError, WebSocketException) as error:  # a timeout is an OSError
                if isinstance(error, InvalidStatus) and error.response.status_code == 401:
                    raise BurnishError(f"{self._shown}: wrong or missing token", "the server's token") from None
                if pause == FIRST_PAUSE and left > LONGEST_PAUSE:
                    log.warning("no policy server at %s yet (%s); waiting", self._shown, one_line(error, 80))
                if time.monotonic() + pause > end:
                    found = f"no policy server at {self._shown} ({one_line(error, 80)})"
                    raise BurnishError(found, "a running one", "burnish policy serve POLICY") from None
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class Actor:
    """An action for every control step; the next chunk is asked for while the present one is executed.

    Args:
        client: connected.
        replan: rows of a chunk that are executed before those of the next; default: the policy's number.
        relative: bool [A], actions whose zero is no motion: what a robot does for which there is no action yet. Others
            are repeated.
        deadline: seconds after which an answer is thrown away and counted.
        commit: tell the server what will be executed before its answer comes: the place in the last chunk where it goes
            on from that (`--async`), else the actions, of a policy that can continue them.

    Attributes:
        queue: counts executed rows, starved steps, delays and errors of commitment.
        late: answers thrown away.
    """

    def __init__(self, client: PolicyClient, replan: int | None = None, relative: Sequence[bool] = (),
                 deadline: float = 5.0, commit: bool = True):  # fmt: skip
        about = client.metadata
        self.horizon = int(about["action_horizon"])
        self.replan = int(about["n_action_steps"]) if replan is None else replan
        if not 1 <= self.replan <= self.horizon:
            raise BurnishError(f"{self.replan} rows before the next chunk", f"1 to {self.horizon}, the policy's chunk")
        self.client, self.deadline = client, deadline
        self.commit, self._goes_on = commit and bool(about["prefix"]), commit and about.get("async", "none") != "none"
        self._chunk, self.late = (-1, 0), 0
        self.queue = ActionQueue(relative, first=min(self.replan, self.horizon // 2))
        self._steps = [int(step) for step in about["observation_steps"]]
        self._seen: deque[dict[str, Any]] = deque(maxlen=1 - min(self._steps))
        self._thread = ThreadPoolExecutor(1, "policy client")
        self._waiting: tuple[Asked, float, Future[dict[str, Any]]] | None = None
        self._moved, self._fresh, self._asked_at, self._episode = False, True, 0, 0

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        """The action [A] of this control step; waits only where the robot has never had one.

        Raises:
            BurnishError: see `PolicyClient.infer`.
        """
        self._seen.append(observation)
        self._collect(wait=False)
        since = self.queue.executed - self._asked_at
        enough = min(self.replan, self.horizon - self.queue.predict())  # the old chunk lasts until the new one is there
        if self._waiting is None and (self._fresh or since >= max(1, enough) or not self.queue.left):
            self._ask()
        while not self._moved and not self.queue.left:
            self._collect(wait=True)
            if not self.queue.left:
                self._ask()
        row, self._moved = self.queue.pop(), True
        return (self.queue.idle() if row is None else row).copy()

    def reset(self) -> None:
        """Begin an episode: nothing of the last one is executed, and to the server it is a session of its own."""
        if self._waiting:
            self._waiting[2].exception()  # comes to its end
        self._waiting, self._moved, self._fresh = None, False, True
        self._episode += 1
        self._seen.clear()
        self.queue.clear()

    def _ask(self) -> None:
        asked = self.queue.ask()
        self._asked_at = asked.step
        extras: dict[str, Any] = {"deadline_ms": 1000 * self.deadline}
        if self._episode:
            extras |= {"session": f"{self.client.session}/{self._episode}", "reset": self._fresh}
        delay = min(asked.delay, self.horizon - 1)
        if self._goes_on and len(asked.rows):
            number, base = self._chunk
            extras |= {"chunk": number, "executed": asked.step - base, "delay": delay}
        elif self.commit and delay:
            extras["prefix"] = asked.rows[:delay]
        if len(self._steps) > 1:
            seen = list(self._seen)
            extras["earlier"] = [seen[max(0, len(seen) - 1 + step)] for step in self._steps[:-1]]
        self._fresh = False
        self._waiting = asked, time.monotonic(), self._thread.submit(self.client.infer, self._seen[-1], **extras)

    def _collect(self, wait: bool) -> None:
        if self._waiting is None or not (wait or self._waiting[2].done()):
            return
        (asked, since, future), self._waiting = self._waiting, None
        reply = None
        with suppress(Late):
            reply = future.result()
        if reply is None or (self._moved and time.monotonic() - since > self.deadline):
            self.late += 1
        elif self.queue.splice(reply["actions"], asked) is not None:
            self._chunk = reply.get("call", -1), asked.step

    def close(self) -> None:
        """End the request under way and hang up."""
        self._thread.shutdown()
        self.client.close()


def without_token(address: str) -> str:
    """ws://any:TOKEN@host:port without what must stay with its owner."""
    scheme, mark, rest = address.partition("://")
    return f"{scheme if mark else ''}{mark}{(rest if mark else scheme).rpartition('@')[2]}"
