"""Compare a port with a transcription of its Stan code, at random points.

Two log-densities are of one posterior if they differ by a constant, wherever they are taken. Points
are normal on the unconstrained scale, so that every parameter takes values of both signs where it
may; of a small deviation, for rates that are exponentials of sums. Those of bounded sites lie below
the middle: with large rates of transfer the carbon of a soil would grow without bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from data import raw_data
from port import Port, each
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from regressions import Data
from torch import Tensor
from torch.distributions import biject_to
from transcribed import LOG_DENSITIES

SPREAD, SHIFT = 0.2, -1.0  # of the points; of those of bounded sites


@dataclass(frozen=True)
class Comparison:
    """How far two log-densities are from differing by a constant.

    Attributes:
        dimension: number of unconstrained variables.
        gap: how much their difference varies, at most, in nats.
        bound: what rounding may make of it.
    """

    dimension: int
    gap: float
    bound: float

    @property
    def passes(self) -> bool:
        """Whether they differ by a constant."""
        return self.gap < self.bound  # false for a NaN


def compare(name: str, port: Port, data: Data, points: int = 4) -> Comparison:
    """Take both log-densities at random points.

    Args:
        name: the posterior.
        port: its port.
        data: the prepared data.
        points: how many.
    """
    values, dimension = random_latents(port.model, data, points)
    ours = log_joint(port.model, data, values)
    theirs = ours.new_tensor([log_density_of(name)(of_one) for of_one in unstacked(values)])
    gap = ours - theirs
    spread = (gap - gap[0]).abs().max().item()
    return Comparison(dimension, spread, 1e-8 + 1e-13 * theirs.abs().max().item())


def log_density_of(name: str) -> Callable[[dict[str, Any]], Any]:
    """A posterior's transcribed log-density, a function of the parameters."""
    data = {key: np.asarray(value) for key, value in raw_data(name).items()}
    log_density = LOG_DENSITIES[name.rsplit("-", 1)[-1]]
    return lambda values: log_density(values, data)


def latent_sites(model: Callable[[Data], None], data: Data) -> dict[str, Any]:
    """The latent sites of a model by name."""
    nodes = poutine.trace(model).get_trace(data).nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def random_latents(model: Callable[[Data], None], data: Data, count: int) -> tuple[Data, int]:
    """Random values ``(count, *shape)`` of each latent site, and the number of free variables."""
    values, dimension = {}, 0
    for name, site in latent_sites(model, data).items():
        to_support = biject_to(site["fn"].support)
        free = to_support.inv(site["value"])
        dimension += free.numel()
        middle = 0.0 if to_support(torch.zeros_like(free)).count_nonzero() == 0 else SHIFT
        points = middle + SPREAD * torch.randn(count, *free.shape, dtype=free.dtype)
        values[name] = to_support(points)
    return values, dimension


def log_joint(model: Callable[[Data], None], data: Data, values: Data) -> Tensor:
    """The model's log-density at ``(draws, *shape)`` of each latent site; ``(draws,)``."""

    def of_one(of_each: Data) -> Tensor:
        return poutine.trace(poutine.condition(model, data=of_each)).get_trace(data).log_prob_sum()

    return each(of_one, values)


def unstacked(values: Data) -> list[dict[str, Any]]:
    """NumPy arrays of each draw by itself."""
    count = len(next(iter(values.values())))
    return [{name: value[row].numpy() for name, value in values.items()} for row in range(count)]
