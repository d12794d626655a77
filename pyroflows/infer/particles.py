"""Many particles of a model and its guide in one run, in a plate to the left of all others."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

if TYPE_CHECKING:
    from pyroflows.infer.guides import AutoFlow

Program = Callable[..., Any]
# What a model may raise for a stray particle, or for particles it cannot take at once.
ERRORS = (RuntimeError, ValueError, IndexError, NotImplementedError, ArithmeticError)


class ChangedModelError(ValueError):
    """A model has other latent sites than when its guide was set up."""


PLATE = "pyroflows_particles"
_ROUNDING = 1e-5  # of a site's log-density, relative to the size of its terms


@torch.no_grad()
def plate_nesting(model: Program, guide: Program, args: tuple, kwargs: dict) -> int:
    """How many dimensions to the left the plates reach, found by one run."""
    with poutine.block():
        return max(nesting(trace) for trace in run_alone(model, guide, args, kwargs))


def nesting(trace: Trace) -> int:
    """How many dimensions to the left the plates of a trace reach."""
    frames = (
        frame
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    )
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def is_subsampled(frame: CondIndepStackFrame) -> bool:
    """Whether a plate sees a part of its rows at a time."""
    return frame.full_size is not None and frame.size < frame.full_size


def run_alone(model: Program, guide: Program, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
    """Traces of the model and of the guide whose draw it replays, outside of any plate."""
    drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    ran = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    return prune_subsample_sites(ran), prune_subsample_sites(drawn)


def run_together(
    model: Program, guide: Program, args: tuple, kwargs: dict, count: int, depth: int
) -> tuple[Trace, Trace]:
    """Traces of the model and of the guide whose draws it replays, ``count`` particles at once."""
    with pyro.plate(PLATE, count, dim=-depth - 1):
        return run_alone(model, guide, args, kwargs)


def per_particle(trace: Trace, count: int, depth: int) -> Tensor:
    """The log-density of each particle's sites in nats, ``(count,)``."""
    trace.compute_log_prob()
    total: Any = 0.0
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            total = total + summed(site["log_prob"], count, depth)
    return total


def summed(log_prob: Tensor, count: int, depth: int) -> Tensor:
    """A site's log-density summed over all but the particles, which it may not depend on."""
    if log_prob.dim() == depth + 1 and log_prob.shape[0] == count:
        return log_prob.reshape(count, -1).sum(dim=1)
    return log_prob.sum().expand(count)


def mixed_up(
    together: Mapping[str, dict], alone: Sequence[Mapping[str, dict]], depth: int
) -> str | None:
    """Whether draws in one run change each other's log-density: what is wrong, or None.

    Site by site, each to the rounding of its own terms: next to the many rows of another site a
    wrong term would pass for rounding. Nothing can be said of a model that sees random rows.

    Args:
        together: the sites of a run with all draws, with their ``log_prob``.
        alone: the sites of each draw's run by itself.
        depth: how many dimensions to the left the plates reach.
    """
    sites = {
        name: site
        for name, site in together.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }
    if any(is_subsampled(frame) for s in sites.values() for frame in s["cond_indep_stack"]):
        return None
    for name, site in sites.items():
        among = summed(site["log_prob"], len(alone), depth)
        for draw, own in zip(among, alone, strict=True):
            terms = own[name]["log_prob"] if name in own else draw  # sites may come and go
            total = terms.sum()
            off = (draw.to(total) - total).abs()
            if total.isfinite() and not off <= _ROUNDING * terms.abs().sum() + 1e-4:
                return (
                    f"the log-density of site {name!r} at one draw is {total:.4f} alone and "
                    f"{draw:.4f} among others"
                )
    return None


class LogJoint:
    """A model's log-density over an ``AutoFlow``'s stacked unconstrained sites, Jacobians included.

    Calling it with ``(latent_dim,)`` gives a scalar, from a run outside of any plate; with
    ``(particles, latent_dim)`` it gives ``(particles,)``: in one run of the model where it can take
    several particles at once, else one by one.

    Args:
        guide: set up for the model.
        args: the model's arguments.
        kwargs: its keyword arguments.
        model: by default the guide's.
    """

    def __init__(
        self, guide: AutoFlow, args: tuple, kwargs: dict, model: Program | None = None
    ) -> None:
        self.guide, self.args, self.kwargs = guide, args, kwargs
        self.model = guide.model if model is None else model
        self.depth = guide.plate_nesting
        self.together = True

    def __call__(self, latent: Tensor) -> Tensor:
        """Nats, one for each vector."""
        if latent.dim() == 2 and not self.together:
            return torch.stack([self(row) for row in latent])
        trace, log_det = self.trace(latent)
        if latent.dim() == 1:
            return trace.log_prob_sum() + log_det
        return per_particle(trace, len(latent), self.depth) + log_det

    def trace(self, latent: Tensor) -> tuple[Trace, Tensor]:
        """The model's trace at these latents, and the maps' log-determinants."""
        particles, values, log_det = latent.shape[:-1], {}, latent.new_zeros(latent.shape[:-1])
        shaped = latent.reshape(*particles, *[1] * self.depth * len(particles), latent.shape[-1])
        for site, free in self.guide._unpack_latent(shaped):
            to_support = biject_to(site["fn"].support)
            values[site["name"]] = value = to_support(free)
            log_dets = to_support.log_abs_det_jacobian(free, value)
            log_det = log_det + log_dets.reshape(*particles, -1).sum(dim=-1)
        plates = [pyro.plate(PLATE, n, dim=-self.depth - 1) for n in particles]
        with poutine.block(), contextlib.ExitStack() as stack:
            for plate in plates:
                stack.enter_context(plate)
            model = poutine.condition(self.model, data=values)
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        return trace, log_det

    @torch.no_grad()
    def settle(self, latent: Tensor) -> None:
        """Find out, at two particles, whether the model can take several at once."""
        two = torch.stack([latent, latent + 0.01])
        try:
            together = _sites(self.trace(two)[0])
        except ERRORS:
            self.together = False
            return
        alone = [_sites(self.trace(row)[0]) for row in two]
        self.together = mixed_up(together, alone, self.depth) is None


def _sites(trace: Trace) -> Mapping[str, dict]:
    """The sites of a trace with their log-densities."""
    trace.compute_log_prob()
    return trace.nodes


def can_run_together(
    model: Program, guide: Program, args: tuple, kwargs: dict, count: int, depth: int
) -> bool:
    """Whether model and guide take many particles at once; a warning where they do not."""
    try:
        with torch.no_grad(), poutine.block():
            run_together(model, guide, args, kwargs, count, depth)
            problem = _wrong_together(model, guide, args, kwargs, depth)
    except ERRORS as error:
        problem = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    if problem is None:
        return True
    with torch.no_grad(), poutine.block():
        # An error that has nothing to do with vectorising comes out here.
        run_alone(model, guide, args, kwargs)
    warnings.warn(
        f"the model cannot run {count} particles at once ({problem}); they run one by one, "
        "which is slower. Index from the right and sum over event dimensions only, so that batch "
        "dimensions broadcast, or pass vectorize=False",
        stacklevel=4,
    )
    return False


def _wrong_together(
    model: Program, guide: Program, args: tuple, kwargs: dict, depth: int
) -> str | None:
    """What two draws, run at once, do to each other that runs by themselves do not show."""
    with pyro.plate(PLATE, 2, dim=-depth - 1):
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        both = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    shapes = {
        name: site["value"].shape
        for name, site in poutine.trace(guide).get_trace(*args, **kwargs).nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }
    alone = []
    for particle in range(2):
        values = {
            name: site["value"].expand(2, *site["value"].shape[1:])[particle].reshape(shapes[name])
            for name, site in drawn.nodes.items()
            if name in shapes and name in both.nodes
        }
        conditioned = poutine.condition(model, data=values)
        alone.append(_sites(poutine.trace(conditioned).get_trace(*args, **kwargs)))
    return mixed_up(_sites(both), alone, depth)
