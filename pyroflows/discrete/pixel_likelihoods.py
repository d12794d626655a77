"""Likelihoods of one grey level, 0 to bins - 1, by a network's outputs: what PixelCNN ends in.

A likelihood scores levels and draws them from given uniform numbers, so that the same numbers give
the same image however its parameters were computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.discrete.levels import to_level, to_unit


def _choose(logits: Tensor, uniform: Tensor) -> Tensor:
    """An index drawn by inverting the cumulative probabilities, ``(...)`` from ``(..., n)``."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # The last one is 1 but for rounding.
    below = cumulative <= uniform[..., None] * cumulative[..., -1:]
    return below.sum(dim=-1).clamp(max=logits.shape[-1] - 1)


class Categorical:
    """Any distribution over the levels, by a logit for each.

    Args:
        bins: number of levels.
    """

    uniforms = 1  # that a draw takes

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.params = bins

    def start(self) -> Tensor:
        """Parameters to begin training at: uniform."""
        return torch.zeros(self.bins)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Log-probability of levels ``(...)`` under ``(..., params)``."""
        return params.log_softmax(dim=-1).gather(-1, x.long()[..., None])[..., 0]

    def draw(self, params: Tensor, uniforms: Tensor) -> Tensor:
        """Levels ``(...)`` from numbers ``(..., uniforms)`` in [0, 1)."""
        return _choose(params, uniforms[..., 0]).to(params)

    def __repr__(self) -> str:
        return f"Categorical({self.bins})"


class LogisticMixture:
    """A mixture of logistics rounded to the nearest level; the outermost take what lies beyond.

    With levels scaled to [-1, 1], half a bin ``h = 1 / (bins - 1)``, and F the logistic function,
    component k gives level x the mass ``F((x + h - mean_k) / s_k) - F((x - h - mean_k) / s_k)``.
    Salimans et al. 2017, arXiv:1701.05517, section 2.1. Neighbouring levels share their
    parameters: far fewer than a categorical's, and better where there are many levels.

    Args:
        bins: number of levels.
        components: of the mixture.
    """

    uniforms = 2

    def __init__(self, bins: int, components: int) -> None:
        self.bins = bins
        self.components = components
        self.params = 3 * components
        self.half = 1 / (bins - 1)
        # At the least scale a component puts all but 2e-9 of its mass into one bin.
        self.least, self.most = math.log(self.half) - 3, 5.0

    def start(self) -> Tensor:
        """Parameters to begin training at: means spread over the levels, as wide as their gaps."""
        means = torch.linspace(-1, 1, self.components + 2)[1:-1]
        scale = -math.log(self.components)
        return torch.cat([torch.zeros_like(means), means, torch.full_like(means, scale)])

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, mean, raw = params.chunk(3, dim=-1)
        # Smoothly within bounds, with a gradient everywhere.
        log_scale = self.least + F.softplus(raw - self.least) - F.softplus(raw - self.most)
        return logits, mean, log_scale

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Log-probability of levels ``(...)`` under ``(..., params)``."""
        logits, mean, log_scale = self._split(params)
        x = x.to(params)[..., None]
        steepness = (-log_scale).exp()
        centre = (to_unit(x, self.bins) - mean) * steepness
        reach = self.half * steepness
        # With a = centre - reach and b = centre + reach,
        #   F(b) - F(a) = F(b) F(-a) (1 - exp(a - b)):
        # no difference of nearly equal numbers, however small the mass. At the lowest level
        # a is -infinity, at the highest b is infinity, and the factors they are in are 1.
        lowest, highest = x < 0.5, x > self.bins - 1.5
        log_mass = (
            F.logsigmoid(centre + reach).masked_fill(highest, 0.0)
            + F.logsigmoid(reach - centre).masked_fill(lowest, 0.0)
            + (-torch.expm1(-2 * reach)).log().masked_fill(lowest | highest, 0.0)
        )
        return (logits.log_softmax(dim=-1) + log_mass).logsumexp(dim=-1)

    def draw(self, params: Tensor, uniforms: Tensor) -> Tensor:
        """Levels ``(...)`` from numbers ``(..., uniforms)`` in [0, 1)."""
        logits, mean, log_scale = self._split(params)
        index = _choose(logits, uniforms[..., 0])[..., None]
        mean, log_scale = mean.gather(-1, index)[..., 0], log_scale.gather(-1, index)[..., 0]
        return to_level(mean + log_scale.exp() * uniforms[..., 1].logit(), self.bins)

    def __repr__(self) -> str:
        return f"LogisticMixture({self.bins}, {self.components})"
