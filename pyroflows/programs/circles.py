"""Latent angles: a chart of the circle by the whole line, with draws that wrap and the right mass.

No bijection takes a line to a circle. So an angle's free number is the angle unwound, and each of
the numbers that wind up to the same angle has a share of its density; the shares sum to one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.constraints import Constraint
from torch.nn.functional import logsigmoid

from pyroflows._pyro.guides import FreeSite

# Distributions of angles whose support is called real: their density has no end on a line.
_OF_ANGLES = "VonMises", "SineBivariateVonMises", "SineSkewed"
_WRAPPERS = "Independent", "MaskedDistribution", "ExpandedDistribution"
_EDGE = 0.3  # radians: of the edges of the window
_LINEAR, _CUBIC = 1.5976, 0.07056  # of the logit of a normal distribution function, to 1.4e-4
_GRID = 64  # places where a seam may be
_SHARPNESS = 6.0  # of the kernel by which the density at a seam is smoothed, about 0.4 radians wide
_OFF = 0.5  # radians by which a middle may be off

AnySite = TypeVar("AnySite", bound=FreeSite)


class Circle(Constraint):
    """Angles in radians, in [-pi, pi), of which numbers 2 pi apart are the same.

    Args:
        center: the angle in the middle of the chart, opposite to its seam; it broadcasts with
            values. Any chart has the same circle.
    """

    def __init__(self, center: Tensor | float) -> None:
        self.center = torch.as_tensor(center)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Which values are inside."""
        return value.abs() <= math.pi


def wound(angle: Tensor) -> Tensor:
    """Angles in [-pi, pi), in the same dtype, from any numbers; those inside stay to the last bit.

    Args:
        angle: in radians.

    Example:
        >>> import torch
        >>> wound(torch.tensor([0.5, 4.0, -10.0]))
        tensor([ 0.5000, -2.2832,  2.5664])
    """
    turns = torch.floor((angle + math.pi) / (2 * math.pi))
    most = math.pi * (1 - torch.finfo(angle.dtype).eps)  # rounding may reach the end
    return (angle - 2 * math.pi * turns).clamp(-math.pi, most)


def log_window(free: Tensor) -> Tensor:
    r"""The logarithm of the share that a free number has among those of the same angle.

    :math:`w(z) = F(z + \pi) - F(z - \pi)` with a distribution function F, so that
    :math:`\sum_k w(z + 2 \pi k) = 1` for every z: nearly one in the middle, and falling over some
    tenths of a radian about the seam. F is the logistic function of an odd cubic, very nearly a
    normal one (Bowling et al. 2009, J. Ind. Eng. Manag. 2(1), eq. 12), since that has two
    derivatives in plain functions and no cancellation: :math:`\sigma(a) - \sigma(b) = \sigma(a)
    \sigma(-b) (1 - e^{b - a})`.

    Args:
        free: the angle unwound, from the chart's middle on.

    Example:
        >>> import torch
        >>> z = torch.tensor([-3.0, 0.0, 3.5]).double()
        >>> sum(log_window(z + 2 * torch.pi * k).exp() for k in range(-4, 5))
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    u, half = free / _EDGE, math.pi / _EDGE
    above, below = u + half, u - half
    a, b = (v * (_LINEAR + _CUBIC * v * v) for v in (above, below))
    a_less_b = 2 * half * (_LINEAR + _CUBIC * (3 * u * u + half * half))
    return logsigmoid(a) + logsigmoid(-b) + torch.log1p(-torch.exp(-a_less_b))


class Unwound(Transform):
    r"""From the line to the circle, :math:`z \mapsto` the angle of ``center + z``.

    Not one to one. In place of a log-determinant it has ``log_window``, so that the integral of
    :math:`p(\theta(z)) w(z)` over the line is that of p over the circle, and draws of that density
    wind up to draws of p, exactly. ``inv`` gives the number of the middle turn. torch's
    registry has it not: a flow pushed through it would have a density of turns, not of angles.

    Args:
        center: the angle in the middle; opposite is the seam, where the shares change hands.
    """

    domain = constraints.real
    bijective = False

    def __init__(self, center: Tensor) -> None:
        super().__init__()
        self.center = center

    @property
    def codomain(self) -> Constraint:  # type: ignore[override]  # torch's is an attribute
        """The circle."""
        return Circle(self.center)

    def _call(self, x: Tensor) -> Tensor:
        return wound(x + self.center.to(x))

    def _inverse(self, y: Tensor) -> Tensor:
        return wound(y - self.center.to(y))

    def log_abs_det_jacobian(self, x: Tensor, _y: Tensor, /) -> Tensor:
        """The logarithm of the share of ``x``."""
        return log_window(x)


def is_angle(fn: Any) -> bool:
    """Whether a distribution is one of angles, whose density repeats itself along the line.

    Args:
        fn: of a site.
    """
    while True:
        kind = type(fn).__name__
        if kind in _OF_ANGLES:
            return True
        if kind == "MixtureSameFamily":
            fn = fn.component_distribution
        elif kind in _WRAPPERS and hasattr(fn, "base_dist"):
            fn = fn.base_dist
        else:
            return False


def direction_of(fn: Any) -> Tensor:
    """The mean direction of a distribution of angles; where unknown, of the one it is made of.

    Args:
        fn: of a site.
    """
    try:
        return wound(fn.mean)
    except NotImplementedError:
        return direction_of(fn.base_dist)


def circle_of(fn: Any, center: Tensor | float) -> Constraint:
    """The support of a distribution of angles.

    Args:
        fn: the distribution.
        center: the middle of the chart, broadcasting with values.
    """
    dims = len(fn.event_shape)
    circle = Circle(center)
    return constraints.independent(circle, dims) if dims else circle


def circle_in(support: Constraint) -> Circle | None:
    """The circle of which a site's support is made; None if it is another.

    Args:
        support: the site's.
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support if isinstance(support, Circle) else None


def circular_mean(angle: Tensor, weight: Tensor | None = None) -> Tensor:
    """The direction of the mean of unit vectors, ``(*shape,)`` in [-pi, pi).

    Args:
        angle: ``(n, *shape)``, in radians.
        weight: of each, ``(n, *ones)``; None where all are alike.
    """
    weight = torch.ones_like(angle) if weight is None else weight
    return wound(torch.atan2((weight * angle.sin()).sum(0), (weight * angle.cos()).sum(0)))


def about_mean(angle: Tensor, weight: Tensor | None = None) -> Tensor:
    """Angles ``(n, *shape)`` as numbers within pi of their mean direction: there is no seam.

    Args:
        angle: in radians.
        weight: of each, ``(n, *ones)``; None where all are alike.
    """
    mean = circular_mean(angle, weight)
    return mean + wound(angle - mean)


def turned(sites: Sequence[AnySite], free: Tensor) -> tuple[tuple[AnySite, ...], Tensor]:
    """The sites with the seam of each angle where draws are rarest, and how far middles went.

    A middle that is less than half a radian off stays.

    Args:
        sites: all, in the order in which vectors stack them.
        free: draws under the old charts, ``(n, latent_dim)``.

    Returns:
        The sites, and by how much their free numbers are less, ``(latent_dim,)``; zero for a number
        that is no angle.
    """
    shift = torch.zeros_like(free[0])
    found, at = [], 0
    for site in sites:
        size = site.free_shape.numel()
        circle = circle_in(site.support)
        if circle is not None:
            part = wound(_rarest(free[:, at : at + size]) + math.pi)
            part = torch.where(part.abs() < _OFF, torch.zeros_like(part), part)
            shift[at : at + size] = part
            center = wound(circle.center.to(part) + part.reshape(site.free_shape))
            site = dataclasses.replace(site, support=_moved(site.support, center))
        found.append(site)
        at += size
    return tuple(found), shift


def _rarest(angle: Tensor) -> Tensor:
    """Where the smoothed density of angles ``(n, k)`` is least, ``(k,)``."""
    grid = torch.linspace(-math.pi, math.pi, _GRID + 1).to(angle)[:-1]
    kernel = _SHARPNESS * ((angle[..., None] - grid).cos() - 1)
    return grid[kernel.logsumexp(0).argmin(-1)]


def _moved(support: Constraint, center: Tensor) -> Constraint:
    """The same support with another middle."""
    if isinstance(support, constraints.independent):
        inner = _moved(support.base_constraint, center)
        return constraints.independent(inner, support.reinterpreted_batch_ndims)
    return Circle(center)
