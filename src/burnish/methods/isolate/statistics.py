"""Streaming statistics of hidden states: mean and variance in float64, whatever the batches and padding."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums that any number of batches can be merged into (Chan, Golub & LeVeque 1979).

    Args:
        count: rows seen, a float64 scalar.
        mean: [D] float64.
        spread: [D] float64, sum of squared deviations from the mean.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "Moments":
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in ((), (width,), (width,))))

    def add(self, rows: Tensor) -> None:
        """Take in rows [N, D]."""
        if len(rows) == 0:
            return
        values = rows.detach().to(self.mean.device, torch.float64)
        mean = values.mean(0)
        self.merge(Moments(values.new_tensor(len(values)), mean, (values - mean).square().sum(0)))

    def merge(self, other: "Moments") -> None:
        """Take in what `other` has seen."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp_min(1), 0.0)
        shift = other.mean - self.mean
        self.mean = self.mean + share * shift
        self.spread = self.spread + other.spread + self.count * share * shift.square()
        self.count = count

    @property
    def variance(self) -> Tensor:
        """[D], dividing by the count."""
        return self.spread / self.count.clamp_min(1)
