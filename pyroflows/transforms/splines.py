"""Monotone splines as scalar families: what they all share, and the rational-quadratic one.

A spline has knots, and between two of them a formula. ``Spline`` places the knots, finds the bin of
a number and is the identity in the tails; a subclass adds a formula for a bin, and its inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflows._checks import check_bound, check_positive, check_share, check_whole
from pyroflows.transforms.families import Family


class Bin(NamedTuple):
    """For each number the bin that holds it: lower left corner, size, and slopes at both ends.

    ``raw`` is ``(*batch, per_bin)``: what a spline has of further parameters for the bin.
    """

    x: Tensor
    width: Tensor
    y: Tensor
    height: Tensor
    first: Tensor
    last: Tensor
    raw: Tensor


@dataclass(frozen=True)
class Spline(Family):
    r"""Increasing on ``[-bound, bound]`` between knots, the identity outside.

    The derivative is one at both ends, so the density is continuous there. Bin widths and heights
    have a floor, and every formula is evaluated at a point inside its bin, so values and gradients
    are finite everywhere. ``theta`` holds ``bins`` raw widths, ``bins`` raw heights, ``bins - 1``
    raw slopes at inner knots and ``per_bin * bins`` further numbers.

    A spline of your own writes ``bin_forward`` and ``bin_inverse``.

    Args:
        bins: number of bins.
        bound: half-width of the box; the tails beyond are linear.
        min_bin: the least width and height of a bin, as a share in [0, 1) of the box divided by
            ``bins``.
        min_derivative: the least derivative at a knot, in (0, 1).

    Raises:
        ValueError: fewer than two bins, or another argument out of range.

    Example:
        >>> import torch
        >>> class Linear(Spline):
        ...     def bin_forward(self, x, at):
        ...         slope = at.height / at.width
        ...         return at.y + (x - at.x) * slope, slope.log()
        ...     def bin_inverse(self, y, at):
        ...         slope = at.height / at.width
        ...         return at.x + (y - at.y) / slope, -slope.log()
        >>> y, log_slope = Linear().forward(torch.ones(2), torch.zeros(2, Linear().params))
        >>> y, log_slope
        (tensor([1., 1.]), tensor([0., 0.]))
    """

    bins: int = 8
    bound: float = 5.0
    min_bin: float = 1e-2
    min_derivative: float = 1e-3
    per_bin = 0

    def __post_init__(self) -> None:
        check_whole(2, bins=self.bins)
        check_bound(self.bound)
        check_positive(min_derivative=self.min_derivative)
        check_share(min_bin=self.min_bin, min_derivative=self.min_derivative)

    @property
    def params(self) -> int:
        """Widths, heights and inner derivatives, and what else a bin has."""
        return (3 + self.per_bin) * self.bins - 1

    def bin_forward(self, x: Tensor, at: Bin) -> tuple[Tensor, Tensor]:
        """``g(x)`` and ``log dg/dx`` for x inside its bin."""
        raise NotImplementedError

    def bin_inverse(self, y: Tensor, at: Bin) -> tuple[Tensor, Tensor]:
        """``x = g^-1(y)`` and ``log dx/dy`` for y inside its bin."""
        raise NotImplementedError

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``bin_forward`` in the box, the identity outside."""
        return self._piecewise(self.bin_forward, x, theta, inverse=False)

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``bin_inverse`` in the box, the identity outside."""
        return self._piecewise(self.bin_inverse, y, theta, inverse=True)

    def first_order_inverse(self, theta: Tensor) -> Tensor:
        """Widths and heights change places and slopes turn upside down, as the inverse's do."""
        n = self.bins
        widths, heights, slopes, rest = theta.tensor_split([n, 2 * n, 3 * n - 1], dim=-1)
        return torch.cat([heights, widths, -slopes, rest], dim=-1)

    def knots(self, raw: Tensor) -> Tensor:
        """``bins + 1`` increasing positions from ``-bound`` to ``bound`` exactly."""
        # torch's softmax over so few numbers takes five times as long. A shift changes nothing.
        size = (raw - raw.detach().amax(dim=-1, keepdim=True)).exp()
        share = self.min_bin / self.bins + (1 - self.min_bin) * size / size.sum(-1, keepdim=True)
        inner = 2 * self.bound * share[..., :-1].cumsum(dim=-1) - self.bound
        return F.pad(F.pad(inner, (1, 0), value=-self.bound), (0, 1), value=self.bound)

    def slopes(self, raw: Tensor) -> Tensor:
        """``bins + 1`` positive slopes; one at the ends, and one everywhere for ``raw = 0``."""
        start = math.log(math.expm1(1 - self.min_derivative))
        return F.pad(self.min_derivative + F.softplus(raw + start), (1, 1), value=1.0)

    def bin_of(self, value: Tensor, theta: Tensor, inverse: bool) -> Bin:
        """The bin that holds ``value``, an x or for the inverse a y, inside the box."""
        n = self.bins
        widths, heights, slopes, rest = theta.tensor_split([n, 2 * n, 3 * n - 1], dim=-1)
        xs, ys, ds = self.knots(widths), self.knots(heights), self.slopes(slopes)
        inner = (ys if inverse else xs)[..., 1:-1]
        left = (value[..., None] >= inner).sum(dim=-1, keepdim=True)
        both = torch.cat([left, left + 1], dim=-1)
        (x0, x1), (y0, y1), (d0, d1) = (k.gather(-1, both).unbind(-1) for k in (xs, ys, ds))
        if self.per_bin:
            table = rest.unflatten(-1, (n, self.per_bin))
            rest = table.take_along_dim(left[..., None], dim=-2)[..., 0, :]
        return Bin(x0, x1 - x0, y0, y1 - y0, d0, d1, rest)

    def _piecewise(
        self,
        step: Callable[[Tensor, Bin], tuple[Tensor, Tensor]],
        value: Tensor,
        theta: Tensor,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        theta = theta.expand(*torch.broadcast_shapes(value.shape, theta.shape[:-1]), self.params)
        value = value.expand(theta.shape[:-1])
        inside = value.abs() < self.bound
        # The double where: no NaN gradient outside.
        safe = torch.where(inside, value, torch.zeros_like(value))
        moved, log_derivative = step(safe, self.bin_of(safe, theta, inverse))
        return torch.where(inside, moved, value), torch.where(inside, log_derivative, 0.0)


@dataclass(frozen=True)
class RationalQuadraticSpline(Spline):
    r"""A monotone rational-quadratic spline on ``[-bound, bound]``, the identity outside.

    Durkan et al. 2019, arXiv:1906.04032, eqs. 4-8. Knots, bins and
    their lower bounds are those of every ``Spline``.

    Args:
        bins: number of bins.
        bound: half-width of the box; the tails beyond are linear.
        min_bin: the least width and height of a bin, as a share in [0, 1) of the box divided by
            ``bins``.
        min_derivative: the least derivative at a knot, in (0, 1).

    Raises:
        ValueError: fewer than two bins, or another argument out of range.

    Example:
        >>> import torch
        >>> spline = RationalQuadraticSpline(bins=4)
        >>> x, theta = torch.tensor([0.3, 9.0]), torch.randn(2, spline.params)
        >>> y, log_slope = spline.forward(x, theta)
        >>> spline.inverse(y, theta)[0].allclose(x), log_slope[1]     # beyond the box: the identity
        (True, tensor(0.))
    """

    name = "spline"

    def bin_forward(self, x: Tensor, at: Bin) -> tuple[Tensor, Tensor]:
        """The spline (eq. 4) and its log-derivative (eq. 5)."""
        x0, width, y0, height, d0, d1, _ = at
        xi = ((x - x0) / width).clamp(0, 1)
        slope = height / width
        rise = slope * xi.square() + d0 * xi * (1 - xi)
        y = y0 + height * rise / (slope + (d0 + d1 - 2 * slope) * xi * (1 - xi))
        return y, self._log_derivative(xi, slope, d0, d1)

    def bin_inverse(self, y: Tensor, at: Bin) -> tuple[Tensor, Tensor]:
        """The root of the quadratic (eqs. 6-8), in the form that does not cancel."""
        x0, width, y0, height, d0, d1, _ = at
        slope = height / width
        rise = (y - y0).clamp(min=0)
        bend = rise * (d0 + d1 - 2 * slope)
        a, b, c = height * (slope - d0) + bend, height * d0 - bend, -slope * rise
        # b^2 - 4ac >= 0 in exact arithmetic; rounding may put it a hair below.
        floor = torch.finfo(y.dtype).tiny
        root = (b.square() - 4 * a * c).clamp(min=floor).sqrt()
        # Two forms of the same root: each adds numbers of one sign, so neither cancels.
        positive = b >= 0
        bottom = torch.where(positive, b + root, (2 * a).clamp(min=floor))
        xi = (torch.where(positive, -2 * c, root - b) / bottom).clamp(0, 1)
        return x0 + xi * width, -self._log_derivative(xi, slope, d0, d1)

    @staticmethod
    def _log_derivative(xi: Tensor, slope: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
        """``log dy/dx`` at the fraction ``xi`` of a bin (eq. 5)."""
        rest = 1 - xi
        top = d1 * xi.square() + 2 * slope * xi * rest + d0 * rest.square()
        return 2 * slope.log() + top.log() - 2 * (slope + (d0 + d1 - 2 * slope) * xi * rest).log()
