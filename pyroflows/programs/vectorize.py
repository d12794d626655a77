"""Many particles of a model and its guide in one run, in a plate to the left of all others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

Program = Callable[..., Any]
# What a model may raise for an extreme particle, or for particles it cannot take at once.
ERRORS = (RuntimeError, ValueError, IndexError, NotImplementedError, ArithmeticError)


PLATE = "pyroflows_particles"
_ROUNDING = 1e-5  # of a site's log-density, relative to the size of its terms


class ChangedModelError(ValueError):
    """A model has other latent sites than when its guide was set up."""


@torch.no_grad()
def plate_nesting(model: Program, guide: Program, args: tuple, kwargs: dict) -> int:
    """How many dimensions to the left the plates reach, found by one run."""
    with poutine.block():
        return max(nesting(trace) for trace in run_alone(model, guide, args, kwargs))


def sample_sites(trace: Trace) -> dict[str, Any]:
    """The sample sites of a trace by name, without the row indices that plates draw."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def is_unobserved_part(trace: Trace, name: str) -> bool:
    """Whether a site is the latent one of the two that Pyro makes of ``obs_mask=``.

    Args:
        trace: in which it is.
        name: the site's.
    """
    base = name.removesuffix("_unobserved")
    return base != name and f"{base}_observed" in trace.nodes


def nesting(trace: Trace) -> int:
    """How many dimensions to the left the plates of a trace reach."""
    sites = sample_sites(trace).values()
    frames = (frame for site in sites for frame in site["cond_indep_stack"])
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
    for site in sample_sites(trace).values():
        total = total + summed(site["log_prob"], count, depth)
    return total


def summed(log_prob: Tensor, count: int, depth: int) -> Tensor:
    """A site's log-density summed over all but the particles, which it may not depend on."""
    if log_prob.dim() == depth + 1 and log_prob.shape[0] == count:
        return log_prob.reshape(count, -1).sum(dim=1)
    return log_prob.sum().expand(count)


def mixed_up(together: dict[str, Any], alone: Sequence[dict[str, Any]], depth: int) -> str | None:
    """Whether draws in one run change each other's log-density: what is wrong, or None.

    Site by site, each to the rounding of its own terms: next to the many rows of another site a
    wrong term would pass for rounding. Where rows are subsampled only shapes are compared.

    Args:
        together: the sample sites of a run with all draws, with their ``log_prob``.
        alone: the sites of a run for each draw alone.
        depth: how many dimensions to the left the plates reach.
    """
    for name, site in together.items():
        if site["log_prob"].dim() > depth + 1:
            shape = tuple(site["log_prob"].shape)
            return f"the log-density of site {name!r} has shape {shape}, more than its plates have"
    if any(is_subsampled(frame) for s in together.values() for frame in s["cond_indep_stack"]):
        return None
    for name, site in together.items():
        among = summed(site["log_prob"], len(alone), depth)
        for draw, sites in zip(among, alone, strict=True):
            terms = sites[name]["log_prob"] if name in sites else draw  # sites may come and go
            total = terms.sum()
            off = (draw.to(total) - total).abs()
            if total.isfinite() and not off <= _ROUNDING * terms.abs().sum() + 1e-4:
                return (
                    f"the log-density of site {name!r} at one draw is {total:.4f} alone and "
                    f"{draw:.4f} among others"
                )
    return None


def scored_sites(trace: Trace) -> dict[str, Any]:
    """The sample sites of a trace, their log-densities computed."""
    trace.compute_log_prob()
    return sample_sites(trace)


def first_problem(check: Callable[[], str | None]) -> str | None:
    """What is wrong with running draws at once, or None: what a check finds, or the error in it.

    Args:
        check: runs the model, and returns what is wrong, or None.
    """
    try:
        return check()
    except ERRORS as error:
        return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def warn_of(problem: str, what: str, otherwise: str = "") -> None:
    """Warn that draws run one by one.

    Args:
        problem: why.
        what: cannot run at once.
        otherwise: what else can be done about it.
    """
    warnings.warn(
        f"the model cannot run {what} at once ({problem}); they run one by one, which is slower. "
        "Index from the right and sum over event dimensions only, so that batch dimensions "
        f"broadcast{otherwise}",
        stacklevel=5,
    )


def can_run_together(
    model: Program, guide: Program, args: tuple, kwargs: dict, count: int, depth: int
) -> bool:
    """Whether model and guide take many particles at once; a warning where they do not."""

    def check() -> str | None:
        run_together(model, guide, args, kwargs, count, depth)
        return _wrong_together(model, guide, args, kwargs, depth)

    with torch.no_grad(), poutine.block():
        problem = first_problem(check)
        if problem is None:
            return True
        # An error that has nothing to do with vectorising comes out here.
        run_alone(model, guide, args, kwargs)
    warn_of(problem, f"{count} particles", ", or pass vectorize=False")
    return False


def _wrong_together(
    model: Program, guide: Program, args: tuple, kwargs: dict, depth: int
) -> str | None:
    """What two draws, run at once, do to each other that runs by themselves do not show."""
    with pyro.plate(PLATE, 2, dim=-depth - 1):
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        both = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    single = sample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    shapes = {name: site["value"].shape for name, site in single.items()}
    alone = []
    for particle in range(2):
        values = {
            name: site["value"].expand(2, *site["value"].shape[1:])[particle].reshape(shapes[name])
            for name, site in sample_sites(drawn).items()
            if name in shapes and name in both.nodes
        }
        conditioned = poutine.condition(model, data=values)
        alone.append(scored_sites(poutine.trace(conditioned).get_trace(*args, **kwargs)))
    return mixed_up(scored_sites(both), alone, depth)
