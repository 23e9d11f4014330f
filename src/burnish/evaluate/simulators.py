"""Simulator processes: each holds a few episodes, executes whole chunks and renders only when asked to replan.

Imports no torch, so that a process starts quickly.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from PIL import Image

from burnish.core.errors import BurnishError
from burnish.core.files import new_file
from burnish.core.workers import Engine, WorkerPool
from burnish.data.record import Tape
from burnish.data.spool import write_recording
from burnish.envs.base import Env, EnvSpec, Expert, FailureKind, InstructionSwap, Observation, RandomObject, Size

MakeEnv = Callable[[str, Any], Env]
FILM_HEIGHT = 256
"""Higher views are filmed at a fraction of their size: the frames of an episode are held in memory."""


@dataclass(frozen=True)
class Episode:
    """What a simulator process needs to know to run one episode.

    Args:
        max_steps: limit in control steps.
        cameras: rendered whenever the policy replans.
        actor: "policy" (chunks come from outside), "expert" or "random_object".
        actor_seed: seed of the expert, or of the choice of the other object in an instruction swap.
        swap: name another object in the instruction.
        history: observations of as many control steps before come with each that is asked for.
        video: path of the mp4 to write, rendered at every control step; a film strip is put beside it.
        record: path of the recording to write (burnish.data.spool), with `cameras` rendered at every control step;
            ".solved" or ".failed" is put before its last suffix.
    """

    task: str
    initial_state: int
    max_steps: int
    cameras: tuple[str, ...] = ()
    actor: str = "policy"
    actor_seed: int = 0
    swap: bool = False
    history: int = 0
    video: Path | None = None
    record: Path | None = None

    def __str__(self) -> str:
        return f"{self.task}, initial state {self.initial_state}"


@dataclass(frozen=True)
class Waiting:
    """The episode of `slot` needs its next chunk for this observation."""

    slot: int
    observation: Observation


@dataclass(frozen=True)
class Finished:
    """The episode of `slot` is over."""

    slot: int
    success: bool
    steps: int
    instruction: str
    other_success: bool | None
    failure: str = ""


@dataclass(frozen=True)
class Lost:
    """The episode of `slot` went down with its simulator process; the slot is free for its repetition."""

    slot: int


@dataclass
class _Running:
    """One episode in progress inside a simulator process."""

    env: Env
    episode: Episode
    expert: Expert | None = None
    instruction: str = ""
    steps: int = 0
    success: bool = False
    other_success: bool | None = None
    frames: list[np.ndarray] = field(default_factory=list)
    tape: Tape | None = None
    seen: deque[Observation] = field(default_factory=deque)

    def begin(self) -> None:
        env, episode = self.env, self.episode
        self.seen = deque(maxlen=episode.history)
        env.reset(episode.initial_state)
        if episode.swap:
            if not isinstance(env, InstructionSwap):
                raise BurnishError(f"{episode.task} offers no instruction swap", "for instance tabletop:lift")
            env.set_instruction(env.alternative_instruction(episode.actor_seed))
            self.other_success = False
        if episode.actor != "policy":
            self.expert = _expert(env, episode.actor, episode.actor_seed)
        self.instruction = env.instruction
        if episode.record is not None:
            self.tape = Tape(env, episode.initial_state, episode.cameras)
        self._film()

    @property
    def over(self) -> bool:
        return self.success or bool(self.other_success) or self.steps >= self.episode.max_steps

    def execute(self, actions: np.ndarray) -> None:
        """Take the chunk [T, A] step by step; whatever is left when the episode ends is dropped."""
        for left, action in zip(range(len(actions), 0, -1), actions, strict=True):
            if left <= self.episode.history and not self.over:
                self.seen.append(self.env.observe(self.episode.cameras))
            if not self.over:
                self.step(action)

    def observe(self) -> Observation:
        """The present moment and those before it; before the start the first one stands for them."""
        now, missing = self.env.observe(self.episode.cameras), self.episode.history - len(self.seen)
        if self.episode.history:
            first = self.seen[0] if self.seen else now
            now = replace(now, earlier=(*[first] * missing, *self.seen))
        return now

    def step(self, action: np.ndarray) -> None:
        if self.tape is not None:
            self.tape.note(action)
        self.success = bool(self.env.step(action))
        self.steps += 1
        if self.episode.swap:
            self.other_success = bool(cast(InstructionSwap, self.env).other_success())
        self._film()

    def finish_with_expert(self) -> None:
        while not self.over:
            self.step(self.expert.act())

    def _film(self) -> None:
        if self.episode.video is not None:
            images = self.env.observe(self.episode.cameras).images
            self.frames.append(_side_by_side([images[camera] for camera in self.episode.cameras]))

    def end(self, slot: int) -> Finished:
        if self.episode.video is not None:
            write_video(self.episode.video, self.frames, self.env.spec.fps)
            write_film_strip(self.episode.video.with_suffix(".png"), self.frames)
        if self.tape is not None and self.episode.record is not None:
            path = self.episode.record
            outcome = ".solved" if self.success else ".failed"
            write_recording(path.with_suffix(outcome + path.suffix), self.tape.recording(self.success, True))
        told = not self.success and not self.episode.swap and isinstance(self.env, FailureKind)
        failure = cast(FailureKind, self.env).failure() if told else ""
        return Finished(slot, self.success, self.steps, self.instruction, self.other_success, failure)


def _expert(env: Env, actor: str, seed: int) -> Expert:
    if actor == "expert":
        return env.expert(seed)
    if not isinstance(env, RandomObject):
        raise BurnishError(f"{env.spec.task_id} offers no expert that picks its object at random")
    return env.random_object_expert(seed)


def _side_by_side(images: list[np.ndarray]) -> np.ndarray:
    """One frame of a film; the views of a wide robot are thinned and padded to one height."""
    small = [image[:: (s := -(-len(image) // FILM_HEIGHT)), ::s] for image in images]
    height = max(map(len, small))
    return np.concatenate([np.pad(one, ((0, height - len(one)), (0, 0), (0, 0))) for one in small], axis=1)


class _Simulators:
    """What one process holds. Simulators are kept and reused for later episodes of their task."""

    def __init__(self, make: MakeEnv, image_size: Size):
        self.make, self.image_size = make, image_size
        self.running: dict[int, _Running] = {}
        self.idle: list[Env] = []

    def take_env(self, task: str) -> Env:
        """An idle simulator of this task, or a new one in the place of the idle one of another task."""
        for i, env in enumerate(self.idle):
            if env.spec.task_id == task:
                return self.idle.pop(i)
        while self.idle:
            self.idle.pop().close()
        return self.make(task, self.image_size)

    def describe(self, task: str, actor: str, first_state: int) -> tuple[EnvSpec, str]:
        """What the task offers, and why `actor` cannot act in it (empty where it can)."""
        env, reason = self.take_env(task), ""
        self.idle.append(env)
        if actor != "policy":
            env.reset(first_state if env.spec.num_initial_states is None else 0)
            try:
                _expert(env, actor, 0)
            except BurnishError as error:
                reason = str(error)
        return env.spec, reason

    def start(self, slot: int, episode: Episode) -> Waiting | Finished:
        run = self.running[slot] = _Running(self.take_env(episode.task), episode)
        run.begin()
        if run.expert is not None:
            run.finish_with_expert()
        return self.reply(slot)

    def act(self, slot: int, actions: np.ndarray) -> Waiting | Finished:
        self.running[slot].execute(actions)
        return self.reply(slot)

    def finish(self, slot: int) -> Waiting | Finished:
        run = self.running[slot]
        run.expert = run.env.expert(run.episode.actor_seed)
        run.finish_with_expert()
        return self.reply(slot)

    def reply(self, slot: int) -> Waiting | Finished:
        run = self.running[slot]
        if not run.over:
            return Waiting(slot, run.observe())
        del self.running[slot]
        self.idle.append(run.env)
        return run.end(slot)

    def close(self) -> None:
        for env in [*self.idle, *(run.env for run in self.running.values())]:
            env.close()


def run_episodes(
    commands: Iterable[tuple], make: MakeEnv, image_size: Size
) -> Generator[tuple[EnvSpec, str] | Waiting | Finished, None, None]:
    """The worker of a `SimulatorPool`: a command is (describe, start, act or finish, *its arguments)."""
    with closing(_Simulators(make, image_size)) as held:
        known = {"describe": held.describe, "start": held.start, "act": held.act, "finish": held.finish}
        for name, *arguments in commands:
            yield known[name](*arguments)


class SimulatorPool(WorkerPool):
    """Simulator processes behind numbered slots; slot s lives in process s modulo their number.

    Args:
        make: builds a simulator from a single-task id and an image size; must be importable by name.
        engine: where they run; processes of this machine by default.

    Attributes:
        unable: tasks in which the actor asked about cannot act, and why; known after `describe`.
    """

    def __init__(self, workers: int, make: MakeEnv, image_size: Size, engine: Engine | None = None):
        fix = "the same command again, which continues after the finished episodes"
        names = {"name": "simulator process", "fix": fix}
        super().__init__(run_episodes, make, image_size, count=workers, engine=engine, **names)
        self._episodes: dict[int, Episode] = {}
        self._lost: list[Lost] = []
        self.unable: dict[str, str] = {}

    def describe(self, tasks: Iterable[str], actor: str = "policy", first_state: int = 0) -> list[EnvSpec]:
        """Specs of single-task ids, asked of all processes at once. Only before the first `start`."""
        tasks = list(tasks)
        for i, task in enumerate(tasks):
            self.send(i % len(self), ("describe", task, actor, first_state), task)
        specs: dict[str, EnvSpec] = {}
        while len(self.idle()) < len(self):
            for _, (_, task, *_), (spec, reason) in self.receive():
                specs[task] = spec
                self.unable |= {spec.task_id: reason} if reason else {}
        return [specs[task] for task in tasks]

    def start(self, slot: int, episode: Episode) -> None:
        """Begin an episode in a free slot."""
        self._episodes[slot] = episode
        self._send("start", slot, episode)

    def act(self, slot: int, actions: np.ndarray) -> None:
        """Hand the waiting episode of `slot` its next actions [T, A]."""
        self._send("act", slot, actions)

    def finish(self, slot: int) -> None:
        """Let the environment's expert complete the waiting episode of `slot`."""
        self._send("finish", slot)

    def poll(self) -> list[Waiting | Finished | Lost]:
        """Wait for at least one reply and return all that are there."""
        replies = [reply for _, _, reply in self.receive()]
        for reply in replies:
            if isinstance(reply, Finished):
                del self._episodes[reply.slot]
        lost, self._lost = self._lost, []
        return [*replies, *lost]

    def lost(self, number: int, tasks: list[tuple[Any, str]]) -> None:
        """The episodes of a dead process are gone from their start on, those included that waited for actions."""
        super().lost(number, [(task, label) for task, label in tasks if task[0] == "describe"])
        self._lost += [Lost(slot) for slot in self._episodes if slot % len(self) == number]

    def _send(self, command: str, slot: int, *arguments: Any) -> None:
        self.send(slot % len(self), (command, slot, *arguments), str(self._episodes[slot]))


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int) -> None:
    """Write frames [H, W, 3] uint8 as H.264 mp4; an odd side loses its last row or column."""
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    with new_file(path) as temporary, av.open(str(temporary.absolute()), "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "20", "preset": "fast"}
        for frame in frames:
            image = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_film_strip(path: Path, frames: Sequence[np.ndarray], count: int = 6) -> None:
    """Write `count` moments from first to last side by side as PNG."""
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    strip = np.concatenate([frames[i] for i in chosen], axis=1)
    with new_file(path) as temporary:
        Image.fromarray(strip).save(temporary, format="PNG")
