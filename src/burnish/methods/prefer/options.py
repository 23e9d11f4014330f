"""The options of the `prefer` objective, and its presets."""

from dataclasses import dataclass, field, replace
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import check, refuse_unknown
from burnish.methods.prefer.draws import ScoreConfig
from burnish.methods.prefer.losses import LOSSES

REFERENCES = ("cached", "adapter_off", "none")


@dataclass(frozen=True)
class PreferConfig:
    """What the objective does; `pairs` is the only option without a default."""

    pairs: str = ""
    """Pair folder, see `burnish data pairs`."""
    loss: str = "dpo"
    """dpo, ipo, diffusion_dpo, or clone: imitate the successes and ignore the failures (filtered cloning)."""
    beta: float = 0.02
    label_smoothing: float = 0.0
    """Probability that a label is wrong; above 0, dpo is conservative DPO."""
    horizon: float = 1000.0
    """Factor on beta of diffusion_dpo."""
    reference: str = "cached"
    """cached (scores of the start, kept on disk), adapter_off (the policy without its adapters), none."""
    reference_cache: str = ""
    """File of the cached scores; empty means a name of its own in the pair folder."""
    pool: int = 8
    """Sets of draws for each pair with a cached reference; a step uses one of them."""
    batch_size: int = 16
    """Pairs of a step on each process."""
    steps: int = 0
    """Steps of a chunk that are compared; 0 means all."""
    weight: float = 1.0
    sft_weight: float = 1.0
    """Weight of an imitation term on the chosen chunks (minus their score, for each step and dimension); it keeps the
    chosen score from sinking with the rejected one."""
    proximal_weight: float = 0.0
    """Weight of the squared change of both scores against the reference."""
    score: ScoreConfig = field(default_factory=ScoreConfig)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # DPO and nothing else, on the same scores.
    "plain_dpo": {"beta": 0.1, "sft_weight": 0.0},
    # Section 3 and equation 1 of the paper: four fixed times, deterministic draws, mean squared error, beta 0.1.
    "paper": {
        "beta": 0.1, "sft_weight": 0.0,
        "score": {
            "draws": 4, "times": "fixed", "fixed_times": (0.125, 0.375, 0.625, 0.875), "weight": "uniform",
            "reduce": "mean", "stratified": False, "antithetic": False,
        },
    },
    # What its code runs: the policy's training times, and noise of its own for each of the four scores.
    "released_code": {
        "beta": 0.1, "sft_weight": 0.0,
        "score": {
            "draws": 4, "times": "policy", "weight": "uniform", "reduce": "mean", "stratified": False,
            "antithetic": False, "shared": False,
        },
    },
    "diffusion_dpo": {
        "loss": "diffusion_dpo", "beta": 5.0, "sft_weight": 0.0,
        "score": {"draws": 1, "times": "uniform", "weight": "uniform", "reduce": "mean", "antithetic": False},
    },
}  # fmt: skip


def make_config(preset: str, options: dict[str, Any]) -> PreferConfig:
    """The preset with the given options on top; `score` is a mapping and is merged field by field.

    Raises:
        BurnishError: an unknown preset or option, or a value out of range.
    """
    if preset not in PRESETS:
        raise BurnishError(f"prefer: preset '{preset}'", f"one of {', '.join(PRESETS)}")
    values = dict(PRESETS[preset])
    given = options.get("score") or {}
    if not isinstance(given, dict):
        raise BurnishError(f"prefer: score is {given!r}", "fields such as {draws: 4}")
    score = {**values.pop("score", {}), **given}
    values |= {key: value for key, value in options.items() if key != "score"}
    refuse_unknown(PreferConfig, values, "prefer")
    refuse_unknown(ScoreConfig, score, "prefer.score")
    config = replace(PreferConfig(**values), score=ScoreConfig(**score))
    _check(config)
    return config


def _check(config: PreferConfig) -> None:
    check(config, "prefer")
    for name in ("weight", "sft_weight", "proximal_weight", "horizon", "steps"):
        if getattr(config, name) < 0:
            raise BurnishError(f"prefer: {name} is {getattr(config, name)}", "a number of at least 0")
    if config.horizon == 0:
        raise BurnishError("prefer: horizon is 0", "a number above 0")
    if not config.pairs:
        raise BurnishError("prefer: no pairs", "a pair folder", "burnish data pairs --help")
    if config.loss not in (*LOSSES, "clone"):
        raise BurnishError(f"prefer: loss '{config.loss}'", f"one of {', '.join((*LOSSES, 'clone'))}")
    if config.reference not in REFERENCES:
        raise BurnishError(f"prefer: reference '{config.reference}'", f"one of {', '.join(REFERENCES)}")
    if config.beta <= 0 or not 0 <= config.label_smoothing < 0.5 or config.pool < 1 or config.batch_size < 1:
        raise BurnishError(
            f"prefer: beta {config.beta}, label_smoothing {config.label_smoothing}, pool {config.pool}, "
            f"batch_size {config.batch_size}", "beta above 0, label_smoothing in [0, 0.5), pool and batch from 1",
        )  # fmt: skip
    if config.label_smoothing and config.loss == "ipo":
        raise BurnishError("prefer: label_smoothing with ipo", "dpo or diffusion_dpo")
    if config.proximal_weight and config.reference == "none":
        raise BurnishError("prefer: proximal_weight without a reference", "reference: cached")
