"""Streaming statistics of hidden states: mean, variance and covariance in float64, whatever the batches and padding."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums that any number of batches can be merged into (Chan, Golub & LeVeque 1979).

    Args:
        count: rows seen, a float64 scalar.
        mean: [D] float64.
        spread: [D, D] float64, sum of outer products of the deviations from the mean, or [D], its diagonal.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def empty(cls, width: int, covariance: bool = False, device: torch.device | str = "cpu") -> "Moments":
        shape = (width, width) if covariance else (width,)
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in ((), (width,), shape)))

    def add(self, rows: Tensor) -> None:
        """Take in rows [N, D]."""
        if len(rows) == 0:
            return
        values = rows.detach().to(self.mean.device, torch.float64)
        mean = values.mean(0)
        deviation = values - mean
        spread = deviation.mT @ deviation if self.spread.ndim == 2 else deviation.square().sum(0)
        self.merge(Moments(values.new_tensor(len(values)), mean, spread))

    def merge(self, other: "Moments") -> None:
        """Take in what `other` has seen."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp_min(1), 0.0)
        shift = other.mean - self.mean
        square = torch.outer(shift, shift) if self.spread.ndim == 2 else shift.square()
        self.mean = self.mean + share * shift
        self.spread = self.spread + other.spread + self.count * share * square
        self.count = count

    @property
    def variance(self) -> Tensor:
        """[D], dividing by the count."""
        spread = self.spread.diagonal() if self.spread.ndim == 2 else self.spread
        return spread / self.count.clamp_min(1)

    @property
    def covariance(self) -> Tensor:
        """[D, D], dividing by the count."""
        return self.spread / self.count.clamp_min(1)
