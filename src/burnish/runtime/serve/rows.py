"""What clients send as what a policy sees: names of cameras and states, checks, and batches of rows."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.reading import bounded, parse_yaml, read_text
from burnish.core.types import Batch
from burnish.policies.base import Policy
from burnish.policies.keys import IMAGES, STATE, TASK

MOST_SIDE, MOST_TEXT = 4096, 10_000
"""Pixels along a view, characters of an instruction."""
PROFILES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "libero": (("observation/image", "observation/wrist_image"), ("observation/state",), "prompt"),
    "droid": (
        ("observation/exterior_image_1_left", "observation/wrist_image_left", "observation/exterior_image_2_left"),
        ("observation/joint_position", "observation/gripper_position"), "prompt",
    ),
    "aloha": (("images/cam_high", "images/cam_left_wrist", "images/cam_right_wrist", "images/cam_low"),
              ("state",), "prompt"),
}  # fmt: skip
"""Keys of views, of the parts of the state and of the instruction in the observations of openpi's examples."""
log = logging.getLogger("burnish")


@dataclass(frozen=True)
class Keys:
    """Where in a client's observation the policy finds what it sees; keys of maps in maps are joined by "/".

    Args:
        images: camera of the policy to key.
        state: keys whose values one after another are the state.
        task: key of the instruction.
    """

    images: dict[str, str]
    state: tuple[str, ...] = (STATE,)
    task: str = TASK


def profile_keys(policy: Policy, profile: str, cameras: Sequence[str] = ()) -> Keys:
    """The keys of a profile: "lerobot" (LeRobot's own) or one of openpi's examples (see PROFILES).

    Args:
        policy: whose cameras are looked for.
        profile: the name.
        cameras: a key for each camera of the policy, in its order. Without them a camera takes the key that ends in its
            name where all do; else keys are taken in the order of the profile, and that is logged.

    Raises:
        BurnishError: a policy with other cameras than the profile has.
    """
    own = policy.cameras
    if cameras and len(cameras) != len(own):
        raise BurnishError(f"cameras {', '.join(cameras)} for a policy that sees {', '.join(own)}",
                           "one of the client's for each of them, in that order")  # fmt: skip
    if profile == "lerobot":
        return Keys({name: f"{IMAGES}{key}" for name, key in zip(own, cameras or own, strict=True)})
    images, state, task = PROFILES[profile]
    by_name = {key.rpartition("/")[2]: key for key in images}
    if cameras:
        return Keys(dict(zip(own, cameras, strict=True)), state, task)
    if all(name in by_name for name in own):
        return Keys({name: by_name[name] for name in own}, state, task)
    if len(own) > len(images):
        raise BurnishError(f"a policy with the cameras {', '.join(own)}",
                           f"at most {len(images)}, which profile {profile} has", "--map FILE")  # fmt: skip
    keys = dict(zip(own, images, strict=False))
    log.info("views by order: %s", ", ".join(f"{name} is {key}" for name, key in keys.items()))
    return Keys(keys, state, task)


def read_keys(policy: Policy, path: Path) -> Keys:
    """The keys in a file {images: {CAMERA: KEY}, state: KEY or list of keys, task: KEY}, in YAML or JSON.

    Raises:
        BurnishError: no such file, or one that says something else or lacks a camera of the policy.
    """
    found = parse_yaml(read_text(path), str(path))
    bounded(found, str(path))
    shape = "a map of images (one key for each camera), state and task"
    if not isinstance(found, dict) or not found.keys() <= {"images", "state", "task"}:
        raise BurnishError(f"{path} is no map of keys", shape)
    images, state, task = found.get("images") or {}, found.get("state", STATE), found.get("task", TASK)
    state = [state] if isinstance(state, str) else state
    if not isinstance(images, dict) or not (isinstance(state, list) and state) or not isinstance(task, str):
        raise BurnishError(f"{path} holds something else than keys", shape)
    if not all(isinstance(key, str) for key in (*images, *images.values(), *state)):
        raise BurnishError(f"{path} holds something else than texts", shape)
    if images.keys() != set(policy.cameras):
        raise BurnishError(f"{path} maps {', '.join(images) or 'no images'}",
                           f"the policy's cameras: {', '.join(policy.cameras)}")  # fmt: skip
    return Keys(images, tuple(state), task)


@dataclass(frozen=True)
class Row:
    """What a policy sees for one client, n observations of it (see `Window`), oldest first.

    Args:
        images: camera of the policy to uint8 [n, H, W, 3].
        state: float32 [n, state_dim].
        task: the instruction.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    task: str


class Reader:
    """Observations of a client to rows.

    Args:
        policy: says what is needed.
        keys: where it is.
    """

    def __init__(self, policy: Policy, keys: Keys):
        self.policy, self.keys, self.steps = policy, keys, len(policy.window.observations)
        self._said: set[str] = set()

    def row(self, observation: Any, earlier: Any = ()) -> Row:
        """The row of an observation and those before it, oldest first; of too few the first is repeated.

        Raises:
            BurnishError: something is missing or does not fit.
        """
        if not isinstance(earlier, list | tuple) or len(earlier) > self.steps - 1:
            raise BurnishError("earlier observations that are no list, or too many", f"at most {self.steps - 1}")
        maps = [flat(one) for one in (*earlier, observation)]
        maps = [maps[0]] * (self.steps - len(maps)) + maps
        text = maps[-1].get(self.keys.task, "")
        if not isinstance(text, str) or len(text) > MOST_TEXT:
            raise BurnishError(f"{self.keys.task} is no text", f"at most {MOST_TEXT} characters")
        if not text and self.keys.task not in self._said:
            log.warning("no instruction in %s: the policy is told none (it has %s)", self.keys.task, _listed(maps[-1]))
            self._said.add(self.keys.task)
        images = {name: self._views(maps, name, key) for name, key in self.keys.images.items()}
        return Row(images, np.stack([self._state(one) for one in maps]), text)

    def _views(self, maps: list[dict[str, Any]], name: str, key: str) -> np.ndarray:
        views = []
        for one in maps:
            if key not in one:
                found = f"an observation without {key} (it has {_listed(one)})"
                raise BurnishError(found, f"a view for each camera of the policy ({', '.join(self.policy.cameras)})")
            views.append(channels_last(one[key], key))
        if any(view.shape != views[0].shape for view in views):
            raise BurnishError(f"views of {key} in several sizes", "one size")
        size = tuple(self.policy.view_sizes[name])
        if views[0].shape[:2] != size and key not in self._said:
            log.warning("views of %s: %s pixels, resized to %s", key, list(views[0].shape[:2]), list(size))
            self._said.add(key)
        return np.stack(views) if len(views) > 1 else views[0][None]

    def _state(self, one: dict[str, Any]) -> np.ndarray:
        if not self.policy.state_dim:
            return np.zeros(0, np.float32)
        parts = []
        for key in self.keys.state:
            value = one.get(key)
            if isinstance(value, list | int | float):  # lists of numbers, as JSON would have them
                listed = value if isinstance(value, list) else [value]
                value = np.array(listed, float) if all(type(one) in (int, float) for one in listed) else None
            if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
                raise BurnishError(f"{key} is {'missing' if value is None else 'no array of numbers'}",
                                   f"the state, {self.policy.state_dim} numbers")  # fmt: skip
            parts.append(value.astype(np.float32).ravel())
        values = np.concatenate(parts)
        if len(values) != self.policy.state_dim or not np.isfinite(values).all():
            odd = "" if np.isfinite(values).all() else ", not all of them finite,"
            raise BurnishError(f"a state of {len(values)} values{odd} in {', '.join(self.keys.state)}",
                               f"{self.policy.state_dim} finite numbers")  # fmt: skip
        return values


def flat(observation: Any, depth: int = 4) -> dict[str, Any]:
    """A map with the keys of maps in it joined by "/"; raises BurnishError for what is no map of texts."""
    if not isinstance(observation, dict) or not all(isinstance(key, str) for key in observation) or not depth:
        raise BurnishError("an observation that is no map of texts to values", "the keys of the profile")
    found: dict[str, Any] = {}
    for key, value in observation.items():
        if isinstance(value, dict):
            found |= {f"{key}/{inner}": one for inner, one in flat(value, depth - 1).items()}
        else:
            found[key] = value
    return found


def channels_last(image: Any, what: str) -> np.ndarray:
    """A picture uint8 [H, W, 3]; [3, H, W] is turned. Raises BurnishError, which names it `what`, for anything else."""
    if not isinstance(image, np.ndarray):
        raise BurnishError(f"the view {what} is no array", "uint8 [height, width, 3]")
    shape = image.shape
    turned = len(shape) == 3 and shape[2] != 3 and shape[0] == 3
    sides = shape[1:] if turned else shape[:2]
    fits = len(shape) == 3 and (turned or shape[2] == 3) and 0 < min(sides) <= max(sides) <= MOST_SIDE
    if image.dtype != np.uint8 or not fits:
        found = f"the view {what} is {image.dtype} {list(shape)}"
        raise BurnishError(found, f"uint8 [height, width, 3] of at most {MOST_SIDE} pixels")
    return image.transpose(1, 2, 0) if turned else image


def to_views(images: Sequence[np.ndarray], size: Sequence[int], device: torch.device) -> Tensor:
    """uint8 pictures [H, W, 3] as float [n, 3, *size] in [0, 1], resized where they have another size."""
    # Filled in place, as large blocks are dear to allocate; on a CPU by numpy: torch's threads would wait for a core
    # that a client may have.
    views = torch.empty(len(images), 3, *size, dtype=torch.float32, device=device)
    for view, image in zip(views, images, strict=True):
        picture = torch.from_numpy(image.transpose(2, 0, 1).copy())
        if image.shape[:2] != tuple(size):
            whole = picture.to(device)[None].float()  # a byte a value goes to the device
            picture = torch.nn.functional.interpolate(whole, tuple(size), mode="bilinear", antialias=True)[0]
            torch.div(picture.clamp_(0, 255), 255, out=view)
        elif device.type == "cpu":
            np.divide(picture.numpy(), 255, out=view.numpy(), dtype=np.float32)
        else:
            torch.div(picture.to(device), 255, out=view)
    return views


def stack(policy: Policy, rows: Sequence[Row]) -> Batch:
    """A batch of the rows, on the policy's device."""
    times = len(policy.window.observations)
    lead = (len(rows), times) if times > 1 else (len(rows),)
    batch: Batch = {TASK: [row.task for row in rows]}
    for name in policy.cameras:
        pictures = [image for row in rows for image in row.images[name]]
        views = to_views(pictures, policy.view_sizes[name], policy.device)
        batch[f"{IMAGES}{name}"] = views.reshape(*lead, *views.shape[1:])
    if policy.state_dim:
        states = torch.from_numpy(np.stack([row.state for row in rows])).to(policy.device)
        batch[STATE] = states.reshape(*lead, -1)
    return batch


def blank(policy: Policy, keys: Keys) -> dict[str, Any]:
    """An observation of black views that the keys find; what a server warms up on."""
    sizes = policy.view_sizes
    found: dict[str, Any] = {key: np.zeros((*sizes[name], 3), np.uint8) for name, key in keys.images.items()}
    parts = [max(0, policy.state_dim - len(keys.state) + 1)] + [1] * (len(keys.state) - 1)
    return found | {key: np.zeros(n, np.float32) for key, n in zip(keys.state, parts, strict=True)} | {keys.task: "go"}


def _listed(one: dict[str, Any]) -> str:
    return ", ".join(list(one)[:8])[:200] or "nothing"
