"""How far what a policy sees is from what it was trained on: the distance to the nearest frame of an index."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from burnish.core.errors import BurnishError
from burnish.data.search import Index, Project, search
from burnish.data.streamed import Shape
from burnish.data.vectors import REMEDY, Encoder, make_encoder, show
from burnish.policies.base import Policy

UNIT = 1e-6
"""Distances are rounded to it: the last bits of a vector depend on who shares its batch."""


class Watchdog:
    """The distance of an observation: one minus the cosine with the nearest frame, the mean over its views.

    All views are compared with those of one and the same frame. The distance to the nearest neighbour as a sign of what
    is out of distribution: Sun et al. 2022, arXiv 2204.06507, with k = 1.

    Args:
        index: of the frames that the policy was trained on.
        encoder: what the index was made with, see `encoder_for`.
        cameras: the policy's; all of them have to be in the index.
        project: the head that the index was made with; None takes the features as they are.

    Attributes:
        seconds, asked: what it has taken so far, for how many observations.
    """

    def __init__(self, index: Index, encoder: Encoder, cameras: Sequence[str], project: Project | None = None):
        about, values = index.vectors.about, index.vectors.values
        known = list(about["cameras"])
        if missing := [name for name in cameras if name not in known]:
            raise BurnishError(f"an index of the cameras {', '.join(known)} for a policy that sees {missing[0]}",
                               "one of all its cameras", REMEDY)  # fmt: skip
        self.encoder, self.cameras = encoder, tuple(cameras)
        self.project = project or (lambda rows: torch.nn.functional.normalize(rows, dim=-1))
        chosen = values if known == list(cameras) else values[:, [known.index(name) for name in cameras]]
        self.keys = chosen.reshape(len(chosen), -1)
        self.about = {"encoder": show(about["encoder"]), "head": show(about["head"]), "data": about["data"],
                      "frames": len(values)}  # fmt: skip
        self.seconds, self.asked = 0.0, 0

    def __call__(self, views: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
        """Distances [B], 0 to 2, of B observations: uint8 pictures [H, W, 3] by camera of the policy."""
        start, blocks = time.perf_counter(), []
        with torch.no_grad():
            for name in self.cameras:
                pictures = np.stack([_seen(picture, self.encoder.side) for picture in views[name]])
                # Half precision, as the features of the index had it.
                features = self.encoder(pictures).astype(np.float16).astype(np.float32)
                blocks.append(self.project(torch.from_numpy(features)).numpy())
        near = search(np.concatenate(blocks, 1), self.keys, 1)[0][:, 0] / len(self.cameras)
        self.seconds, self.asked = self.seconds + time.perf_counter() - start, self.asked + len(near)
        return np.maximum(np.round((1 - near.astype(np.float64)) / UNIT) * UNIT, 0)


def encoder_for(index: Index, policy: Policy, weights: str) -> Encoder:
    """The encoder of an index, run on a policy's own network where it is one's tower or backbone.

    Args:
        weights: the policy's hash.
    """
    about = index.vectors.about
    own = about["encoder"].get("kind") in ("tower", "backbone")
    encoder = make_encoder(about["spec"], str(policy.device) if own else "cpu", (policy, weights) if own else None)
    if encoder.identity != about["encoder"]:
        raise BurnishError(f"a watchdog of encoder {show(about['encoder'])} for a policy with {show(encoder.identity)}",
                           "an index that was made with this very policy, or of pixels", REMEDY)  # fmt: skip
    return encoder


def _seen(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture as `encode_dataset` would have read it."""
    height, width = picture.shape[:2]
    ratio = max(height, width) / side if side else 1.0
    if ratio <= 1:
        return picture
    size = (max(1, int(height / ratio)), max(1, int(width / ratio)), 3)
    return Shape((height, width), size, True).resize(picture)
