"""From a data set to an index, and from an instruction or a recorded frame to its neighbours there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish.core.errors import BurnishError
from burnish.core.outputs import require_own
from burnish.data.search import Index, build
from burnish.data.vectors import KIND, REMEDY, Vectors, encode_dataset, make_encoder
from burnish.data.watchdog import Watchdog, encoder_for
from burnish.methods.retrieve.head import Head, load_head
from burnish.policies.base import Policy

FOLDER = "head_folder"
"""Where an index says that its head lies."""


def make_index(
    root: Path, spec: str, output: Path, *, head: Path | None = None, cameras: Sequence[str] = (), every: int = 1,
    progress: bool = True,
) -> Vectors:  # fmt: skip
    """Index a data set: encode it (or read what is kept), pass it through a head, and write the folder.

    Args:
        spec: an encoder, see `data.vectors`.
        head: folder of a head for that encoder; None takes its features as they are.
    """
    require_own(output, KIND)
    encoder = make_encoder(spec)
    project, about = (None, {"hash": ""}) if head is None else load_head(head, encoder.identity)
    made = build(encode_dataset(root, encoder, cameras=cameras, every=every, progress=progress), project, about["hash"])
    if head is not None:
        made.about[FOLDER] = str(Path(head).resolve())
    made.save(output)
    return made


def ask_sentence(index: Index, text: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and places [1, k] of the frames nearest to an instruction; BurnishError where no head knows sentences."""
    head = head_of(index.vectors.about)
    if head is None:
        raise BurnishError("an index without a head knows no sentences", "one built with --head", REMEDY)
    with torch.no_grad():
        return index.ask(head.sentences([text]).numpy(), index.vectors.about, k)


def ask_frame(index: Index, episode: int, frame: int, view: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and places [1, k] of the neighbours of a frame of the index itself, those of its own episode left out."""
    table = index.vectors
    here = np.flatnonzero((table.frames["episode"] == episode) & (table.frames["time"] == frame))
    if len(here) != 1:
        raise BurnishError(f"episode {episode} has no frame {frame} in the index", f"a frame of {table.about['root']}")
    own = int((table.frames["episode"] == episode).sum()) * index.views
    scores, places = index.ask(table.values[here, view], table.about, min(k + own, len(index.keys)))
    keep = table.frames["episode"][places[0] // index.views] != episode
    return scores[:, keep][:, :k], places[:, keep][:, :k]


def head_of(about: dict[str, Any]) -> Head | None:
    """The head that an index was built with; BurnishError where it is gone or has become another."""
    if not about["head"]:
        return None
    head, found = load_head(Path(str(about.get(FOLDER))), about["encoder"])
    if found["hash"] != about["head"]:
        raise BurnishError(f"the head in {about[FOLDER]} is another than the index was built with", "the same", REMEDY)
    return head


def watch(folder: Path, policy: Policy, weights: str) -> Watchdog:
    """The watchdog of an index for a policy with that hash; BurnishError where the index is not of this policy."""
    index = Index.open(folder)
    return Watchdog(index, encoder_for(index, policy, weights), policy.cameras, head_of(index.vectors.about))
