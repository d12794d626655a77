"""Where a guide starts: the best Gaussian on a Newton ascent of the model's log-density.

Like Pathfinder (Zhang et al. 2022, arXiv:2108.03782), every point of an ascent to the mode proposes
the Gaussian that the curvature there suggests, and the one with the best ELBO is taken: where a
posterior has no useful mode (a centred hierarchy) that is a point before the end of the ascent.
Exact second derivatives take the place of L-BFGS, so badly scaled posteriors cost few iterations.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.infer.log_joint import LogJoint
from pyroflows.infer.vectorize import ERRORS

LogDensity = Callable[[Tensor], Tensor]  # (points, dimension) -> (points,)
_ITERATIONS = 60
_DRAWS = 64
_CANDIDATES = 256
_MORE = 4
_WHITENED = 400  # up to so many dimensions a full covariance is worth its second derivatives
_ASCENTS = 50  # up to so many dimensions there are several ascents


def middle(site: dict[str, Any]) -> Tensor:
    """The prior's median, or zero in unconstrained space where it cannot be sampled.

    Args:
        site: as in a trace.
    """
    fn = site["fn"]
    try:
        return init_to_median(site)
    except NotImplementedError:
        to_support = biject_to(fn.support)
        return to_support(torch.zeros(to_support.inverse_shape(fn.shape())))


def gaussian_start(
    log_p: LogJoint, start: Tensor, narrow: Tensor, climb: bool
) -> tuple[Tensor, Tensor]:
    """Location ``(D,)`` and lower Cholesky factor ``(D, D)`` of a guide's first Gaussian.

    Args:
        log_p: of the model, not settled yet.
        start: the first point tried, ``(D,)``.
        narrow: the factor where no better one is found or wanted.
        climb: whether to search for a better one.

    Raises:
        ValueError: the model's log-density is finite at no point.
    """
    try:
        log_p.settle(start)
        points = first_points(log_p, start)
    except ERRORS:  # the first step of training raises the model's error
        return start, narrow
    if not points:
        raise ValueError(_where_not_finite(log_p, start))
    if not climb or len(start) > _WHITENED:
        return points[0], narrow
    # Several ascents, since there may be several modes; in many dimensions each is expensive.
    best, best_elbo = (points[0], narrow), -math.inf
    for point in points if len(start) <= _ASCENTS else points[:1]:
        try:
            found = best_gaussian(log_p, point)
        except ERRORS:  # no second derivatives
            continue
        if found is None or found[0] <= best_elbo:
            continue
        elbo, loc, tril = found
        if loc.isfinite().all() and tril.isfinite().all() and (tril.diagonal() > 0).all():
            best, best_elbo = (loc, tril), elbo
    return best


def _where_not_finite(log_p: LogJoint, start: Tensor) -> str:
    """The message for a model whose log-density is nowhere finite."""
    try:
        with torch.no_grad():
            trace, _ = log_p.trace(start)
            trace.compute_log_prob()
    except ERRORS as error:
        return f"model: it raises {type(error).__name__} near its start: {error}"
    bad = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not torch.isfinite(site["log_prob_sum"])
    ]
    return (
        f"model: the log-density of site {', '.join(map(repr, bad)) or 'its sum'} is NaN or "
        "infinite at the start and at 512 points around it; check its support and its data, "
        "or pass another init_loc_fn="
    )


def first_points(log_p: LogDensity, start: Tensor) -> list[Tensor]:
    """``start`` and the best four of many random points, as far as the density is finite there."""
    spread = torch.cat(
        [
            start + torch.randn(_CANDIDATES, len(start)).to(start),
            4 * torch.rand(_CANDIDATES, len(start)).to(start) - 2,
        ]
    )
    best = spread[_values(log_p, spread).topk(_MORE).indices]
    points = torch.cat([start[None], best])
    return [p for p, value in zip(points, _values(log_p, points), strict=True) if value.isfinite()]


def best_gaussian(log_p: LogDensity, start: Tensor) -> tuple[float, Tensor, Tensor] | None:
    """The ELBO, location ``(D,)`` and lower Cholesky factor ``(D, D)`` of the best Gaussian met.

    Costs a run of the model, and three an iteration: of ``D`` points for the second derivatives, of
    64 draws for the ELBO, and of 17 lengths of the step.

    Args:
        log_p: the log-density in nats, several points at once, twice differentiable.
        start: where it is finite.

    Returns:
        None where no point had a finite curvature.
    """
    x, best, best_elbo, since = start, None, -math.inf, 0
    noise = torch.randn(_DRAWS, len(x)).to(x)
    value = _values(log_p, x[None])[0]
    for _ in range(_ITERATIONS):
        gradient, curvature = _derivatives(log_p, x)
        if not (torch.isfinite(gradient).all() and torch.isfinite(curvature).all()):
            break
        # Directions without curvature of the right sign get its size: ascent, and a scale.
        strength, axes = torch.linalg.eigh(-curvature)
        strength = strength.abs().clamp(min=1e-12 * strength.abs().max().clamp(min=1e-12))
        scales = axes / strength.sqrt()
        draws = x + noise @ scales.mT
        log_q = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(1) + 0.5 * strength.log().sum()
        elbo = (_values(log_p, draws) - log_q).mean().item()
        since += 1
        if elbo > best_elbo:
            since = 0 if elbo > best_elbo + 0.01 else since
            best, best_elbo = (x, scales), elbo
        along = axes.mT @ gradient / strength
        step = axes @ along
        # All lengths of the step at once.
        lengths = 2.0 ** torch.arange(3, -14, -1, device=x.device, dtype=x.dtype)
        points = x + lengths[:, None] * step
        values = _values(log_p, points)
        index = values.argmax()
        decrement = 0.5 * (gradient @ step)
        if not values[index] > value or decrement < 1e-6 or since > 8:
            break
        x, value = points[index], values[index]
    if best is None:
        return None
    loc, scales = best
    # scales scales^T = L L^T; a QR of the transpose gives L without squaring the condition number.
    upper = torch.linalg.qr(scales.mT).R
    return best_elbo, loc, (upper * upper.diagonal().sign()[:, None]).mT


@torch.no_grad()
def _values(log_p: LogDensity, points: Tensor) -> Tensor:
    """Log-densities; minus infinity where the model cannot be computed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pyro's of NaN and infinity: here they are answers
            values = log_p(points)
    except (RuntimeError, ValueError, ArithmeticError):
        if len(points) == 1:
            return points.new_full((1,), -math.inf)
        return torch.cat([_values(log_p, half) for half in points.chunk(2)])
    return torch.where(torch.isnan(values), -math.inf, values).to(points)


@torch.enable_grad()
def _derivatives(log_p: LogDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and matrix of second derivatives, each row of it from a point of its own."""
    points = x.expand(len(x), -1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_p(points).sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(
        gradient.diagonal().sum(), points, allow_unused=True, materialize_grads=True
    )
    return gradient[0].detach(), 0.5 * (second + second.mT)
