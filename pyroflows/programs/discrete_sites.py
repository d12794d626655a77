"""The discrete sites that a log-density sums out, given back: their probabilities, and draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, infer_discrete
from torch import Tensor

from pyroflows._pyro.enumeration import configured
from pyroflows.programs.log_density import LogDensity
from pyroflows.programs.vectorize import Program, sample_sites


@torch.no_grad()
def discrete_probabilities(log_density: LogDensity, latent: Tensor) -> dict[str, Tensor]:
    """The posterior probability of each value of each discrete site, given the other sites.

    By Pyro's enumeration, a run of the model for each vector.

    Args:
        log_density: that sums them out.
        latent: vectors ``(n, latent_dim)`` of the others.

    Returns:
        For each site ``(n, *site shape, values)``, the values in the order of its
        ``enumerate_support``.
    """
    elbo = TraceEnum_ELBO(max_plate_nesting=log_density.nesting)
    rows: list[dict[str, Tensor]] = []
    for model in _conditioned(log_density, latent):
        found = elbo.compute_marginals(model, _no_guide, *log_density.args, **log_density.kwargs)
        rows.append({name: _probabilities(fn) for name, fn in found.items()})
    return _stacked(rows)


@torch.no_grad()
def draw_discrete(log_density: LogDensity, latent: Tensor) -> dict[str, Tensor]:
    """Joint posterior draws of the discrete sites, one for each vector of the others.

    By Pyro's ``infer_discrete``, a few runs of the model for each vector.

    Args:
        log_density: that sums them out.
        latent: vectors ``(n, latent_dim)`` of the others.

    Returns:
        For each site ``(n, *site shape)``.
    """
    rows: list[dict[str, Tensor]] = []
    for model in _conditioned(log_density, latent):
        drawn = infer_discrete(model, first_available_dim=-1 - log_density.nesting)
        with poutine.block():
            trace = poutine.trace(drawn).get_trace(*log_density.args, **log_density.kwargs)
        sites = sample_sites(trace)
        rows.append({name: sites[name]["value"] for name in log_density.discrete})
    return _stacked(rows)


def _conditioned(log_density: LogDensity, latent: Tensor) -> Iterator[Program]:
    """The model with its discrete sites to be enumerated, the others at each of the vectors."""
    values = log_density.run(latent).values
    model = configured(log_density.model, log_density.discrete)
    for index in range(len(latent)):
        yield poutine.condition(model, data={name: v[index] for name, v in values.items()})


def _no_guide(*_args: Any, **_kwargs: Any) -> None:
    """Draws nothing: all that is not enumerated is conditioned on."""


def _probabilities(fn: Any) -> Tensor:
    return fn.log_prob(fn.enumerate_support()).exp().movedim(0, -1)


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
