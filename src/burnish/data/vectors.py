"""Vectors of a data set's frames: one for each view, from a named encoder, computed once and kept beside the data.

    <folder>/vectors.npy   [N, V, D], float16 as an encoder gives them, float32 of length 1 in an index
    <folder>/frames.npy    [N] of FRAME: row, episode, time (frame in it), task, length of the episode
    <folder>/meta.json     what they depend on, shapes, digests

An encoder is named in one word: `pixels` (the picture itself, 16 x 16), `folder:PATH` (a transformers vision folder),
`tower:POLICY` (a policy's vision tower) or `backbone:POLICY` (the states of its language model at the image tokens).
The last one and `folder` take a layer after an @, `backbone:small@3`; by default the middle and the last one.
"""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.files import alone, new_folder, require_space, sampled_digest, write_json
from burnish.core.outputs import mark, require_own
from burnish.core.progress import progress_bar
from burnish.core.reading import read_object, regular_file
from burnish.data.augment import to_float
from burnish.data.checks import colour_cameras
from burnish.data.dataset import Dataset, look, open_named
from burnish.data.features import IMAGES
from burnish.data.frames import dataset_hash, open_frames
from burnish.policies.base import Policy, require
from burnish.policies.load import choose_device, policy_and_hash
from burnish.teachers.base import Views, fingerprint, make_teacher, run_teacher

KIND, META, VALUES, FRAMES = "vectors", "meta.json", "vectors.npy", "frames.npy"
FORMAT = 1
KINDS = ("pixels", "folder", "tower", "backbone")
FRAME = np.dtype([(name, "<i8") for name in ("row", "episode", "time", "task", "length")])
BATCH = 64
SIDE = 256
"""Longest edge of the pictures that a vision folder gets."""
GRID = 16
"""Cells along each edge of `pixels`."""
QUESTION = "what is there?"
"""What a backbone is asked about every picture, so that no instruction gives the task away."""
REMEDY = "burnish data index --help"


@dataclass(frozen=True)
class Encoder:
    """What makes a vector of a picture.

    Args:
        spec: its name, see the head of this file.
        identity: what its vectors depend on, JSON-able: kind, hash of the weights, layer.
        side: longest edge of the pictures that it looks at; 0 takes them as they are.
        encode: float [B, 3, H, W] in [0, 1] to float [B, D].
    """

    spec: str
    identity: dict[str, Any]
    side: int
    encode: Callable[[Tensor], Tensor]
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to float32 [B, D]; BurnishError where a value is not finite."""
        found = self.encode(to_float(torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device))).float()
        if not bool(torch.isfinite(found).all()):
            raise BurnishError(f"the encoder {self.spec} gives values that are not finite", "other weights")
        return found.cpu().numpy()


def make_encoder(spec: str, device: str = "", own: tuple[Policy, str] | None = None) -> Encoder:
    """The encoder of that name, see the head of this file.

    Args:
        own: a policy and its hash in place of the one that the name says.
    """
    kind, _, rest = spec.partition(":")
    path, _, layer = rest.rpartition("@") if rest.rpartition("@")[2].isdigit() else (rest, "", "")
    if kind not in KINDS or (kind == "pixels") == bool(rest):
        raise BurnishError(f"encoder {spec[:100]!r}", "pixels, folder:PATH, tower:POLICY or backbone:POLICY", REMEDY)
    place = choose_device(device)
    if kind == "pixels":
        about = {"kind": kind, "grid": GRID}
        return Encoder(spec, about, 64, lambda x: F.adaptive_avg_pool2d(x, GRID).flatten(1), place)
    if kind == "folder":
        teacher = make_teacher({"name": "folder", "path": path}, (1, 1)).to(place)
        at = _layer(layer, len(teacher.widths), len(teacher.widths) - 1, spec)

        def patches(images: Tensor) -> Tensor:
            views = Views(images[:, None], torch.ones(len(images), 1, dtype=torch.bool), ("view",))
            return run_teacher(teacher, views, [at])[at][:, 0].mean((1, 2))

        return Encoder(spec, {"kind": kind, **teacher.identity, "layer": at}, SIDE, patches, place)
    policy, weights = own or policy_and_hash(path, place)
    require(policy.eval(), "language", f"the encoder {kind}")
    identity = {"kind": kind, "weights": weights}
    if kind == "tower":
        return Encoder(spec, identity, policy.input_size, lambda x: policy.view_tokens(x).mean(1), place)
    at = _layer(layer, policy.num_layers, policy.num_layers // 2, spec)
    return Encoder(spec, identity | {"layer": at}, policy.input_size, lambda x: _states(policy, x, at), place)


def _layer(text: str, count: int, default: int, spec: str) -> int:
    found = int(text) if text else default
    if not 0 <= found < count:
        raise BurnishError(f"encoder {spec}: layer {found}", f"one from 0 to {count - 1}")
    return found


def _states(policy: Policy, images: Tensor, layer: int) -> Tensor:
    """Mean state of the image tokens at a layer, each picture by itself: beside others it would know their views."""
    batch = {
        f"{IMAGES}{policy.cameras[0]}": images, "question": [QUESTION] * len(images), "answer": ["yes"] * len(images),
    }  # fmt: skip
    with policy.capture([layer]) as captured:
        policy.language(batch, through="prefix")
    states, seen = captured.hidden[layer].float(), captured.layout["image"][..., None]
    return (states * seen).sum(1) / seen.sum(1)


@dataclass(frozen=True)
class Vectors:
    """Vectors of N frames and V views.

    Args:
        values: [N, V, D].
        frames: [N] of FRAME.
        about: encoder (identity), spec, head ("" or its hash), data (hash), root, cameras, every, instructions.
    """

    values: np.ndarray
    frames: np.ndarray
    about: dict[str, Any]

    def instruction(self, task: int) -> str:
        return str(self.about["instructions"].get(str(int(task)), ""))

    def require_of(self, data: Dataset, folder: Path) -> None:
        """BurnishError unless the vectors of that folder are of the data set as it is now."""
        seen = {key.removeprefix(IMAGES) for key in data.camera_keys} >= {*self.about["cameras"]}
        if self.about["data"] != dataset_hash(data.root) or self.frames["row"].max() >= len(data.rows) or not seen:
            raise BurnishError(f"{folder} is no index of {data.root} as it is now", "one of this data set", REMEDY)

    def of(self, keep: np.ndarray) -> "Vectors":
        """Some of the frames."""
        return Vectors(self.values[keep], self.frames[keep], self.about)

    def save(self, folder: Path) -> None:
        """Write the folder, whole or not at all; BurnishError where it holds something else."""
        require_own(folder, KIND)
        require_space(folder.absolute().parent, self.values.nbytes, f"vectors in {folder}")
        with new_folder(folder) as made:
            mark(made, KIND)
            np.save(made / VALUES, self.values, allow_pickle=False)
            np.save(made / FRAMES, self.frames.astype(FRAME), allow_pickle=False)
            digests = {name: sampled_digest(made / name) for name in (VALUES, FRAMES)}
            write_json(made / META, {**self.about, "format": FORMAT, "digests": digests})


def load_vectors(folder: Path) -> Vectors:
    """Open a folder of vectors, memory-mapped."""
    folder = Path(folder)
    if not (folder / META).is_file():
        raise BurnishError(f"no vectors in {folder}", f"a folder with {META}", REMEDY)
    about = read_object(folder / META, folder)
    kinds = {"encoder": dict, "spec": str, "head": str, "data": str, "root": str, "cameras": list, "every": int,
             "instructions": dict, "digests": dict}  # fmt: skip
    again = ("whole vectors", f"rm -r {shlex.quote(str(folder))}, and make them again")
    lacking = [key for key, kind in kinds.items() if not isinstance(about.get(key), kind)]
    if about.get("format") != FORMAT or lacking or about["every"] < 1 or {*map(type, about["cameras"])} != {str}:
        raise BurnishError(f"{folder / META} describes no vectors of format {FORMAT}", *again)
    found = {}
    for name in (VALUES, FRAMES):
        path = regular_file(folder / name, folder)
        if sampled_digest(path) != about["digests"].get(name):
            raise BurnishError(f"{path} is not the file that was written there", *again)
        try:
            found[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, OverflowError) as error:
            raise BurnishError(f"{path} is damaged ({error})", *again) from error
    values, frames = found[VALUES], found[FRAMES]
    fits = values.ndim == 3 and values.dtype in (np.float16, np.float32) and values.shape[1] == len(about["cameras"])
    if not fits or frames.shape != (len(values),) or frames.dtype != FRAME or not values.size:
        raise BurnishError(f"{folder} holds arrays of shape {values.shape} and {frames.shape}", *again)
    if not all(np.isfinite(values[i : i + 4096]).all() for i in range(0, len(values), 4096)):
        raise BurnishError(f"{folder} holds vectors that are not finite", *again)
    return Vectors(values, np.asarray(frames), about)


def encode_dataset(
    root: Path | str, encoder: Encoder, *, cameras: Sequence[str] = (), every: int = 1,
    progress: bool = True,
) -> Vectors:  # fmt: skip
    """The vectors of a data set, from `<root>/.vectors` where they have been computed before.

    Args:
        cameras: names or keys; none means all that show colours.
        every: of each episode the frames 0, every, 2 every, ...
    """
    root = Path(root)
    data = open_named(root)
    keys = [key if key in data.camera_keys else IMAGES + key for key in cameras] or colour_cameras(data)
    if not keys:
        raise BurnishError(f"{root} has no camera that shows colours", f"a feature {IMAGES}<camera>", look(root))
    opened = open_frames(root, keys, progress=progress, meta=data, seen=encoder.side)
    rows = data.rows
    chosen = np.flatnonzero(rows.keys["frame_index"] % every == 0)
    about = {
        "encoder": encoder.identity, "spec": encoder.spec, "head": "", "data": opened.hash, "root": str(root),
        "cameras": [key.removeprefix(IMAGES) for key in keys], "every": every,
        "instructions": {str(task): data.instruction(task) for task in data.tasks},
    }  # fmt: skip
    key = fingerprint([FORMAT, *(about[name] for name in ("encoder", "data", "cameras", "every"))])
    folder = root / ".vectors" / f"{encoder.identity['kind']}-{key}"
    if folder.parent.is_symlink() or not os.access(folder.parent if folder.parent.exists() else root, os.W_OK):
        raise BurnishError(f"{folder.parent} may not be written, or is a link", "a data set that can keep vectors",
                           f"cp -r {shlex.quote(str(root))} data/copy")  # fmt: skip
    if not folder.exists():
        with alone(folder.parent):
            if not folder.exists():
                lengths = np.repeat(rows.counts, rows.counts)
                named = [rows.keys[name] for name in ("episode_index", "frame_index", "task_index")]
                table = np.rec.fromarrays([np.arange(len(rows)), *named, lengths], dtype=FRAME)[chosen]
                arrays = [opened.arrays[key] for key in keys]
                Vectors(_encode(encoder, arrays, chosen, progress), table, about).save(folder)
    found = load_vectors(folder)
    return Vectors(found.values, found.frames, about)


def _encode(encoder: Encoder, arrays: Sequence[Any], rows: np.ndarray, progress: bool) -> np.ndarray:
    """float16 [N, V, D]"""
    blocks = []
    bar = progress_bar(total=len(rows), desc=f"vectors of {encoder.spec}", unit="frame", shown=progress)
    with bar:
        for first in range(0, len(rows), BATCH):
            some = rows[first : first + BATCH]
            blocks.append(np.stack([encoder(array[some]) for array in arrays], 1))
            bar.update(len(some))
            if not np.isfinite(blocks[-1].astype(np.float16)).all():
                raise BurnishError(f"vectors of {encoder.spec} exceed half precision", "values below 65504")
            blocks[-1] = blocks[-1].astype(np.float16)
    return np.concatenate(blocks)


def show(about: dict[str, Any] | str) -> str:
    """An encoder's identity, or a head's hash, in a few words."""
    if isinstance(about, str):
        return about[:16] or "none"
    return ", ".join(f"{key} {str(value)[:40]}" for key, value in about.items())
