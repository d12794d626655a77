"""Whether a posterior has an end, seen from its best Gaussian."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from pyroflows._pyro.guides import FreeSite
from pyroflows.programs.log_density import ERRORS, LogDensity
from pyroflows.programs.sites import split
from pyroflows.programs.supports import bijection

_FAR = 1e8  # on the real line: the widest priors in use end before
_FAR_LOG = 40.0, 80.0  # where a number is a logarithm: exp(88) is the largest float32
_AT_ONCE = 512  # points, as in the first look around a start
_FALLS, _FLAT = 5.0, 0.1  # nats by which a proper density falls over the first, between the others


def check_proper(log_p: LogDensity, loc: Tensor, tril: Tensor) -> None:
    """See that the density falls far from a Gaussian, along every number and principal axis.

    Along the axes too (of real numbers, and of the others), since a sum or a difference may be what
    nothing holds. Costs a run of the model for each 512 of 12 D points.

    Args:
        log_p: of the model.
        loc: of the Gaussian, ``(D,)``.
        tril: its lower Cholesky factor, ``(D, D)``.

    Raises:
        ValueError: the density does not fall; it names the sites.
    """
    plain = torch.cat([_is_plain(site) for site in log_p.sites]).to(loc.device)
    directions = torch.cat([torch.eye(len(loc)).to(loc), _axes(tril, plain), _axes(tril, ~plain)])
    directions = torch.cat([directions, -directions])
    points = [loc[None], *(loc + far * directions for far in (_FAR, *_FAR_LOG))]
    values = torch.cat([values_of(log_p, part) for part in torch.cat(points).split(_AT_ONCE)])
    here, far, one, two = values.split([1, *3 * [len(directions)]])
    on_the_line = (directions * ~plain == 0).all(-1)
    endless = torch.where(
        on_the_line,
        far > here - _FALLS,
        (one > here - _FALLS) & (two > one - _FLAT),
    )
    if not endless.any():
        return
    parts = split(log_p.sites, (directions[endless].abs() > 0.1).any(0))
    names = [name for name, part in parts.items() if part.any()]
    raise ValueError(
        f"model: the posterior is improper along {', '.join(map(repr, names))}: far out its "
        "density is as high as at its mode. Give these sites a proper prior, or check the "
        "likelihood"
    )


def _axes(tril: Tensor, chosen: Tensor) -> Tensor:
    """The principal axes ``(chosen, D)`` of a Gaussian's chosen numbers, one at the least."""
    axes = tril.new_zeros(int(chosen.sum()), len(tril))
    axes[:, chosen] = torch.linalg.svd(tril[chosen], full_matrices=False).U.mT
    return axes


def _is_plain(site: FreeSite) -> Tensor:
    """Whether a site's free numbers are its values themselves, a boolean for each."""
    free = torch.full(site.free_shape, 1.5)
    value = bijection(site.support)(free)
    same = value.shape == free.shape and torch.equal(value, free)
    return torch.full((site.free_shape.numel(),), same)


@torch.no_grad()
def values_of(log_p: LogDensity, points: Tensor) -> Tensor:
    """Log-densities in nats, ``(n,)``; minus infinity where the model cannot be computed.

    Args:
        log_p: of the model.
        points: ``(n, D)``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pyro's of NaN and infinity: here they are answers
            values = log_p(points)
    except ERRORS:
        if len(points) == 1:
            return points.new_full((1,), -math.inf)
        return torch.cat([values_of(log_p, half) for half in points.chunk(2)])
    return torch.where(torch.isnan(values), -math.inf, values).to(points)
