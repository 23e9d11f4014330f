"""The protocol that every simulator speaks, and the names under which tasks are asked for.

An environment id is `family`, `family:selector` or `family:selector/task`:

    tabletop:lift          one family of the own tabletop (reach, push, lift, put_on, stack)
    tabletop:reach,push    two of them;              tabletop  all five
    metaworld:reach-v3     one Meta-World task;  metaworld:mt10  all ten
    libero:spatial/3       one LIBERO task;      libero:spatial  all ten of a suite

`expand` turns an id into single-task ids; `make_env` builds one of those. Rendering is separate from stepping,
because a policy that executes chunks needs an image only when it replans.

A new family is one file of this folder that ends in `ENVS.register("name")(EnvFamily(tasks, make))`; a package from
outside names its EnvFamily under the entry points `burnish.environments`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.registry import Registry

Size = int | Sequence[int] | Mapping[str, Sequence[int]]
"""Side of square images in pixels, or their [height, width], or that of each camera by its name."""
SIDES = (8, 4096)
"""Shortest and longest side of an image that is drawn."""


@dataclass(frozen=True)
class EnvSpec:
    """What does not change from episode to episode.

    Args:
        task_id: single-task id, e.g. "libero:spatial/3".
        cameras: names of all cameras; the first is the default one.
        state_names, action_names: one name per dimension.
        action_low, action_high: [A] limits in environment units.
        fps: control steps per second.
        max_steps: episode limit in control steps.
        num_initial_states: how many fixed initial states there are; None when every integer is one.
        relative: for each action dimension whether 0 means no motion; in the others a robot that stands still repeats
            its last command, and at the start of an episode their lower limit (an open gripper). Empty: unknown.
    """

    task_id: str
    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    action_low: np.ndarray
    action_high: np.ndarray
    fps: int
    max_steps: int
    num_initial_states: int | None = None
    relative: tuple[bool, ...] = ()


@dataclass
class Observation:
    """One moment: `images` [H, W, 3] uint8 upright by camera name, `state` [D] float32, the instruction.

    `earlier` are those of the control steps before, oldest first, where they were asked for.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str
    earlier: tuple["Observation", ...] = ()


class Expert(Protocol):
    """A scripted policy with access to the simulator's state; raises StopIteration never, only acts."""

    def act(self) -> np.ndarray:
        """The next action [A] in environment units, float32."""
        ...


class Env(Protocol):
    """A simulator holding one task. The same `initial_state` and actions give the same episode, bit for bit."""

    spec: EnvSpec
    image_size: Size

    def reset(self, initial_state: int) -> None:
        """Start the episode with this initial state. Draws nothing from a global generator."""
        ...

    @property
    def instruction(self) -> str:
        """The sentence of the running episode."""
        ...

    def observe(self, cameras: Sequence[str] = ()) -> Observation:
        """State and instruction, with an image for each camera named (none named: nothing is rendered)."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """One control step with action [A]; returns whether the task is now solved."""
        ...

    def expert(self, seed: int = 0) -> Expert:
        """A scripted expert for the running episode; `seed` varies its style where it has any."""
        ...

    def ground_truth(self) -> dict[str, Any]:
        """JSON-able facts of this moment: at least {"objects": {name: {"position": [3], "quaternion": [4]}}}."""
        ...

    def geometry(self, camera: str) -> dict[str, np.ndarray]:
        """What the camera sees: depth, segmentation, and where it is.

        Returns:
            "depth" [H, W] float32 metres, "segmentation" [H, W] int32 index of the object in `ground_truth` (-1
            nothing), "points" [H, W, 3] world coordinates.
        """
        ...

    def project(self, camera: str, points: np.ndarray) -> np.ndarray:
        """Image coordinates [N, 2] (u right, v down, 0 to 1 inside the upright image) of world points [N, 3]."""
        ...

    def close(self) -> None:
        """Free what the simulator holds."""
        ...


@runtime_checkable
class InstructionSwap(Protocol):
    """Offered by an environment that can name another object than the one that success is judged on."""

    def alternative_instruction(self, seed: int) -> str:
        """The sentence that asks for the same task with another object of the running scene."""
        ...

    def set_instruction(self, text: str) -> None:
        """Change only what `instruction` says, until the next `reset`."""
        ...

    def other_success(self) -> bool:
        """Whether the task of the last `alternative_instruction` is solved now."""
        ...


@runtime_checkable
class RandomObject(Protocol):
    """Offered by an environment whose expert can pick its object at random: what ignoring language reaches."""

    def random_object_expert(self, seed: int) -> Expert:
        """An expert that moves one of the objects, drawn by `seed`, as if it had been named."""
        ...


FAILURES = ("did nothing", "wrong object", "dropped", "out of time")


@runtime_checkable
class FailureKind(Protocol):
    """Offered by an environment whose state tells why an episode is not solved."""

    def failure(self) -> str:
        """One of `FAILURES`: no object moved; another than the one in question was taken; that one was raised and has
        come down again; anything else that did not get there in time."""
        ...


class MissingExpert(Expert, Protocol):
    """An expert that fails on purpose; `done` once there is nothing left to show."""

    @property
    def done(self) -> bool: ...


@runtime_checkable
class Missing(Protocol):
    """Offered by an environment with an expert that grasps beside its object: what a policy should not have learnt."""

    def missing_expert(self, seed: int) -> MissingExpert:
        """Raises BurnishError where nothing is grasped."""
        ...


@dataclass(frozen=True)
class EnvFamily:
    """How the tasks of a family are listed and built.

    Args:
        tasks: the single-task selectors that a selector stands for, in a fixed order; BurnishError for an unknown one.
        make: builds the environment of a single-task selector, with images of the given size.
        rectangles: whether `make` takes every `Size`; otherwise it is only ever asked for squares, by their side.
    """

    tasks: Callable[[str], list[str]]
    make: Callable[[str, Any], Env]
    rectangles: bool = False


ENVS: Registry[EnvFamily] = Registry("environment", room="burnish.envs")


def _family(env_id: str) -> tuple[EnvFamily, str, str]:
    name, _, selector = env_id.partition(":")
    if not name:
        raise BurnishError(f"empty environment id '{env_id}'", "something like tabletop:lift")
    return ENVS.get(name), name, selector


def expand(env_id: str) -> list[str]:
    """All single-task ids that `env_id` stands for, each once, in a fixed order."""
    family, name, selector = _family(env_id)
    return list(dict.fromkeys(f"{name}:{task}" for task in family.tasks(selector)))


def make_env(task_id: str, image_size: Size = 128) -> Env:
    """Build the environment of a single-task id (`task_id`, see `expand`), with images of `image_size`, see `Size`.

    Raises:
        BurnishError: no such task, a size that it cannot draw, or a simulator that is not installed.
    """
    family, _, selector = _family(task_id)
    return family.make(selector, image_size)


def offers_swap(env_id: str) -> bool:
    """Whether every task of `env_id` is an `InstructionSwap`; simulators are built to find out."""
    for task_id in expand(env_id):
        env = make_env(task_id)
        env.close()
        if not isinstance(env, InstructionSwap):
            return False
    return True


def view_size(size: Size, camera: str) -> tuple[int, int]:
    """(height, width) of a camera's images; of one that a mapping leaves out, those of its first."""
    if isinstance(size, Mapping):
        size = size.get(camera) or next(iter(size.values()))
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def by_name(size: Size, names: Mapping[str, str]) -> Size:
    """`size` with cameras under other names (say, the simulator's); cameras that `names` lacks are left out."""
    if not isinstance(size, Mapping):
        return size
    return {names[camera]: sides for camera, sides in size.items() if camera in names}


def check_size(env_id: str, size: Size) -> None:
    """Raise BurnishError where the environments of `env_id` cannot draw images of this size."""
    family, name, _ = _family(env_id)
    for camera in size if isinstance(size, Mapping) else ("",):
        height, width = view_size(size, camera)
        shown = f"images of {height}x{width}" + (f" for camera {camera}" if camera else "")
        if not all(SIDES[0] <= side <= SIDES[1] for side in (height, width)):
            raise BurnishError(shown, f"sides of {SIDES[0]} to {SIDES[1]} pixels", "--image-size 256")
        if not family.rectangles and not isinstance(size, int):
            raise BurnishError(f"{shown} from {name}, which draws one square size", "square images",
                               f"--image-size {max(height, width)}")  # fmt: skip
