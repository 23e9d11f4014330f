"""The options of the `prefer` objective, and its presets."""

from dataclasses import dataclass, field, replace
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import check, option, refuse_unknown
from burnish.methods.prefer.draws import ScoreConfig
from burnish.methods.prefer.losses import LOSSES


@dataclass(frozen=True)
class PreferConfig:
    """What the objective does; `pairs` is the only option without a default."""

    pairs: str = option("", "pair folder, see `burnish data pairs`")
    loss: str = option(
        "dpo", "dpo, ipo and diffusion_dpo need pairs; kto needs outcomes of episodes alone; clone is filtered "
        "behaviour cloning: imitate the successes and ignore the failures", choices=(*LOSSES, "kto", "clone"),
    )  # fmt: skip
    beta: float = option(0.02, "inverse temperature; small keeps the policy near the reference", above=0)
    label_smoothing: float = option(
        0.0, "probability that a label is wrong; above 0, dpo is conservative DPO", least=0, below=0.5
    )
    horizon: float = option(1000.0, "factor on beta of diffusion_dpo", above=0)
    reference: str = option(
        "cached", "cached: scores of the start, kept on disk; adapter_off: the policy without its adapters",
        choices=("cached", "adapter_off", "none"),
    )  # fmt: skip
    reference_cache: str = option("", "file of the cached scores; empty means a name of its own in the pair folder")
    pool: int = option(8, "sets of draws for each pair with a cached reference; a step uses one of them", least=1)
    batch_size: int = option(16, "pairs of a forward pass on each process", least=1)
    steps: int = option(0, "steps of a chunk that are compared; 0 means all", least=0)
    weight: float = option(1.0, "of the preference loss", least=0)
    sft_weight: float = option(
        1.0, "of an imitation term on the chosen chunks (minus their score, for each step and dimension); it keeps the "
        "chosen score from sinking with the rejected one", least=0,
    )  # fmt: skip
    proximal_weight: float = option(0.0, "of the squared change of both scores against the reference", least=0)
    held_out: float = option(
        0.1, "share of the pairs, by whole groups of episodes, that is measured and not trained on", least=0, below=1
    )
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
    """The preset with the given options on top; `score` is a mapping and is merged field by field."""
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
    check(config, "prefer")
    if not config.pairs:
        raise BurnishError("prefer: no pairs", "a pair folder", "burnish data pairs --help")
    if config.label_smoothing and config.loss == "ipo":
        raise BurnishError("prefer: label_smoothing with ipo", "dpo or diffusion_dpo")
    if config.loss == "kto" and (config.label_smoothing or config.reference == "none" or config.batch_size < 2):
        raise BurnishError("prefer: kto with label_smoothing, without a reference, or with a single chunk a step",
                           "reference: cached, and batch_size of at least 2")  # fmt: skip
    if config.proximal_weight and config.reference == "none":
        raise BurnishError("prefer: proximal_weight without a reference", "reference: cached")
    return config
