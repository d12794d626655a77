"""Many particles of a model and its guide in one run, in a plate to the left of all others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
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


@torch.no_grad()
def plate_nesting(model: Program, guide: Program, args: tuple, kwargs: dict) -> int:
    """How many dimensions to the left the plates reach, found by one run."""
    with poutine.block():
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        ran = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    return max(nesting(drawn), nesting(ran))


def nesting(trace: Trace) -> int:
    """How many dimensions to the left the plates of a trace reach."""
    frames = (
        frame
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    )
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def run_together(
    model: Program, guide: Program, args: tuple, kwargs: dict, count: int, depth: int
) -> tuple[Trace, Trace]:
    """Traces of the model and of the guide whose draws it replays, ``count`` particles at once."""
    with pyro.plate(PLATE, count, dim=-depth - 1):
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        ran = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    return prune_subsample_sites(ran), prune_subsample_sites(drawn)


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


class LogJoint:
    """A model's log-density over an ``AutoFlow``'s stacked unconstrained sites, Jacobians included.

    Calling it with ``(particles, latent_dim)`` gives ``(particles,)``: in one run of the model
    where it can take several particles at once, else one by one.

    Args:
        guide: set up for the model.
        args: the model's arguments.
        kwargs: its keyword arguments.
    """

    def __init__(self, guide: AutoFlow, args: tuple, kwargs: dict) -> None:
        self.guide, self.args, self.kwargs = guide, args, kwargs
        self.depth = guide.plate_nesting
        self.together = True

    def __call__(self, latent: Tensor) -> Tensor:
        """Nats, ``(particles,)``."""
        if self.together:
            return self._run(latent)
        return torch.cat([self._run(row[None]) for row in latent])

    def _run(self, latent: Tensor) -> Tensor:
        count = len(latent)
        trace, log_det = self.trace(latent)
        return per_particle(trace, count, self.depth) + log_det

    def trace(self, latent: Tensor) -> tuple[Trace, Tensor]:
        """The model's trace at these latents, and the maps' log-determinants."""
        count, log_det, values = len(latent), latent.new_zeros(len(latent)), {}
        shaped = latent.reshape(count, *[1] * self.depth, latent.shape[-1])
        for site, free in self.guide._unpack_latent(shaped):
            to_support = biject_to(site["fn"].support)
            value = to_support(free)
            values[site["name"]] = value
            log_det = log_det + to_support.log_abs_det_jacobian(free, value).reshape(count, -1).sum(
                dim=1
            )
        model = poutine.condition(self.guide.model, data=values)
        with poutine.block(), pyro.plate(PLATE, count, dim=-self.depth - 1):
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        return trace, log_det

    @torch.no_grad()
    def settle(self, latent: Tensor) -> None:
        """Find out, at two particles, whether the model can take several at once."""
        two = torch.stack([latent, latent + 0.01])
        try:
            at_once = self._run(two)
        except ERRORS:
            self.together = False
            return
        alone = torch.cat([self._run(row[None]) for row in two])
        finite = torch.isfinite(alone)
        close = torch.allclose(at_once[finite].to(alone), alone[finite], rtol=1e-3, atol=1e-3)
        self.together = bool(close)


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
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        poutine.replay(model, trace=drawn)(*args, **kwargs)
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
    """Compare the joint log-density of two particles, run at once, with each run by itself."""
    with pyro.plate(PLATE, 2, dim=-depth - 1):
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        both = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    if any(_is_random_subsample(site) for site in both.nodes.values()):
        return None  # each run looks at other rows
    at_once = per_particle(both, 2, depth)
    shapes = {
        name: site["value"].shape
        for name, site in poutine.trace(guide).get_trace(*args, **kwargs).nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }
    for particle in range(2):
        values = {
            name: site["value"].expand(2, *site["value"].shape[1:])[particle].reshape(shapes[name])
            for name, site in drawn.nodes.items()
            if name in shapes and name in both.nodes
        }
        conditioned = poutine.condition(model, data=values)
        alone = poutine.trace(conditioned).get_trace(*args, **kwargs).log_prob_sum()
        if not torch.allclose(at_once[particle].to(alone), alone, rtol=1e-3, atol=1e-3):
            return (
                f"its log-density of one draw is {alone:.4f} alone and {at_once[particle]:.4f} "
                "among others"
            )
    return None


def _is_random_subsample(site: dict) -> bool:
    return site["type"] == "sample" and any(
        frame.full_size is not None and frame.full_size > frame.size
        for frame in site["cond_indep_stack"]
    )
