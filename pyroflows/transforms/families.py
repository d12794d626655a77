"""Scalar families g(x; theta): what happens to one feature once its parameters are known.

A family has no weights. It says how many numbers ``theta`` a feature needs and gives two formulas.
All are the identity at ``theta = 0`` and increase strictly for every ``theta``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows._checks import check_bound


class Family:
    r"""A strictly increasing scalar map :math:`y = g(x; \theta)`, applied feature by feature.

    One of your own is a frozen dataclass with ``params`` and two methods; its fields are what
    ``pf.save`` writes. Give it a ``name`` and builders take that as their ``family=``.

    Attributes:
        params: how many numbers ``theta`` holds for one feature.
        name: what ``family=`` calls it; empty for one that is only given as an instance.
        support: the numbers that it takes and gives.
        volume_preserving: whether the derivative is one everywhere.
        keeps_gaussian: whether y is Gaussian wherever x is.

    Example:
        >>> import torch, pyroflows as pf
        >>> family = pf.transforms.Affine()
        >>> y, log_slope = family.forward(torch.ones(4), torch.zeros(4, family.params))
        >>> y, log_slope.shape
        (tensor([1., 1., 1., 1.]), torch.Size([4]))
    """

    name = ""
    support: constraints.Constraint = constraints.real
    volume_preserving = False
    keeps_gaussian = False

    if TYPE_CHECKING:  # an attribute, which some families compute

        @property
        def params(self) -> int:
            """How many numbers ``theta`` holds for one feature."""

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``g(x)`` and ``log dg/dx``, both of x's shape; ``theta`` is ``(*x.shape, params)``."""
        raise NotImplementedError

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``x = g^-1(y)`` and ``log dx/dy``, both of y's shape."""
        raise NotImplementedError

    def first_order_inverse(self, theta: Tensor) -> Tensor:
        r"""Parameters ``(*batch, params)`` of g that invert it at ``theta``, to first order.

        Linear in ``theta``, with an error of second order where that is small. As g is the identity
        at zero, :math:`g(x; \theta) = x + \theta \cdot h(x) + O(\theta^2)`, so ``-theta`` does for
        every family; override it with a better one where there is.
        """
        return -theta


@dataclass(frozen=True)
class Additive(Family):
    r""":math:`y = x + \theta` (NICE; Dinh et al. 2015, arXiv:1410.8516, eq. 9).

    Example:
        >>> import torch
        >>> Additive().forward(torch.tensor(1.0), torch.tensor([0.5]))
        (tensor(1.5000), tensor(0.))
    """

    name = "additive"
    params = 1
    volume_preserving = True
    keeps_gaussian = True

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
    name = "affine"
    params = 2
    keeps_gaussian = True

    def __post_init__(self) -> None:
        check_bound(self.bound)

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``x exp(s) + t`` and ``s``."""
        raw, t = theta.unbind(-1)
        s = self.bound * raw.tanh()
        return x * s.exp() + t, s

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """``(y - t) exp(-s)`` and ``-s``."""
        s = theta.select(-1, 0).tanh() * -self.bound
        return (y - theta.select(-1, 1)) * s.exp(), s


def kinds(of: type[Family] = Family) -> Iterator[type[Family]]:
    """All classes of families that are defined by now, a user's own among them."""
    for kind in of.__subclasses__():
        yield kind
        yield from kinds(kind)


def families() -> dict[str, type[Family]]:
    """The families that ``family=`` of a builder takes by name; to define one is to add it.

    Example:
        >>> from pyroflows.transforms.families import families
        >>> sorted(families())[:2]
        ['additive', 'affine']
    """
    return {kind.name: kind for kind in kinds() if kind.__dict__.get("name")}


def family_from(family: str | Family, **sizes: float | None) -> Family:
    """The family of a builder's ``family=``: an instance, or a name and its sizes.

    Args:
        family: a name from ``families()``, or a family.
        **sizes: arguments of the named family; None for its own default.

    Raises:
        ValueError: an unknown name, a size that the family does not have or that is out of range,
            or any size beside an instance, which has its own.

    Example:
        >>> family_from("affine", bound=2.0)
        Affine(bound=2.0)
    """
    given = {name: size for name, size in sizes.items() if size is not None}
    if isinstance(family, Family):
        for name, size in given.items():
            raise ValueError(
                f"{name}: expected None beside a family that has its own, {family}, got {size!r}"
            )
        if family.support is not constraints.real:
            raise ValueError(
                f"family: expected one on all real numbers, got {family} on {family.support}; put "
                "it into pf.transforms.Autoregressive or Coupling and these into a pf.Flow"
            )
        return family
    known = families()
    if not isinstance(family, str) or family not in known:
        names = ", ".join(map(repr, sorted(known)))
        raise ValueError(f"family: expected one of {names}, or a Family, got {family!r}")
    takes = inspect.signature(known[family]).parameters
    for name, size in given.items():
        if name not in takes:
            raise ValueError(f"{name}: expected None, got {size!r}; the family {family!r} has none")
    return known[family](**given)
