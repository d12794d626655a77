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
from pyroflows.programs.circles import direction_of, is_angle
from pyroflows.programs.log_density import ERRORS, LogDensity
from pyroflows.programs.supports import bijection

_ITERATIONS = 60
_CLIMBS = 30  # iterations of an ascent that is not judged on its way
_ARRIVED = 1e-6  # nats that a step may gain at the end of an ascent
_CLOSE = 0.05  # nats below what the curvature promises of a maximum: rounding may hide the rest
_ONE_BY_ONE = 400  # dimensions, from which on second derivatives are taken row by row
_GRAPH = 8  # copies of a run's numbers that two derivatives keep, about
_DRAWS = 64
_PLACES = 256  # draws that show where a posterior is
_FEW = 16  # draws where the model takes one at a time


class Gaussians(NamedTuple):
    """The best Gaussians of several ascents.

    Attributes:
        elbo: of each in nats, ``(n,)``; minus infinity where an ascent met none.
        loc: their locations, ``(n, D)``.
        tril: their lower Cholesky factors, ``(n, D, D)``.
        end: where the ascents ended, ``(n, D)``.
        basin: factors of the covariances by the curvature at these ends, ``(n, D, D)``; NaN where
            an ascent did not arrive at a maximum.
    """

    elbo: Tensor
    loc: Tensor
    tril: Tensor
    end: Tensor
    basin: Tensor

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
    """The prior's median, of an angle its direction.

    Zero in unconstrained space where the prior cannot be sampled.

    Args:
        site: as in a trace.
    """
    fn = site["fn"]
    if is_angle(fn):  # the median of angles about the seam is opposite to them
        return direction_of(fn)
    try:
        with same_draws():  # Pyro takes the median of a few
            return init_to_median(site)
    except NotImplementedError:  # as a flat prior
        to_support = bijection(fn.support)
        return to_support(torch.zeros(to_support.inverse_shape(fn.shape())))


def drawn_from(found: Gaussians) -> Tensor:
    """Draws ``(256, D)`` of the mixture of Gaussians, the same each time.

    Args:
        found: with their ELBOs for weights.
    """
    with same_draws():
        shares = found.elbo.double().softmax(0)
        index = torch.multinomial(shares, _PLACES, replacement=True)
        noise = torch.randn(_PLACES, found.loc.shape[1], 1).to(found.loc)
    return found.loc[index] + (found.tril[index] @ noise)[..., 0]


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
        none = points.new_full((1, size, size), math.nan)
        return Gaussians(lost, points, torch.zeros_like(none), points, none)


class _Newton(NamedTuple):
    """Newton steps from those of ``n`` points where the density has two finite derivatives.

    Attributes:
        finite: which they are, ``(n,)``.
        value: the log-density there, ``(k,)``.
        step: the whole step, ``(k, D)``.
        decrement: half of what it gains if the density is Gaussian, in nats ``(k,)``.
        scales: times their transposes the covariances that the curvature suggests, ``(k, D, D)``.
        log_det: of these factors, ``(k,)``.
        downwards: whether the density curves down in all directions, ``(k,)``.
    """

    finite: Tensor
    value: Tensor
    step: Tensor
    decrement: Tensor
    scales: Tensor
    log_det: Tensor
    downwards: Tensor


def _newton(log_p: LogDensity, x: Tensor) -> _Newton:
    one = x.shape[1] > _ONE_BY_ONE
    value, gradient, curvature = _of_one(log_p, x) if one else _derivatives(log_p, x)
    finite = gradient.isfinite().all(-1) & curvature.isfinite().flatten(1).all(-1)
    value, gradient, curvature = value[finite], gradient[finite], curvature[finite]
    if one and finite.all():
        tril, info = torch.linalg.cholesky_ex(-curvature)
        if not info.any():  # an eighth of the time that eigenvectors take
            step = torch.cholesky_solve(gradient[..., None], tril)[..., 0]
            unit = torch.eye(x.shape[1]).to(x).expand_as(tril)
            scales = torch.linalg.solve_triangular(tril, unit, upper=False).mT
            log_det = -tril.diagonal(dim1=1, dim2=2).log().sum(-1)
            decrement = 0.5 * (gradient * step).sum(-1)
            return _Newton(finite, value, step, decrement, scales, log_det, finite)
    # Directions without curvature of the right sign get its size: ascent, and a scale.
    strength, axes = torch.linalg.eigh(-curvature)
    downwards = (strength > 0).all(-1)
    strength = strength.abs()
    largest = strength.amax(-1, keepdim=True).clamp(min=1e-12)
    strength = torch.maximum(strength, 1e-12 * largest)
    step = (axes @ ((axes.mT @ gradient[..., None]) / strength[..., None]))[..., 0]
    decrement = 0.5 * (gradient * step).sum(-1)
    scales = axes / strength.sqrt()[:, None]
    log_det = -0.5 * strength.log().sum(-1)
    return _Newton(finite, value, step, decrement, scales, log_det, downwards)


def _lengths(like: Tensor) -> Tensor:
    """Those of a step that are tried, all at once, ``(lengths, 1)``."""
    return 2.0 ** torch.arange(3, -14, -1, device=like.device, dtype=like.dtype)[:, None]


def _ascended(log_p: LogDensity, points: Tensor) -> Gaussians:
    x = points.clone()
    count, size = x.shape
    best_elbo = x.new_full((count,), -math.inf)
    best_loc, best_scales = x.clone(), x.new_zeros(count, size, size)
    basin = torch.full_like(best_scales, math.nan)
    since, going = torch.zeros(count), torch.arange(count)
    half = torch.randn((_FEW if log_p.batching == "alone" else _DRAWS) // 2, size).to(x)
    noise = torch.cat([half, -half])  # antithetic: what is odd about the density adds no noise
    lengths = _lengths(x)
    for _ in range(_ITERATIONS):
        if not len(going):
            break
        newton = _newton(log_p, x[going])
        going = going[newton.finite]
        arrived = newton.downwards & (newton.decrement < _CLOSE)
        basin[going[arrived]] = newton.scales[arrived]
        draws = x[going, None] + noise @ newton.scales.mT
        tried = x[going, None] + lengths * newton.step[:, None]
        both = values_of(log_p, torch.cat([draws, tried], dim=1).flatten(0, 1))
        both = both.reshape(len(going), len(noise) + len(lengths))
        at_draws, at_tried = both.split([len(noise), len(lengths)], dim=1)
        log_q = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(1)
        elbo = (at_draws - log_q).mean(1) + newton.log_det
        since[going] += 1
        since[going[elbo > best_elbo[going] + 0.01]] = 0
        better = elbo > best_elbo[going]
        best_elbo[going[better]] = elbo[better]
        best_loc[going[better]], best_scales[going[better]] = (
            x[going[better]],
            newton.scales[better],
        )
        most, index = at_tried.max(dim=1)
        on = (most > newton.value) & (newton.decrement >= _ARRIVED) & (since[going] <= 8)
        x[going[on]] = tried[on, index[on]]
        going = going[on]
    # scales scales^T = L L^T; a QR of the transpose gives L without squaring the condition number.
    upper = torch.linalg.qr(best_scales.mT).R
    tril = (upper * upper.diagonal(dim1=1, dim2=2).sign()[..., None]).mT
    usable = tril.flatten(1).isfinite().all(1) & best_loc.isfinite().all(1)
    usable &= (tril.diagonal(dim1=1, dim2=2) > 0).all(1)
    return Gaussians(torch.where(usable, best_elbo, -math.inf), best_loc, tril, x, basin)


def climbed(log_p: LogDensity, points: Tensor, known: Gaussians, near: float) -> Tensor:
    """Where the Newton ascents from points ``(n, D)`` end, or come near the end of a known one.

    Costs a run of the model of ``n D`` points and one of 17 n an iteration, without the draws that
    a Gaussian is judged by, and most ascents come to a known end in a few.

    Args:
        log_p: the log-density in nats, several points at once, twice differentiable.
        points: where it is finite.
        known: near whose ends an ascent may stop.
        near: how many standard deviations that is.
    """
    x, lengths = points.clone(), _lengths(points)
    going = torch.arange(len(x))
    try:
        for _ in range(_CLIMBS):
            going = going[from_ends(x[going], known) >= near]
            if not len(going):
                break
            newton = _newton(log_p, x[going])
            going = going[newton.finite]
            # A whole step down a bowl to a known end needs no look on its way.
            lands = newton.downwards & (from_ends(x[going] + newton.step, known) < near)
            x[going[lands]] += newton.step[lands]
            if lands.all():
                break
            tried = x[going, None] + lengths * newton.step[:, None]
            values = values_of(log_p, tried.flatten(0, 1)).reshape(len(going), len(lengths))
            most, index = values.max(dim=1)
            on = ~lands & (most > newton.value) & (newton.decrement >= _ARRIVED)
            x[going[on]] = tried[on, index[on]]
            going = going[on]
    except ERRORS:  # as far as they came
        pass
    return x


def from_ends(points: Tensor, known: Gaussians) -> Tensor:
    """How many standard deviations points are from the nearest end of known ascents, ``(n,)``.

    By the curvature at these ends; infinite where none arrived at a maximum.

    Args:
        points: ``(n, D)``.
        known: of the same dimension.
    """
    known = known.at(known.basin.flatten(1).isfinite().all(1))
    gap = (points[None] - known.end[:, None]).mT
    apart = torch.linalg.solve(known.basin, gap).norm(dim=1)
    return torch.cat([apart, apart.new_full((1, len(points)), math.inf)]).amin(0)


@torch.enable_grad()
def _of_one(log_p: LogDensity, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients and second derivatives of points ``(n, D)``, row by row on one graph each.

    In many dimensions that takes less memory than a graph for each row of the matrix.
    """
    found = []
    for point in x:
        point = point.clone().requires_grad_()
        value = log_p(point)
        (gradient,) = torch.autograd.grad(value, point, create_graph=True)
        rows = [
            torch.autograd.grad(
                each, point, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]
            for each in gradient
        ]
        second = torch.stack(rows)
        found.append((value.detach().to(x), gradient.detach(), 0.5 * (second + second.mT)))
    value, gradient, curvature = map(torch.stack, zip(*found, strict=True))
    return value, gradient, curvature


@torch.enable_grad()
def _derivatives(log_p: LogDensity, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``(n,)``, gradients ``(n, D)`` and matrices of second derivatives.

    Each row of these is from a point of its own; so many at once as memory allows.
    """
    at_once = max(1, log_p.at_once // (_GRAPH * x.shape[1]))
    parts = [_derivatives_at(log_p, part) for part in x.split(at_once)]
    value, gradient, curvature = map(torch.cat, zip(*parts, strict=True))
    return value, gradient, curvature


def _derivatives_at(log_p: LogDensity, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count, size = x.shape
    points = x[:, None].expand(count, size, size).flatten(0, 1).clone().requires_grad_()
    value = log_p(points)
    (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    gradient = gradient.unflatten(0, (count, size))
    (second,) = torch.autograd.grad(
        gradient.diagonal(dim1=1, dim2=2).sum(), points, allow_unused=True, materialize_grads=True
    )
    second = second.unflatten(0, (count, size))
    return (
        value.detach().unflatten(0, (count, size))[:, 0].to(x),
        gradient[:, 0].detach(),
        0.5 * (second + second.mT),
    )
