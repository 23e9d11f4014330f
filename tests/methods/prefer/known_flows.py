"""Flows of known density: mixtures of Gaussians with their optimal velocity, in burnish's time (1 is noise)."""

import math

import numpy as np
import torch


class Mixture:
    """p(x) = sum_k w_k N(m_k, diag s_k^2); means and standard deviations [K, D]."""

    def __init__(self, weights, means, stds):
        self.w, self.m, self.s = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, stds))

    @property
    def dimension(self):
        return self.m.shape[1]

    def sample(self, n, generator):
        k = torch.multinomial(self.w, n, replacement=True, generator=generator)
        return self.m[k] + self.s[k] * torch.randn(n, self.dimension, generator=generator, dtype=torch.float64)

    def log_prob(self, x):
        z = (x[:, None] - self.m) / self.s
        each = -0.5 * z.square().sum(-1) - self.s.log().sum(-1) - 0.5 * self.dimension * math.log(2 * math.pi)
        return torch.logsumexp(each + self.w.log(), dim=1)

    def velocity(self, x, t):
        """E[noise - data | x_t] for x [..., D] and t [...]: x_t = t noise + (1 - t) data."""
        t = t[..., None, None]
        variance = (1 - t) ** 2 * self.s**2 + t**2
        off = x[..., None, :] - (1 - t) * self.m
        logits = (-0.5 * off**2 / variance - 0.5 * variance.log()).sum(-1) + self.w.log()
        weight = torch.softmax(logits, dim=-1)[..., None]
        data = self.m + (1 - t) * self.s**2 * off / variance
        noise = t * off / variance
        return (weight * (noise - data)).sum(-2)

    def scores(self, x, noise, time):
        """[N, K] minus squared error of each draw, for x [N, D], noise [N or 1, K, D], time [N or 1, K]."""
        t = time[..., None]
        points = t * noise + (1 - t) * x[:, None]
        error = self.velocity(points, time.expand(points.shape[:2])) - (noise - x[:, None])
        return -error.square().sum(-1)


def anisotropic(dimension=14, low=0.02, high=1.0):
    """A Gaussian whose standard deviations are even in the logarithm: those of the specification's table."""
    stds = np.exp(np.random.default_rng(0).uniform(math.log(low), math.log(high), (1, dimension)))
    return Mixture([1.0], torch.zeros(1, dimension), stds)


def heteroscedastic():
    """Three blobs in the plane, one of them precise; and the same, a little off."""
    one = Mixture([0.4, 0.3, 0.3], [[0, 0], [1.5, 0], [-1, 1.5]], [[0.05, 0.05], [0.3, 0.3], [0.1, 0.4]])
    other = Mixture([0.34, 0.33, 0.33], [[0.03, 0], [1.6, 0], [-1, 1.4]], [[0.06, 0.06], [0.3, 0.3], [0.12, 0.4]])
    return one, other


def isotropic(dimension=14, mean=0.0, std=0.3):
    return Mixture([1.0], torch.full((1, dimension), mean), torch.full((1, dimension), std))
