"""Where a guide starts: the best Gaussian on a Newton ascent of the model's log-density.

Like Pathfinder (Zhang et al. 2022, arXiv:2108.03782), every point of an ascent to the mode proposes
the Gaussian that the curvature there suggests, and the one with the best ELBO is taken: where a
posterior has no useful mode (a centred hierarchy) that is a point before the end of the ascent.
Exact second derivatives take the place of L-BFGS, so badly scaled posteriors cost few iterations.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor

from pyroflows.infer.proper import values_of
from pyroflows.programs.log_density import ERRORS, LogDensity
from pyroflows.programs.supports import bijection

_ITERATIONS = 60
_DRAWS = 64
_FEW = 16  # draws where the model takes one at a time


class Gaussians(NamedTuple):
    """The best Gaussians of several ascents.

    Attributes:
        elbo: of each in nats, ``(n,)``; minus infinity where an ascent met none.
        loc: their locations, ``(n, D)``.
        tril: their lower Cholesky factors, ``(n, D, D)``.
        end: where the ascents ended, ``(n, D)``.
    """

    elbo: Tensor
    loc: Tensor
    tril: Tensor
    end: Tensor

    def at(self, index: Tensor | list[int]) -> Gaussians:
        """Those with these numbers.

        Args:
            index: the numbers.
        """
        return Gaussians(*(part[index] for part in self))


def joined(several: Sequence[Gaussians]) -> Gaussians:
    """All of them in one.

    Args:
        several: of the same dimension.
    """
    return Gaussians(*map(torch.cat, zip(*several, strict=True)))


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Random numbers that are the same each time, so that processes and resumed runs agree."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


def middle(site: dict[str, Any]) -> Tensor:
    """The prior's median, or zero in unconstrained space where it cannot be sampled.

    Args:
        site: as in a trace.
    """
    fn = site["fn"]
    try:
        with same_draws():  # Pyro takes the median of a few
            return init_to_median(site)
    except NotImplementedError:  # as a flat prior
        to_support = bijection(fn.support)
        return to_support(torch.zeros(to_support.inverse_shape(fn.shape())))


def best_gaussians(log_p: LogDensity, points: Tensor) -> Gaussians:
    """The best Gaussian, by its ELBO, on the ascent from each point ``(n, D)``.

    Costs two runs of the model an iteration: of ``n D`` points for the second derivatives, and of
    64 draws and 17 lengths of the step for each ascent.

    Args:
        log_p: the log-density in nats, several points at once, twice differentiable.
        points: where it is finite.
    """
    try:
        return _ascended(log_p, points)
    except ERRORS:  # no second derivatives, or one ascent ran to where the model raises
        count, size = points.shape
        if count > 1:
            return joined([best_gaussians(log_p, point[None]) for point in points])
        lost = points.new_full((1,), -math.inf)
        return Gaussians(lost, points, points.new_zeros(1, size, size), points)


def _ascended(log_p: LogDensity, points: Tensor) -> Gaussians:
    x, value = points.clone(), values_of(log_p, points)
    count, size = x.shape
    best_elbo = x.new_full((count,), -math.inf)
    best_loc, best_scales = x.clone(), x.new_zeros(count, size, size)
    since, going = torch.zeros(count), torch.arange(count)
    half = torch.randn((_FEW if log_p.batching == "alone" else _DRAWS) // 2, size).to(x)
    noise = torch.cat([half, -half])  # antithetic: what is odd about the density adds no noise
    # All lengths of the step at once.
    lengths = 2.0 ** torch.arange(3, -14, -1, device=x.device, dtype=x.dtype)
    for _ in range(_ITERATIONS):
        if not len(going):
            break
        gradient, curvature = _derivatives(log_p, x[going])
        finite = gradient.isfinite().all(-1) & curvature.isfinite().flatten(1).all(-1)
        going, gradient, curvature = going[finite], gradient[finite], curvature[finite]
        # Directions without curvature of the right sign get its size: ascent, and a scale.
        strength, axes = torch.linalg.eigh(-curvature)
        strength = strength.abs()
        largest = strength.amax(-1, keepdim=True).clamp(min=1e-12)
        strength = torch.maximum(strength, 1e-12 * largest)
        scales = axes / strength.sqrt()[:, None]
        step = (axes @ ((axes.mT @ gradient[..., None]) / strength[..., None]))[..., 0]
        draws = x[going, None] + noise @ scales.mT
        tried = x[going, None] + lengths[:, None] * step[:, None]
        both = values_of(log_p, torch.cat([draws, tried], dim=1).flatten(0, 1))
        at_draws, at_tried = both.unflatten(0, (len(going), -1)).split([len(noise), 17], dim=1)
        log_q = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(1)
        elbo = (at_draws - log_q).mean(1) - 0.5 * strength.log().sum(-1)
        since[going] += 1
        since[going[elbo > best_elbo[going] + 0.01]] = 0
        better = elbo > best_elbo[going]
        best_elbo[going[better]] = elbo[better]
        best_loc[going[better]], best_scales[going[better]] = x[going[better]], scales[better]
        most, index = at_tried.max(dim=1)
        decrement = 0.5 * (gradient * step).sum(-1)
        on = (most > value[going]) & (decrement >= 1e-6) & (since[going] <= 8)
        x[going[on]], value[going[on]] = tried[on, index[on]], most[on]
        going = going[on]
    # scales scales^T = L L^T; a QR of the transpose gives L without squaring the condition number.
    upper = torch.linalg.qr(best_scales.mT).R
    tril = (upper * upper.diagonal(dim1=1, dim2=2).sign()[..., None]).mT
    usable = tril.flatten(1).isfinite().all(1) & best_loc.isfinite().all(1)
    usable &= (tril.diagonal(dim1=1, dim2=2) > 0).all(1)
    return Gaussians(torch.where(usable, best_elbo, -math.inf), best_loc, tril, x)


@torch.enable_grad()
def _derivatives(log_p: LogDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(n, D)`` and matrices of second derivatives, each row from a point of its own."""
    count, size = x.shape
    points = x[:, None].expand(count, size, size).flatten(0, 1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_p(points).sum(), points, create_graph=True)
    gradient = gradient.unflatten(0, (count, size))
    (second,) = torch.autograd.grad(
        gradient.diagonal(dim1=1, dim2=2).sum(), points, allow_unused=True, materialize_grads=True
    )
    second = second.unflatten(0, (count, size))
    return gradient[:, 0].detach(), 0.5 * (second + second.mT)
