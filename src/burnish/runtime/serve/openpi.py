"""openpi's protocol, for openpi-client as it is and for `burnish.runtime.client`.

The server speaks first: a map of what it serves. A request is an observation, a reply a map with `actions` [T, A] and
timings; a text frame is an error, after which the connection is as good as before. An observation may have a key
`burnish`: a map of what openpi's protocol has no place for (see `Extras`).
"""

import time
from collections.abc import Awaitable
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

import numpy as np
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed
from burnish.policies.base import lacks, require
from burnish.runtime.serve.batcher import Batcher, Old
from burnish.runtime.serve.record import Recorder
from burnish.runtime.serve.rows import Keys, Reader, Row, blank, profile_keys
from burnish.runtime.serve.wire import pack_openpi, unpack_openpi

KEPT_SECONDS, MOST_SESSIONS = 60.0, 1000
"""How long the call number of a named session outlives its connection, and how many are remembered."""


@dataclass(frozen=True)
class Extras:
    """What may stand in an observation's `burnish`.

    Args:
        session: a name; noise is drawn from the server's seed, it and the number of the call.
        reset: begin again at call 0.
        call: the number of this call, for one that is sent again.
        seed: of this call's noise, in place of the derived one.
        prefix: [P, A] actions that are committed and that the chunk continues.
        chunk, executed, delay: the call whose chunk is being executed, rows of it that are done, and rows that will be
            done when the answer comes; a server with a mode of real-time chunking goes on from that chunk.
        earlier: observations before this one, oldest first, for a policy that sees them.
        deadline_ms: after which nobody wants the answer any more.
    """

    session: str = ""
    reset: bool = False
    call: int | None = None
    seed: int | None = None
    prefix: np.ndarray | None = None
    chunk: int | None = None
    executed: int = 0
    delay: int = 0
    earlier: list[Any] = field(default_factory=list)
    deadline_ms: float = 600_000.0


class Sessions:
    """Call numbers by name: they go on while a connection that uses it is open, and for a minute on another one."""

    def __init__(self) -> None:
        self._named: dict[str, tuple[int, float]] = {}

    def number(self, name: str, own: bool = False) -> int:
        """Of the next call; `own`: by the connection that made an earlier one, however long ago that is."""
        number, at = self._named.get(name, (0, 0.0))
        return number if own or time.monotonic() - at < KEPT_SECONDS else 0

    def store(self, name: str, number: int) -> None:
        self._named.pop(name, None)  # so that the oldest stands first
        self._named[name] = number, time.monotonic()
        if len(self._named) > MOST_SESSIONS:
            self._named.pop(next(iter(self._named)))


class OpenPi:
    """A policy behind openpi's protocol, and what other protocols of the same server share with it.

    Args:
        batcher: answers.
        keys: of the observations.
        seed: of all noise.
        about: more for the greeting, such as the hash of the weights.
        mode: of going on from a session's last chunk; "none" answers every call afresh.
        recorder: writes down what is asked and answered.
        robot_keys: of LeRobot's client, where they are not the policy's own names.
        names: what such a client may call the policy.
    """

    def __init__(
        self, batcher: Batcher, keys: Keys, seed: int = 0, about: dict[str, Any] | None = None,
        mode: str = "none", recorder: Recorder | None = None, robot_keys: Keys | None = None,
        names: tuple[str, ...] = (),
    ):  # fmt: skip
        self.batcher, self.keys, self.seed, self.recorder, self.names = batcher, keys, seed, recorder, names
        self.policy, self.reader, self.sessions = batcher.policy, Reader(batcher.policy, keys), Sessions()
        self.robot_reader = Reader(self.policy, robot_keys or profile_keys(self.policy, "lerobot"))
        policy, self.mode = self.policy, mode
        if mode != "none":
            require(policy, "steering", f"--async {mode}")
        self.about = {
            "server": f"burnish {version('burnish')}", "policy": policy.name, "action_horizon": policy.act_steps,
            "n_action_steps": policy.n_action_steps, "action_dim": policy.action_dim, "state_dim": policy.state_dim,
            "cameras": {name: list(size) for name, size in policy.view_sizes.items()},
            "keys": {"images": keys.images, "state": list(keys.state), "task": keys.task},
            "observation_steps": list(policy.window.observations), "prefix": policy.supports("prefix"),
            "async": mode, **(about or {}),
        }  # fmt: skip
        self.greeting = pack_openpi(self.about)

    def warm(self) -> None:
        """Act on black views, so that no client waits for what a first call builds; in the policy's thread.

        Raises:
            BurnishError: the policy cannot act at all, or not go on from a chunk in the way of `mode`.
        """
        row = self.reader.row(blank(self.policy, self.keys))
        for count in sorted({1, self.batcher.width}):
            found = self.batcher.act([row] * count, [0] * count)
            if self.mode != "none":
                old = [Old(one.raw, 1) for one in found if one.raw is not None]
                self.batcher.act([row] * count, [0] * count, old=old)

    def session(self) -> "OpenPiSession":
        return OpenPiSession(self)

    def refusal(self, error: BurnishError) -> str:
        return str(error)

    def tasks(self) -> list[Awaitable[None]]:
        return [self.batcher.run()]

    def count(self, clients: int) -> None:
        self.batcher.clients = clients

    async def ask(
        self, row: Row, extras: Extras, call: int, last: Tensor | None = None, key: int = 0
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The reply to call `call` of a session whose chunk was `last`, and the new chunk in the model's space.

        `key` tells connections without a session's name apart.
        """
        if self.batcher.reuse and call == 0:
            self.batcher.reuse.forget(extras.session or key)
        prefix = None if extras.prefix is None else self._prefix(extras.prefix)
        seed = derive_seed(self.seed, extras.session, call) if extras.seed is None else extras.seed
        old, deadline = self._old(extras, last), extras.deadline_ms / 1000
        if extras.delay or extras.prefix is not None:
            self.batcher.metrics.late(extras.delay if prefix is None else len(prefix))
        answer = await self.batcher.submit(row, seed, prefix, old, deadline, extras.session or key)
        if self.recorder:
            self.recorder.put(row, answer.actions, {"session": extras.session, "call": call, "seed": seed})
        infer = 1000 * answer.infer
        timing = {"infer_ms": infer, "queue_ms": 1000 * answer.queued, "rows": answer.rows}
        reply = {"actions": answer.actions, "server_timing": timing, "policy_timing": {"infer_ms": infer},
                 "seed": seed, "call": call}  # fmt: skip
        if answer.distance is not None:
            reply["watchdog"] = answer.distance
            self.batcher.metrics.distance.set(answer.distance)
        return reply, answer.raw

    def _old(self, extras: Extras, last: Tensor | None) -> Old | None:
        rest = None if last is None or self.mode == "none" or extras.prefix is not None else last[extras.executed :]
        most = self.policy.rtc_training_max_delay if self.mode == "trained" else extras.delay
        delay = min(extras.delay, most, 0 if rest is None else len(rest))
        return None if rest is None or not len(rest) or (self.mode != "guided" and not delay) else Old(rest, delay)

    def _prefix(self, given: Any) -> np.ndarray:
        policy = self.policy
        if not policy.supports("prefix"):
            raise lacks(policy, "prefix", "burnish.prefix")
        fits = isinstance(given, np.ndarray) and given.dtype.kind in "iuf" and given.ndim == 2
        if not fits or not 0 < len(given) < policy.act_steps or given.shape[1] != policy.action_dim:
            found = f"a prefix {list(given.shape)}" if isinstance(given, np.ndarray) else "a prefix that is no array"
            raise BurnishError(found, f"numbers [P, {policy.action_dim}] with P from 1 to {policy.act_steps - 1}")
        prefix = given.astype(np.float32)
        if not np.isfinite(prefix).all():
            raise BurnishError("a prefix that is not finite", "numbers")
        return prefix


class OpenPiSession:
    """One connection."""

    def __init__(self, service: OpenPi):
        self.service, self.calls, self.name = service, 0, ""
        self.previous: float | None = None
        self.last: tuple[tuple[str, int], Tensor | None] = ("", -1), None

    async def answer(self, frame: bytes | str) -> bytes:
        observation = unpack_openpi(frame)
        if not isinstance(observation, dict):
            raise BurnishError("a message that is no map", "an observation")
        extras = read_extras(observation.pop("burnish", None))
        sessions = self.service.sessions
        name = extras.session
        call = sessions.number(name, name == self.name) if name else self.calls
        call = 0 if extras.reset else call if extras.call is None else extras.call
        row, (last, raw) = self.service.reader.row(observation, extras.earlier), self.last
        reply, new = await self.service.ask(row, extras, call, raw if (name, extras.chunk) == last else None, id(self))
        self.calls, self.last, self.name = call + 1, ((name, call), new), name
        if name:
            sessions.store(name, call + 1)
        if self.previous is not None:
            reply["server_timing"]["prev_total_ms"] = 1000 * self.previous
        return pack_openpi(reply)

    def sent(self, seconds: float) -> None:
        self.previous = seconds


def read_extras(given: Any) -> Extras:
    """Raises BurnishError unless `given` is missing or a map of what `Extras` has, each of its kind."""
    if given is None:
        return Extras()
    known = [one.name for one in fields(Extras)]
    if not isinstance(given, dict) or not given.keys() <= set(known):
        raise BurnishError("a key `burnish` that is no map of what it may hold", f"a map of {', '.join(known)}")
    extras = Extras(**given)
    numbers = (extras.call, extras.seed, extras.chunk, extras.executed, extras.delay)
    whole = all(value is None or (type(value) is int and 0 <= value < 2**63) for value in numbers)
    named = isinstance(extras.session, str) and len(extras.session) <= 200
    limit = extras.deadline_ms
    timed = isinstance(limit, int | float) and not isinstance(limit, bool) and 0 < limit <= 3_600_000
    if not (whole and named and timed and isinstance(extras.reset, bool)):
        raise BurnishError("session, call, seed, chunk, executed, delay, reset or deadline_ms of another kind",
                           "a text of at most 200 characters, whole numbers, a flag, and milliseconds")  # fmt: skip
    return extras
