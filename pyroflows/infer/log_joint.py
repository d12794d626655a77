"""The log joint of a model as a function of a guide's latent vector."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyroflows._pyro.threads import runs_models
from pyroflows.infer.vectorize import (
    ERRORS,
    PLATE,
    Program,
    mixed_up,
    per_particle,
    scored_sites,
)

Unpack = Callable[[Tensor], Iterator[tuple[dict[str, Any], Tensor]]]


class LogJoint:
    """A model's log-density over the stacked unconstrained vector of its sites, Jacobians included.

    Calling it with ``(latent_dim,)`` gives a scalar, from a run outside of any plate; with
    ``(particles, latent_dim)`` it gives ``(particles,)``: in one run of the model where it can take
    several particles at once, else one by one.

    Args:
        model: a Pyro model.
        unpack: gives each site of a vector and its unconstrained value.
        depth: how many dimensions to the left the model's plates reach.
        args: the model's arguments.
        kwargs: its keyword arguments.
    """

    def __init__(
        self, model: Program, unpack: Unpack, depth: int, args: tuple, kwargs: dict
    ) -> None:
        self.model, self.unpack, self.depth = model, unpack, depth
        self.args, self.kwargs = args, kwargs
        self.together = True

    def __call__(self, latent: Tensor) -> Tensor:
        """Nats, one for each vector."""
        if latent.dim() == 2 and not self.together:
            return torch.stack([self(row) for row in latent])
        trace, log_det = self.trace(latent)
        if latent.dim() == 1:
            return trace.log_prob_sum() + log_det
        return per_particle(trace, len(latent), self.depth) + log_det

    @runs_models
    def trace(self, latent: Tensor) -> tuple[Trace, Tensor]:
        """The model's trace at these latents, and the maps' log-determinants."""
        particles, values, log_det = latent.shape[:-1], {}, latent.new_zeros(latent.shape[:-1])
        shaped = latent.reshape(*particles, *[1] * self.depth * len(particles), latent.shape[-1])
        for site, free in self.unpack(shaped):
            to_support = biject_to(site["fn"].support)
            values[site["name"]] = value = to_support(free)
            log_dets = to_support.log_abs_det_jacobian(free, value)
            log_det = log_det + log_dets.reshape(*particles, -1).sum(dim=-1)
        with poutine.block(), contextlib.ExitStack() as stack:  # a plate is a message too
            for count in particles:
                stack.enter_context(pyro.plate(PLATE, count, dim=-self.depth - 1))
            model = poutine.condition(self.model, data=values)
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        return trace, log_det

    @torch.no_grad()
    def settle(self, latent: Tensor) -> None:
        """Find out, at two particles, whether the model can take several at once."""
        two = torch.stack([latent, latent + 0.01])
        try:
            together = scored_sites(self.trace(two)[0])
        except ERRORS:
            self.together = False
            return
        alone = [scored_sites(self.trace(row)[0]) for row in two]
        self.together = mixed_up(together, alone, self.depth) is None
