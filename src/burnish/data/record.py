"""One demonstration: an expert acts, each frame is kept before its action, the video is encoded once.

Imports neither torch nor LeRobot, so that a simulator process starts quickly.
"""

import io
import json
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import av
import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.core.seeding import derive_seed
from burnish.data.spool import Recording, recording_path, write_recording
from burnish.envs.base import Env, Expert, Missing, MissingExpert, make_env

# h264 without B-frames, a key frame every second frame as LeRobot has it. Colour at full resolution (yuv444p):
# halving it, as yuv420p does, costs 5 dB on 128 px views, where objects are a few pixels wide.
CODEC, PIXEL_FORMAT = "libx264", "yuv444p"
ENCODER = {"preset": "ultrafast", "crf": "18", "g": "2", "bf": "0"}


def encode_video(frames: np.ndarray, fps: int) -> bytes:
    """An mp4 of `frames` [T, H, W, 3] uint8; the same bytes for the same frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(CODEC, rate=fps, options=ENCODER)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = PIXEL_FORMAT
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def colour_histogram(frames: np.ndarray) -> np.ndarray:
    """How often each channel takes each value: [3, 256] int64 of `frames` [T, H, W, 3] uint8."""
    return np.stack([np.bincount(frames[..., channel].ravel(), minlength=256) for channel in range(3)])


class Tape:
    """Keeps an episode frame by frame: what was seen before each action, and the action.

    Args:
        env: just reset.
        initial_state: only noted down.
        cameras: views to keep.
        geometry: also keep depth and object masks of these views.
    """

    def __init__(self, env: Env, initial_state: int, cameras: tuple[str, ...], geometry: bool = False):
        self._env, self._initial_state, self._cameras, self._geometry = env, initial_state, cameras, geometry
        self._states: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []
        self._facts: list[dict[str, Any]] = []
        self._views: dict[str, list[np.ndarray]] = {}

    def note(self, action: np.ndarray) -> None:
        """Keep this moment; call before the environment takes `action`."""
        env = self._env
        observation = env.observe(self._cameras)
        self._states.append(observation.state)
        self._actions.append(np.asarray(action, np.float32))
        self._facts.append({"frame": len(self._facts), **env.ground_truth()})
        for camera in self._cameras:
            self._views.setdefault(f"images.{camera}", []).append(observation.images[camera])
            if self._geometry:
                seen = env.geometry(camera)
                self._views.setdefault(f"depth.{camera}", []).append(seen["depth"].astype(np.float16))
                self._views.setdefault(f"segmentation.{camera}", []).append(seen["segmentation"].astype(np.int16))

    def recording(self, solved: bool, keep_failed: bool = False) -> Recording:
        """All arrays of `Recording`; none of an episode that was not solved, unless `keep_failed`."""
        env = self._env
        facts = {
            "task_id": env.spec.task_id, "instruction": env.instruction, "initial_state": self._initial_state,
            "success": solved, "length": len(self._actions),
        }  # fmt: skip
        if not solved and not keep_failed:
            return Recording(facts)
        arrays = {"state": np.stack(self._states).astype(np.float32), "action": np.stack(self._actions)}
        lines = "".join(json.dumps(frame, separators=(",", ":")) + "\n" for frame in self._facts)
        arrays["ground_truth"] = np.frombuffer(lines.encode(), np.uint8)
        for name, frames in self._views.items():
            kind, _, camera = name.partition(".")
            if kind == "images":
                images = np.stack(frames)
                arrays[f"video.{camera}"] = np.frombuffer(encode_video(images, env.spec.fps), np.uint8)
                arrays[f"histogram.{camera}"] = colour_histogram(images)
            else:
                arrays[name] = np.stack(frames)
        return Recording(facts, arrays)


def record(
    env: Env, expert: Expert, initial_state: int, cameras: tuple[str, ...], geometry: bool, misses: bool = False
) -> Recording:
    """Let `expert` act in the episode that `env` has just been reset to, until it is solved or out of steps.

    Args:
        misses: `expert` is one that misses; it acts until it has.

    Returns:
        All arrays of `Recording` where the task was solved, or `misses`; none otherwise.
    """
    tape, solved = Tape(env, initial_state, cameras, geometry), False
    for _ in range(env.spec.max_steps):
        action = np.asarray(expert.act(), np.float32)
        tape.note(action)
        solved = env.step(action)
        if solved or misses and cast(MissingExpert, expert).done:
            break
    recording = tape.recording(solved, keep_failed=misses)
    if misses:
        recording.facts["misses"] = True
    return recording


def _expert(env: Env, initial_state: int, misses: bool) -> Expert:
    if not misses:
        return env.expert(initial_state)
    if not isinstance(env, Missing):
        raise BurnishError(f"{env.spec.task_id} has no expert that misses", "tabletop:lift")
    return env.missing_expert(initial_state)


def _open(task_id: str, folder: Path, request: dict[str, Any]) -> tuple[Env, tuple[str, ...]]:
    """The environment of a task and the cameras to record, with a note of both in `folder`."""
    env = make_env(task_id, request["image_size"])
    spec, wanted = env.spec, tuple(request["cameras"])
    unknown = [camera for camera in wanted if camera not in spec.cameras]
    if unknown:
        raise BurnishError(f"unknown camera '{unknown[0]}' of {task_id}", f"of {', '.join(spec.cameras)}")
    cameras = wanted or spec.cameras[:1]
    facts = {
        "fps": spec.fps, "state_names": list(spec.state_names), "action_names": list(spec.action_names),
        "cameras": list(cameras), "max_steps": spec.max_steps,
    }  # fmt: skip
    write_json(folder / "spec.json", facts)
    return env, cameras


def record_attempts(
    tasks: Iterable[tuple[str, int, Path]], request: dict[str, Any]
) -> Generator[tuple[bool, str], None, None]:
    """The worker of `make_demos`: records attempt `number` of a task into `folder`, for each (task, number, folder).

    Where an environment has fixed initial states, these are for evaluation, and demonstrations start after them.

    Yields:
        (True, "") or (False, "") for a solved or failed attempt, (False, reason) where there is no expert.
    """
    with ExitStack() as opened:
        present = ""
        for task_id, number, folder in tasks:
            if task_id != present:
                opened.close()
                env, cameras = _open(task_id, folder, request)
                opened.callback(env.close)
                present = task_id
            initial_state = (env.spec.num_initial_states or 0) + request["seed"] + number
            env.reset(initial_state)
            misses = derive_seed("miss", initial_state) % 1000 < 1000 * request["misses"]
            try:
                expert = _expert(env, initial_state, misses)
            except BurnishError as error:
                yield False, str(error)
                continue
            recording = record(env, expert, initial_state, cameras, request["geometry"], misses)
            success = bool(recording.facts["success"]) != misses  # one that lifts after all is not what was asked for
            write_recording(recording_path(folder, number, success), recording)
            yield success, ""
