"""The model-server protocol of vla-eval (allenai/vla-evaluation-harness, protocol 1): its benchmarks drive a policy.

A message is a map {type, payload, seq, timestamp} in msgpack. A client says hello, episode_start, then an observation
for each step, which is answered by an action of the same seq, and episode_end; what is wrong with a message comes back
as an error. Arrays are {"__ndarray__", data, dtype, shape}, pictures {"__image__", format, data, shape}. Of a chunk,
`n_action_steps` actions are handed out before the policy is asked again.
"""

import io
import json
import logging
import time
from collections import deque
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError, for_client
from burnish.core.seeding import generator
from burnish.core.types import Batch
from burnish.policies.base import Policy
from burnish.policies.pretrained import foreign
from burnish.runtime.serve.rows import MOST_SIDE, Keys, Reader, Row, stack
from burnish.runtime.serve.wire import msgpack, plain_array, unpack

PROTOCOL = 1
log = logging.getLogger("burnish")


class VlaEval:
    """A policy as vla-eval's model server.

    Args:
        policy: put into evaluation mode.
        cameras: the benchmark's cameras in the policy's order; none: those of the same names, or the only one.
        n_action_steps: actions executed of each chunk; None means the policy's own number.
        seed: of the policy's noise, which depends on it, the task, the episode and the replan alone.

    Raises:
        BurnishError: msgpack is not installed, or arguments that do not fit the policy.
    """

    def __init__(self, policy: Policy, cameras: Sequence[str] = (), n_action_steps: int | None = None, seed: int = 0):
        msgpack()  # which may be missing
        self.steps = policy.n_action_steps if n_action_steps is None else n_action_steps
        if not 1 <= self.steps <= policy.act_steps:
            raise BurnishError(f"{self.steps} action steps", f"1 to {policy.act_steps}, the policy's chunk")
        if policy.window.reach:
            raise BurnishError(f"{policy.name} sees earlier observations too", "a policy that acts on the present one")
        if cameras and len(cameras) != len(policy.cameras):
            raise BurnishError(f"cameras {', '.join(cameras)} for a policy that sees {', '.join(policy.cameras)}",
                               "one of the benchmark's for each of them, in that order")  # fmt: skip
        self.policy, self.cameras, self.seed = policy.eval(), tuple(cameras), seed
        self._readers: dict[tuple[str, ...], Reader] = {}

    def session(self) -> "VlaEvalSession":
        return VlaEvalSession(self)

    def greeting(self) -> dict[str, Any]:
        """What hello is answered with; a benchmark takes `observation_params` as its own where it knows them."""
        wanted = {"send_state": bool(self.policy.state_dim), "send_wrist_image": len(self.policy.cameras) > 1}
        return {
            "harness_version": f"burnish {version('burnish')}", "protocol_version": PROTOCOL, "capabilities": {},
            "model_server": "burnish", "observation_params": {name: True for name, value in wanted.items() if value},
        }  # fmt: skip

    def act(self, payload: dict[str, Any], episode: str, replan: int) -> np.ndarray:
        """Actions [n_action_steps, A] for an observation."""
        return self._act(self.batch(payload), episode, replan)

    def warm(self) -> None:
        """Act on black views, so that no benchmark waits for what a first call builds."""
        views = {name: np.zeros((1, *size, 3), np.uint8) for name, size in self.policy.view_sizes.items()}
        self._act(stack(self.policy, [Row(views, np.zeros((1, self.policy.state_dim), np.float32), "go")]), "", 0)

    def _act(self, batch: Batch, episode: str, replan: int) -> np.ndarray:
        draws = self.policy.draw(1, generator(self.seed, episode, replan)).to(self.policy.device)
        with foreign("the policy cannot act on this", "an observation like those it was trained on"):
            actions = self.policy.act(batch, draws).actions[0, : self.steps].float().cpu().numpy()
        if not np.isfinite(actions).all():
            raise BurnishError("the policy returned actions that are not finite", "numbers", "check the checkpoint")
        return actions

    def batch(self, payload: dict[str, Any]) -> Batch:
        """The observation as a batch of one; raises BurnishError for what is missing or does not fit."""
        images = payload.get("images")
        views = images if isinstance(images, dict) else {}
        names = self._names(views)
        seen = {camera: read_array(views[camera], f"the view {camera}") for camera in names.values()}
        seen["payload/task_description"] = payload.get("task_description", "")
        if self.policy.state_dim:
            state = read_array(payload.get("states", payload.get("state")), "the state")
            seen["payload/states"] = state.astype(np.float32)
        known = tuple(names.values())
        if known not in self._readers:
            self._readers = {known: Reader(self.policy, Keys(names, ("payload/states",), "payload/task_description"))}
        return stack(self.policy, [self._readers[known].row(seen)])

    def _names(self, images: dict[str, Any]) -> dict[str, str]:
        own = self.policy.cameras
        names = self.cameras or (tuple(images) if len(images) == len(own) == 1 else own)
        missing = [name for name in names if name not in images]
        if missing:
            known = [str(name) for name in images][: len(own)]
            raise BurnishError(f"views {', '.join(map(str, images)) or 'none'} without {', '.join(missing)}",
                               f"one for each camera of the policy ({', '.join(own)})",
                               f"--cameras {' '.join(known)}" if len(known) == len(own) else "")  # fmt: skip
        return dict(zip(own, names, strict=True))


class VlaEvalSession:
    """One client: the episode that it is in, and what is left of the chunk."""

    def __init__(self, server: VlaEval):
        self.server = server
        self.episodes, self.episode, self.replan = 0, "", 0
        self.left: deque[np.ndarray] = deque()

    def answer(self, frame: bytes | str) -> bytes | None:
        number = 0
        try:
            message = read_message(frame)
            number = message["seq"]
            reply = self._answer(message["type"], message["payload"])
        except Exception as error:  # noqa: BLE001 - `for_client` raises what is no lack of memory
            reply = "error", {"error": str(for_client(error))}
        return None if reply is None else pack_message(*reply, number)

    def _answer(self, kind: str, payload: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        if kind == "hello":
            theirs = payload.get("protocol_version", PROTOCOL)
            if theirs != PROTOCOL:
                raise BurnishError(f"protocol {str(theirs)[:20]}", f"protocol {PROTOCOL} of vla-eval")
            return "hello", self.server.greeting()
        if kind == "observation":
            if not self.left:
                self.left.extend(self.server.act(payload, self.episode, self.replan))
                self.replan += 1
            return "action", {"actions": self.left.popleft()}
        if kind == "episode_start":
            self._begin(payload.get("task"))
        elif kind == "error":
            log.warning("the client says: %s", str(payload.get("error"))[:200])
        return None

    def _begin(self, task: Any) -> None:
        """Noise follows the task and the number of its episode; where that is not told, of those on this connection."""
        self.episodes, self.replan = self.episodes + 1, 0
        self.left.clear()
        known = task.items() if isinstance(task, dict) else ()
        named = {k: v for k, v in known if isinstance(k, str) and isinstance(v, str | int)}
        named.setdefault("episode_idx", f"-{self.episodes}")
        self.episode = json.dumps(named, sort_keys=True)


def refusal(error: BurnishError) -> bytes:
    """An error that is no answer to a message."""
    return pack_message("error", {"error": str(error)}, 0)


def pack_message(kind: str, payload: dict[str, Any], number: int) -> bytes:
    message = {"type": kind, "payload": payload, "seq": number, "timestamp": time.time()}
    return msgpack().packb(message, default=pack_array)


def pack_array(array: np.ndarray) -> dict[str, Any]:
    """An array as the harness has it."""
    data = np.ascontiguousarray(array)
    return {"__ndarray__": True, "data": data.tobytes(), "dtype": data.dtype.str, "shape": list(data.shape)}


def read_message(frame: bytes | str) -> dict[str, Any]:
    """The message in a frame; raises BurnishError for anything else. Nothing but maps, lists and values is made."""
    found = unpack(frame)
    if not isinstance(found, dict) or not {"type", "payload", "seq"} <= found.keys():
        raise BurnishError("a message that lacks type, payload or seq", "a map of them")
    kinds = ("hello", "observation", "episode_start", "episode_end", "error")
    if found["type"] not in kinds:
        raise BurnishError(f"a message of type {str(found['type'])[:40]!r}", f"one of {', '.join(kinds)}")
    if not isinstance(found["payload"], dict) or type(found["seq"]) is not int:
        raise BurnishError("a message whose payload is no map or whose seq is no number", "a map, and a whole number")
    return found


def read_array(value: Any, what: str) -> np.ndarray:
    """A packed array or picture, or a list of numbers; raises BurnishError, which names it `what`, for others."""
    if isinstance(value, list) and value and all(type(one) in (int, float) for one in value):
        return np.array(value, np.float64)
    if not isinstance(value, dict):
        raise BurnishError(f"{what} is {'missing' if value is None else 'no array'}", "a packed array or picture")
    data = value.get("data")
    if isinstance(data, bytes) and value.get("__image__") and value.get("format") in ("png", "jpeg"):
        return _picture(data, what)
    return plain_array(data, value.get("dtype"), value.get("shape"), what)


def _picture(data: bytes, what: str) -> np.ndarray:
    from PIL import Image

    with foreign(what, "a PNG or JPEG picture"), Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        if max(image.size) > MOST_SIDE:  # before anything is unpacked
            raise BurnishError(f"{what} has {image.width}x{image.height} pixels", f"at most {MOST_SIDE} along a side")
        return np.array(image.convert("RGB"))
