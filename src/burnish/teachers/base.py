"""What a teacher is: a frozen network (or the simulator itself) with features on a token grid at several layers."""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.core.registry import Registry


@dataclass
class Views:
    """What a teacher may look at, for B moments and V cameras.

    Args:
        images: float [B, V, 3, H, W] in [0, 1], padded as the policy pads them (see teachers.placing).
        present: bool [B, V]; features of an absent camera are never used.
        cameras: names of the V cameras.
        depth: float [B, V, H, W] metres along the optical axis; only for teachers with `needs_geometry`.
        points: float [B, V, H, W, 3] world coordinates in metres, likewise.
    """

    images: Tensor
    present: Tensor
    cameras: tuple[str, ...]
    depth: Tensor | None = None
    points: Tensor | None = None

    def to(self, device: torch.device | str) -> "Views":
        """All tensors on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def moments(self, start: int, stop: int) -> "Views":
        """The moments from `start` to before `stop`."""
        return self._each(lambda tensor: tensor[start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Views":
        held = {f: getattr(self, f) for f in ("images", "present", "depth", "points")}
        return replace(self, **{f: change(tensor) for f, tensor in held.items() if tensor is not None})


class Teacher(nn.Module):
    """Base class. A new teacher is one file that registers itself: it sets the attributes and writes `features`.

    A package from outside names its class under the entry points `burnish.teachers`; a recipe may also say
    `teacher: {name: "package.module:Class"}`. docs/methods/align.md has an example.

    Attributes:
        widths: D of each layer that it offers, shallow to deep.
        needs_geometry: whether `features` reads depth and points.
        standardise: whether features are centred at each place of a view and scaled by dimension before they are
            aligned, so that the cosine is about what differs from scene to scene.
        identity: whatever its features depend on (options, hash of the weights), JSON-able; the cache is keyed by it.
        moments: moments that `features` gets at a time, so that outputs which nobody keeps fit into memory; 0 means any
            number.
    """

    widths: Sequence[int]
    moments: int = 0
    needs_geometry: bool = False
    standardise: bool = False
    identity: dict[str, Any]

    def features(self, views: Views, layers: Sequence[int]) -> dict[int, Tensor]:
        """{layer: [B, V, H, W, D]} for the layers asked for; called without gradient, in evaluation mode."""
        raise NotImplementedError


TEACHERS: Registry[type[Teacher]] = Registry("teacher", room="burnish.teachers", by_path=True)


def make_teacher(spec: dict[str, Any], grid: tuple[int, int]) -> Teacher:
    """Build a frozen teacher.

    Args:
        spec: {name: <registered name or package.module:Class>, ...its options}.
        grid: the student's token grid; teachers whose own grid can be chosen take it where their options name none.

    Raises:
        BurnishError: unknown name or options.
    """
    options = dict(spec)
    name = options.pop("name", "")
    if not isinstance(name, str):
        raise BurnishError(f"teacher {name!r}", "{name: geometry, ...its options}")
    kind = TEACHERS.get(name)
    if not (isinstance(kind, type) and issubclass(kind, Teacher)):
        raise BurnishError(f"'{name}' is no teacher", "a subclass of burnish.teachers.base.Teacher")
    if "grid" in inspect.signature(kind).parameters:
        options.setdefault("grid", list(grid))
    try:
        teacher = kind(**options)
    except (TypeError, ValueError) as error:
        raise BurnishError(f"teacher '{name}' does not take these options ({error})",
                           "the options of its page") from error  # fmt: skip
    for attribute in ("widths", "identity"):
        if getattr(teacher, attribute, None) is None:
            raise BurnishError(f"teacher '{name}' sets no {attribute}", f"self.{attribute} in __init__")
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def run_teacher(teacher: Teacher, views: Views, layers: Sequence[int]) -> dict[int, Tensor]:
    """Features of the layers asked for, float32, checked: shape [B, V, H, W, D], every value finite where present."""
    found = teacher.features(views, layers)
    batch, cameras = views.images.shape[:2]
    checked = {}
    for layer in layers:
        if layer not in found:
            raise BurnishError(f"the teacher gave no layer {layer}", f"features of layers {list(layers)}")
        features = found[layer]
        expected = (batch, cameras, teacher.widths[layer])
        shape = tuple(features.shape)
        if features.ndim != 5 or (shape[0], shape[1], shape[-1]) != expected:
            raise BurnishError(f"teacher layer {layer} has features of shape {list(shape)}",
                               f"[{batch}, {cameras}, H, W, {teacher.widths[layer]}]")  # fmt: skip
        checked[layer] = features.float()
    return checked


def precision_dtype(precision: str | bool) -> torch.dtype | None:
    """What autocast computes in, None for float32; YAML reads no as false."""
    known = {"no": None, "False": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if str(precision) not in known:
        raise BurnishError(f"teacher: precision {precision!r}", "no, bf16 or fp16")
    return known[str(precision)]


def fingerprint(value: Any) -> str:
    """16 hex digits of JSON-able content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_hash(path) -> str:
    """16 hex digits of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
