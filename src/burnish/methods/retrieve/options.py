"""Options of the head and its training, and the named sets of them."""

from dataclasses import dataclass
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import option, read_options


@dataclass
class RetrieveConfig:
    """How a head is made and trained. The published values are those of the preset `paper`."""

    hidden: int = option(
        512, "hidden units; 0: no layers, the features are standardised and no more", least=0, most=65536
    )
    width: int = option(128, "of a vector", least=2, most=65536)
    standardise: bool = option(True, "features by mean and deviation of the training frames; in a run, by layer norm")
    cameras: int = option(0, "views that take part; 0 means all", least=0, most=64)
    same_episode: str = option(
        "mask", "its other frames in the loss between views: neither, or negative as in the released code",
        choices=("mask", "negative"),
    )  # fmt: skip
    window: int = option(5, "frames of one episode up to so far apart are positives in time", least=1, most=10**6)
    far: int = option(20, "and negatives from so far apart on", least=2, most=10**6)
    exact: bool = option(False, "the only positive in time is the frame `window` later; all others are negatives")
    view_weight: float = option(0.5, "of the loss between views", least=0, most=1e6)
    time_weight: float = option(0.5, "of the loss in time", least=0, most=1e6)
    sentence_weight: float = option(0.25, "of the loss between frames and their instruction", least=0, most=1e6)
    progress_weight: float = option(0.1, "of ranking frames by the time to the end", least=0, most=1e6)
    temperature: float = option(0.07, "of all softmaxes, at the start", least=1e-3, most=10)
    learned: bool = option(True, "the temperature is trained; never below 0.01")
    weight: float = option(0.1, "of all this beside the imitation loss of a run", least=0, most=1e6)
    batch: int = option(128, "frames in a step of training alone", least=2, most=65536)
    frames: int = option(4, "of them from each episode", least=1, most=1024)
    epochs: float = option(30.0, "passes over the frames in training alone", above=0, most=10_000)
    lr: float = option(1e-3, "peak learning rate of AdamW, with cosine to 0", above=0, most=1)
    weight_decay: float = option(1e-4, "of AdamW", least=0, most=10)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The encoder itself, as a baseline: nothing is trained.
    "raw": {
        "hidden": 0, "view_weight": 0.0, "time_weight": 0.0, "sentence_weight": 0.0, "progress_weight": 0.0,
    },
    # arXiv 2605.21854 and its code: agent and wrist view, the same and the fifth next moment, in-batch negatives.
    "paper": {
        "standardise": False, "cameras": 2, "same_episode": "negative", "exact": True, "sentence_weight": 0.0,
        "progress_weight": 0.0, "learned": False, "frames": 1, "epochs": 10.0, "lr": 3e-4,
    },
}  # fmt: skip


def make_config(preset: str, options: dict[str, Any]) -> RetrieveConfig:
    """The options of a preset with some of them changed."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise BurnishError(f"retrieve: preset is {str(preset)[:80]!r}", f"one of {', '.join(PRESETS)}")
    config = read_options(RetrieveConfig, PRESETS[preset] | options, "retrieve")
    if config.far <= config.window:
        raise BurnishError(f"retrieve: far is {config.far}, window {config.window}", "far above window")
    if config.frames > config.batch:
        raise BurnishError(f"retrieve: frames is {config.frames}, batch {config.batch}", "at most batch")
    if not config.hidden and (config.sentence_weight or config.progress_weight):
        raise BurnishError("retrieve: hidden 0 and a loss that trains", "preset: raw, or hidden units")
    return config
