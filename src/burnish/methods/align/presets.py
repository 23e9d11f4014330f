"""Options of the objective, and the named sets of them."""

from dataclasses import dataclass, field
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import check, refuse_unknown
from burnish.data.feature_cache import FORMATS
from burnish.methods.align.layers import STRATEGIES
from burnish.methods.align.projector import SHARING
from burnish.teachers.pooling import POOLINGS


@dataclass
class AlignConfig:
    """How student and teacher are aligned. A number's source stands beside it."""

    teacher: dict[str, Any] = field(default_factory=lambda: {"name": "geometry"})
    """{name: geometry, scene3d, folder, vggt or package.module:Class, ...its options}."""
    select: str = "depth"
    """How layers are paired, see layers.choose_pairs; `pairs` overrides it."""
    count: int = 10
    """Pairs of "e2m_last1" (the paper's ten)."""
    pairs: list[list[int]] = field(default_factory=list)
    """[student layer, teacher layer] each; `burnish align select` prints them."""
    released_last: bool = False
    """The student's last layer is the one before it, as -1 means in the released code."""
    weight: float = 0.5
    """lambda (paper, Eq. 16); where `match` is set, only that of the first step. 0 builds and calls nothing."""
    match: float = 0.0
    """Instead of `weight`: keep alignment's gradient on the shallowest image tokens at this share of the task's."""
    warmup_steps: int = 0
    """lambda rises linearly over so many steps."""
    stop_after: float = 1.0
    """Alignment ends at this share of the training steps."""
    decay: bool = False
    """lambda falls to zero along a half cosine until `stop_after`."""
    pair_weights: list[float] = field(default_factory=list)
    """alpha of each pair, scaled to sum 1; empty weighs all alike."""
    sharing: str = "shared"
    """shared, trunk, independent or same_start, see projector.Projectors."""
    hidden: int = 0
    """Hidden units of the projector; 0 takes the larger of student's and teacher's width."""
    nested: bool = True
    """Matryoshka: pair i uses a prefix of the hidden units. Only where the first layer is shared."""
    nested_low: float = 0.2
    nested_high: float = 1.0
    nested_reverse: bool = False
    released_widths: bool = False
    """Widths as the released code has them: rounded down, and independent projectors at `nested_low` of their width."""
    ensemble: int = 1
    """Projectors whose outputs are averaged."""
    norm: bool = True
    """LayerNorm before the projector (released code; Eq. 12 has none)."""
    pooling: str = "area"
    """How the teacher's grid comes to the student's, see teachers.pooling."""
    positional: float = 0.0
    """Factor of the positional term added to the teacher's tokens (released code: 0.1)."""
    late_tokens: int = 0
    """Student tokens are read so many rows late (released code: 1, whose rows then hold the next patch)."""
    cache: str = ""
    """"" keeps teacher features beside the data set, "off" runs the teacher at every step, else a folder."""
    cache_format: str = "half"
    """half, or pca (int8)."""
    components: int = 0
    """Components of pca; 0 takes as few as keep a cosine of 0.99."""
    measure_every: int = 50
    """Steps between measurements of the gradients; 0 never measures."""
    workers: int = 0
    """Processes that fill the cache; 0 means one for each core."""


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # One layer at three quarters of the depth (24 of 32 in OpenVLA), teacher's last, lambda 0.5 (arXiv 2510.12276).
    "spatial_forcing": {"select": "single", "nested": False},
    # Table 2 of arXiv 2602.17951: ten pairs, one projector of the teacher's width without norm, Matryoshka 0.2 to 1.
    "paper": {"select": "e2m_last1", "norm": False, "pooling": "bilinear", "positional": 0.1},
    # What the repository runs: norm, truncated widths, patch tokens read one late, -1 one layer early.
    "released_code": {
        "select": "e2m_last1", "released_last": True, "released_widths": True, "late_tokens": 1,
        "pooling": "bilinear", "positional": 0.1,
    },
}  # fmt: skip

_CHOICES = {"sharing": SHARING, "pooling": POOLINGS, "cache_format": FORMATS}


def make_config(preset: str, options: dict[str, Any]) -> AlignConfig:
    """The options of a preset with some of them changed.

    Raises:
        BurnishError: unknown preset or option, or a value out of range.
    """
    if preset not in PRESETS:
        raise BurnishError(f"align: preset is '{preset}'", f"one of {', '.join(PRESETS)}")
    refuse_unknown(AlignConfig, options, "align")
    config = AlignConfig(**{**PRESETS[preset], **options})
    if isinstance(config.teacher, str):
        config.teacher = {"name": config.teacher}
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise BurnishError(f"align: {name} is '{getattr(config, name)}'", f"one of {', '.join(choices)}")
    if config.cache is False:  # YAML reads off as false
        config.cache = "off"
    check(config, "align")
    for name in ("weight", "match", "positional", "warmup_steps", "count", "hidden", "components", "late_tokens",
                 "measure_every", "workers"):  # fmt: skip
        if not getattr(config, name) >= 0:
            raise BurnishError(f"align: {name} is {getattr(config, name)}", "a number from 0 on")
    if not 0 < config.nested_low <= config.nested_high <= 1:
        raise BurnishError(
            f"align: nested_low is {config.nested_low}, nested_high {config.nested_high}", "0 < low <= high <= 1"
        )
    if not 0 < config.stop_after <= 1:
        raise BurnishError(f"align: stop_after is {config.stop_after}", "a share of the steps above 0, up to 1")
    if config.match and not config.measure_every:
        raise BurnishError("align: match needs measurements but measure_every is 0", "a number of steps")
    if config.ensemble < 1:
        raise BurnishError(f"align: ensemble is {config.ensemble}", "at least 1")
    if config.select not in STRATEGIES and not config.select.startswith("uniform-"):
        raise BurnishError(f"align: select is '{config.select}'", f"one of {', '.join(STRATEGIES)}")
    return config
