"""Options of the objective, and the named sets of them."""

from dataclasses import dataclass
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import number, option, read_options
from burnish.data.feature_cache import FORMATS
from burnish.methods.align.layers import STRATEGIES
from burnish.teachers.placing import POOLINGS

SHARING = ("shared", "trunk", "independent", "same_start")


@dataclass
class AlignConfig:
    """How student and teacher are aligned. A number's source stands beside it."""

    teacher: dict[str, Any] = option(
        {}, "{name: a registered teacher or package.module:Class, ...its options}; empty: geometry where the data "
        "keeps depth, else the vision model in data/teachers/vision",
    )  # fmt: skip
    select: str = option("depth", "how layers are paired, see layers.choose_pairs; `pairs` overrides it")
    count: int = option(10, "pairs of e2m_last1 (the paper's ten), and most of depth", least=0, most=1000)
    pairs: list[list[int]] = option([], "[student layer, teacher layer] each, see `burnish method align select`")
    released_last: bool = option(False, "the student's last layer is the one before it, as -1 is in the released code")
    weight: float = option(
        0.5, "lambda (paper, Eq. 16); not read with gradient_norm_ratio; 0 of both builds and calls nothing",
        least=0, most=1e6,
    )  # fmt: skip
    gradient_norm_ratio: float = option(
        0.0, "instead of weight, at every step: norm of alignment's gradient on the shallowest image tokens, over that "
        "of the task's", least=0, most=1e6,
    )  # fmt: skip
    warmup_steps: int = option(0, "lambda rises linearly over so many steps", least=0)
    stop_after: float = option(1.0, "alignment ends at this share of the training steps", above=0, most=1)
    decay: bool = option(False, "lambda falls to zero along a half cosine until stop_after")
    pair_weights: list[float] = option([], "alpha of each pair, scaled to sum 1; empty weighs all alike")
    sharing: str = option("shared", "what the pairs' projectors share, see aligner.Projectors", choices=SHARING)
    hidden: int = option(0, "hidden units of the projector; 0 takes the larger of both widths", least=0, most=65536)
    nested: bool = option(True, "Matryoshka: pair i uses a prefix of the hidden units, where the first layer is shared")
    nested_low: float = option(0.2, "share of the hidden units for the first pair (paper, Eq. 13)", above=0, most=1)
    nested_high: float = option(1.0, "and for the last", above=0, most=1)
    nested_reverse: bool = option(False, "shallow pairs get the most")
    released_widths: bool = option(
        False, "widths of the released code: rounded down, independent projectors at nested_low of theirs"
    )
    norm: bool = option(True, "LayerNorm before the projector (released code; Eq. 12 has none)")
    pooling: str = option(
        "area", "how the teacher's grid comes to the student's, see teachers.pooling", choices=POOLINGS
    )
    positional: float = option(
        0.0, "factor of the positional term added to the teacher's tokens (released code: 0.1)", least=0, most=100
    )
    late_tokens: int = option(
        0, "student tokens are read so many positions late (released code: 1, which is the next patch)",
        least=0, most=64,
    )  # fmt: skip
    cache: str = option(
        "", "empty keeps teacher features beside the data set, off computes them at every step, else a folder",
        path=True,
    )  # fmt: skip
    cache_format: str = option("half", "of kept features: half precision, or pca in int8", choices=FORMATS)
    components: int = option(0, "of pca; 0 takes as few as keep a cosine of 0.99", least=0)
    measure_every: int = option(
        0, "steps between measurements of every pair's gradient at two layers, one backward pass through the language "
        "model for each pair; 0 never measures", least=0,
    )  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # One layer (24 of 32 in OpenVLA, 12 of 18 in pi0), teacher's last, lambda 0.5 (arXiv 2510.12276); pooling and
    # positional term of its code.
    "spatial_forcing": {"select": "single", "nested": False, "pooling": "bilinear", "positional": 0.1},
    # Table 2 of arXiv 2602.17951: ten pairs, one projector of the teacher's width without norm, Matryoshka 0.2 to 1.
    "paper": {"select": "e2m_last1", "norm": False, "pooling": "bilinear", "positional": 0.1},
    # What the repository runs: norm, truncated widths, patch tokens read one late, -1 one layer early.
    "released_code": {
        "select": "e2m_last1", "released_last": True, "released_widths": True, "late_tokens": 1,
        "pooling": "bilinear", "positional": 0.1,
    },
}  # fmt: skip


def make_config(preset: str, options: dict[str, Any]) -> AlignConfig:
    """The options of a preset with some of them changed."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise BurnishError(f"align: preset is '{preset}'", f"one of {', '.join(PRESETS)}")
    values = PRESETS[preset] | options
    if isinstance(values.get("teacher"), str):
        values["teacher"] = {"name": values["teacher"]} if values["teacher"] else {}
    if values.get("cache") is False:  # YAML reads off as false
        values["cache"] = "off"
    config = read_options(AlignConfig, values, "align")
    if config.nested_low > config.nested_high:
        raise BurnishError(f"align: nested_low is {config.nested_low}, nested_high {config.nested_high}",
                           "0 < low <= high <= 1")  # fmt: skip
    if not all(number(alpha) and alpha >= 0 for alpha in config.pair_weights):
        raise BurnishError(f"align: pair_weights {config.pair_weights}"[:200], "numbers from 0 on")
    if config.select not in STRATEGIES and not config.select.startswith("uniform-"):
        raise BurnishError(f"align: select is '{config.select}'", f"one of {', '.join(STRATEGIES)}")
    return config
