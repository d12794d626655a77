"""Scalar families g(x; theta): what happens to one feature once its parameters are known.

A family has no weights. It says how many numbers ``theta`` a feature needs and gives two formulas.
All are the identity at ``theta = 0`` and increase strictly for every ``theta``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflows._checks import check_positive, check_share, check_whole


class Family:
    r"""A strictly increasing scalar map :math:`y = g(x; \theta)`, applied feature by feature.

    Attributes:
        params: how many numbers ``theta`` holds for one feature.
        volume_preserving: whether the derivative is one everywhere.

    Example:
        >>> import torch, pyroflows as pf
        >>> family = pf.transforms.Affine()
        >>> y, log_slope = family.forward(torch.ones(4), torch.zeros(4, family.params))
        >>> y, log_slope.shape
        (tensor([1., 1., 1., 1.]), torch.Size([4]))
    """

    params: int
    volume_preserving = False

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``g(x)`` and ``log dg/dx``, both of x's shape; ``theta`` is ``(*x.shape, params)``."""
        raise NotImplementedError

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``x = g^-1(y)`` and ``log dx/dy``, both of y's shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class Additive(Family):
    r""":math:`y = x + \theta` (NICE; Dinh et al. 2015, arXiv:1410.8516, eq. 9).

    Example:
        >>> import torch
        >>> Additive().forward(torch.tensor(1.0), torch.tensor([0.5]))
        (tensor(1.5000), tensor(0.))
    """

    params = 1
    volume_preserving = True

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``x + theta``, derivative one."""
        y = x + theta[..., 0]
        return y, torch.zeros_like(y)

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``y - theta``, derivative one."""
        x = y - theta[..., 0]
        return x, torch.zeros_like(x)


@dataclass(frozen=True)
class Affine(Family):
    r""":math:`y = x e^{s} + t` with :math:`s = b \tanh \theta_0`, :math:`t = \theta_1`.

    The scale stays within :math:`e^{\pm b}`, smoothly: loose limits let single outliers ruin a
    held-out density. RealNVP (Dinh et al. 2017, arXiv:1605.08803, eq. 7) bounds the scale likewise.

    Args:
        bound: the largest absolute log-scale ``b`` of one layer (log 5 by default).

    Raises:
        ValueError: ``bound`` is not positive.

    Example:
        >>> import torch
        >>> y, log_slope = Affine(bound=2.0).forward(torch.tensor(1.0), torch.tensor([50.0, 0.5]))
        >>> log_slope, y                                         # never above the bound
        (tensor(2.), tensor(7.8891))
    """

    bound: float = math.log(5.0)
    params = 2

    def __post_init__(self) -> None:
        check_positive(bound=self.bound)

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``x exp(s) + t`` and ``s``."""
        raw, t = theta.unbind(-1)
        s = self.bound * raw.tanh()
        return x * s.exp() + t, s

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``(y - t) exp(-s)`` and ``-s``."""
        s = theta.select(-1, 0).tanh() * -self.bound
        return (y - theta.select(-1, 1)) * s.exp(), s


@dataclass(frozen=True)
class RationalQuadraticSpline(Family):
    r"""A monotone rational-quadratic spline on ``[-bound, bound]``, the identity outside.

    Durkan et al. 2019, arXiv:1906.04032, eqs. 4-8. The derivative is one at both ends, so the
    density is continuous there. Bin widths and heights have a floor, and every formula is evaluated
    at a point inside its bin, so values and gradients are finite everywhere.

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

    bins: int = 8
    bound: float = 5.0
    min_bin: float = 1e-2
    min_derivative: float = 1e-3

    def __post_init__(self) -> None:
        check_whole(2, bins=self.bins)
        check_positive(bound=self.bound, min_derivative=self.min_derivative)
        check_share(min_bin=self.min_bin, min_derivative=self.min_derivative)

    @property
    def params(self) -> int:
        """``bins`` widths, ``bins`` heights and ``bins - 1`` inner derivatives."""
        return 3 * self.bins - 1

    def _knots(self, raw: Tensor) -> Tensor:
        """``bins + 1`` increasing positions from ``-bound`` to ``bound`` exactly."""
        share = self.min_bin / self.bins + (1 - self.min_bin) * torch.softmax(raw, dim=-1)
        inner = 2 * self.bound * share[..., :-1].cumsum(dim=-1) - self.bound
        return F.pad(F.pad(inner, (1, 0), value=-self.bound), (0, 1), value=self.bound)

    def _derivatives(self, raw: Tensor) -> Tensor:
        """``bins + 1`` positive slopes; one at the ends, and one everywhere for ``raw = 0``."""
        start = math.log(math.expm1(1 - self.min_derivative))
        return F.pad(self.min_derivative + F.softplus(raw + start), (1, 1), value=1.0)

    def _bin(self, value: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, ...]:
        """Left knot, width, left height, height and both slopes of the bin that holds ``value``."""
        widths, heights, slopes = theta.split([self.bins, self.bins, self.bins - 1], dim=-1)
        xs, ys, ds = self._knots(widths), self._knots(heights), self._derivatives(slopes)
        inner = (ys if inverse else xs)[..., 1:-1]
        left = (value[..., None] >= inner).sum(dim=-1, keepdim=True)
        both = torch.cat([left, left + 1], dim=-1)
        (x0, x1), (y0, y1), (d0, d1) = (k.gather(-1, both).unbind(-1) for k in (xs, ys, ds))
        return x0, x1 - x0, y0, y1 - y0, d0, d1

    @staticmethod
    def _log_derivative(xi: Tensor, slope: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
        """``log dy/dx`` at the fraction ``xi`` of a bin (eq. 5)."""
        rest = 1 - xi
        top = d1 * xi.square() + 2 * slope * xi * rest + d0 * rest.square()
        return 2 * slope.log() + top.log() - 2 * (slope + (d0 + d1 - 2 * slope) * xi * rest).log()

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The spline (eq. 4) and its log-derivative (eq. 5)."""
        theta = theta.expand(*torch.broadcast_shapes(x.shape, theta.shape[:-1]), self.params)
        x = x.expand(theta.shape[:-1])
        inside = x.abs() < self.bound
        safe = torch.where(inside, x, torch.zeros_like(x))  # double where: no NaN gradient outside
        x0, width, y0, height, d0, d1 = self._bin(safe, theta, inverse=False)
        xi = ((safe - x0) / width).clamp(0, 1)
        slope = height / width
        rise = slope * xi.square() + d0 * xi * (1 - xi)
        y = y0 + height * rise / (slope + (d0 + d1 - 2 * slope) * xi * (1 - xi))
        log_derivative = self._log_derivative(xi, slope, d0, d1)
        return torch.where(inside, y, x), torch.where(inside, log_derivative, 0.0)

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The root of the quadratic (eqs. 6-8), in the form that does not cancel."""
        theta = theta.expand(*torch.broadcast_shapes(y.shape, theta.shape[:-1]), self.params)
        y = y.expand(theta.shape[:-1])
        inside = y.abs() < self.bound
        safe = torch.where(inside, y, torch.zeros_like(y))
        x0, width, y0, height, d0, d1 = self._bin(safe, theta, inverse=True)
        slope = height / width
        rise = (safe - y0).clamp(min=0)
        bend = rise * (d0 + d1 - 2 * slope)
        a, b, c = height * (slope - d0) + bend, height * d0 - bend, -slope * rise
        # b^2 - 4ac >= 0 in exact arithmetic; rounding may put it a hair below.
        floor = torch.finfo(y.dtype).tiny
        root = (b.square() - 4 * a * c).clamp(min=floor).sqrt()
        # Two forms of the same root: each adds numbers of one sign, so neither cancels.
        positive = b >= 0
        bottom = torch.where(positive, b + root, (2 * a).clamp(min=floor))
        xi = (torch.where(positive, -2 * c, root - b) / bottom).clamp(0, 1)
        x = x0 + xi * width
        log_derivative = -self._log_derivative(xi, slope, d0, d1)
        return torch.where(inside, x, y), torch.where(inside, log_derivative, 0.0)
