"""Which noise and which flow times a score is estimated with, and what each draw counts.

A flow policy's score of a chunk is an average over flow times t (1 is noise) and noise,

    S(chunk) = - E_t,noise [ w(t) |velocity(t) - (noise - chunk)|^2 ],

and the caller owns the draws: the same for chosen and rejected, policy and reference (common random numbers), or the
difference of two scores drowns in their own scatter.

With w = 1 (uniform) the quadratic part of S counts a dimension of standard deviation s by s * pi / 2 times its part
in the log-likelihood: precise dimensions are under-weighted. With w = (1 - t) / t (elbo) over all
times S is a bound of the log-likelihood, exact for the best velocity field, up to a constant that cancels in every
difference (I-MMSE; Kingma and Gao 2023, arXiv:2303.00848). Times are cut off at `t_min`: a dimension of standard
deviation s then counts 1 / (s^2 + t_min^2) in place of 1 / s^2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.options import check, check_value, option
from burnish.core.types import Draws

WEIGHTS = ("elbo", "uniform")


@dataclass(frozen=True)
class ScoreConfig:
    """How scores are estimated."""

    draws: int = option(4, "K, draws for each chunk", least=1)
    times: str = option(
        "logit", "where flow times lie: logit (even in log(t / (1 - t))), uniform, policy (as it was trained), fixed",
        choices=("logit", "uniform", "policy", "fixed"),
    )  # fmt: skip
    fixed_times: tuple[float, ...] = option((), "the times of `times: fixed`, one for each draw")
    weight: str | tuple[float, ...] = option("elbo", "elbo, uniform, or one number for each draw")
    reduce: str = option(
        "sum", "sum (like a log-probability) or mean over valid steps and dimensions", choices=("sum", "mean")
    )
    stratified: bool = option(True, "one time from each of K equal parts of the distribution, not K independent ones")
    antithetic: bool = option(False, "the second half of the draws uses the negative noise of the first, at its times")
    # Antithetic draws sharpen the comparison of two likely chunks from about eight draws on; for fewer, or for gross
    # errors, other times are worth more.
    shared: bool = option(True, "policy and reference, chosen and rejected see the same draws")
    # At 0.02 a dimension of standard deviation 0.05 would count 14 % less than the likelihood has it.
    t_min: float = option(0.002, "truncation of logit and uniform times, where weights grow without bound", above=0)
    t_max: float = option(0.98, "the same at the other end", below=1)

    def __post_init__(self) -> None:
        for name in ("fixed_times", "weight"):  # YAML knows lists only
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(float(v) for v in value))
        check(self, "score")
        if isinstance(self.weight, str):
            check_value(self.weight, {"choices": WEIGHTS}, "score: weight")
        elif len(self.weight) != self.draws:
            raise BurnishError(f"{len(self.weight)} weights", f"one for each of {self.draws} draws")
        if self.t_min >= self.t_max:
            raise BurnishError(f"t_min {self.t_min}, t_max {self.t_max}", "0 < t_min < t_max < 1")
        if self.antithetic and self.draws % 2 and self.draws > 1:
            raise BurnishError(f"{self.draws} antithetic draws", "an even number", "draws: 4, or antithetic: false")
        if self.antithetic and self.times == "fixed" and self.draws > 1:
            raise BurnishError("antithetic draws at fixed times: the second half would use the times of the first",
                               "one of them", "antithetic: false")  # fmt: skip
        if self.times == "fixed" and (
            len(self.fixed_times) != self.draws or not all(0 < t < 1 for t in self.fixed_times)
        ):
            raise BurnishError(f"fixed_times {list(self.fixed_times)}", f"{self.draws} numbers between 0 and 1")


@dataclass(frozen=True)
class WeightedDraws:
    """K draws of one batch row or of many: `draws.time` [..., K], and `weight` [..., K] of each.

    The score is the mean over K of weight times the score of that draw.
    """

    draws: Draws
    weight: Tensor

    @staticmethod
    def stack(rows: Sequence["WeightedDraws"]) -> "WeightedDraws":
        """A batch of rows."""
        noise, time = (torch.stack([getattr(r.draws, name) for r in rows]) for name in ("noise", "time"))
        return WeightedDraws(Draws(noise, time), torch.stack([r.weight for r in rows]))

    def to(self, device: torch.device | str) -> "WeightedDraws":
        return WeightedDraws(self.draws.to(device), self.weight.to(device))


def make_draws(own: Draws, config: ScoreConfig, generator: torch.Generator) -> WeightedDraws:
    """K weighted draws.

    Args:
        own: the policy's own K draws (`policy.draw(K, generator)`): noise [K, ...], time [K].

    Returns:
        noise [K, ...], time [K], weight [K].
    """
    K = config.draws
    half = K // 2 if config.antithetic and K > 1 else K
    noise = own.noise
    if half < K:
        noise = torch.cat([noise[:half], -noise[:half]])
    if config.times == "policy":
        time = own.time
        time = torch.cat([time[:half], time[:half]]) if half < K else time
    else:
        time = _times(config, half, generator).to(own.time)
        time = time.repeat(K // half)
    return WeightedDraws(Draws(noise, time), importance(time, config))


def _times(config: ScoreConfig, count: int, generator: torch.Generator) -> Tensor:
    """[count] times, float64; in random order, so that none is tied to a place in the batch."""
    if config.times == "fixed":
        return torch.tensor(config.fixed_times[:count], dtype=torch.float64)
    uniform = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    if config.stratified:
        uniform = (torch.arange(count, device=generator.device) + uniform) / count
    if config.times == "uniform":
        return config.t_min + (config.t_max - config.t_min) * uniform
    low, high = _logit(config.t_min), _logit(config.t_max)
    return torch.sigmoid(low + (high - low) * uniform)


def importance(time: Tensor, config: ScoreConfig) -> Tensor:
    """w(t) / q(t) of each draw [..., K]: its weight over the density that its time was drawn from.

    Times drawn evenly in the logit have the density 1 / (t (1 - t) L), L the length of the logit's range, so elbo
    weights become (1 - t)^2 L: bounded, where uniform times would leave 1 / t. Times of the policy's own
    distribution are not corrected for: that is the training loss.
    """
    if not isinstance(config.weight, str):
        return torch.tensor(config.weight).to(time).expand_as(time)
    weight = (1 - time) / time if config.weight == "elbo" else torch.ones_like(time)
    if config.times == "logit":
        return weight * time * (1 - time) * (_logit(config.t_max) - _logit(config.t_min))
    if config.times == "uniform":
        return weight * (config.t_max - config.t_min)
    return weight


def weigh(per_draw: Tensor, weight: Tensor, counts: Tensor | None = None) -> Tensor:
    """What each draw adds [B, C, K]; the score is the mean over K.

    Args:
        per_draw: [B, C, K] as `Policy.scores` returns them.
        weight: [B, K], or [B, C, K] for draws that are not shared.
        counts: [B, C] valid steps times dimensions, for the mean over them instead of the sum.
    """
    weighted = per_draw * (weight[:, None] if weight.ndim == 2 else weight)
    return weighted if counts is None else weighted / counts.clamp_min(1)[..., None]


def margin_error(weighted: Tensor) -> Tensor:
    """[B] standard error of the margin from its scatter over draws.

    Args:
        weighted: [B, 2, K] of `weigh`, those of the reference taken away where there is one.

    With stratified times this is too large, because it counts the differences between the strata.
    """
    difference = weighted[:, 0] - weighted[:, 1]
    K = difference.shape[-1]
    return difference.std(-1) / math.sqrt(K) if K > 1 else difference.new_zeros(len(difference))


def _logit(t: float) -> float:
    return math.log(t / (1 - t))
