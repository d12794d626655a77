"""Maps from R^n onto the supports of latent sites, each a bijection with a density to its Jacobian.

``torch.distributions.biject_to``, but for supports that torch has no map for, or one whose
unconstrained side has more numbers than the site has degrees of freedom.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint

from pyroflows._pyro.starts import SPHERE_ADVICE
from pyroflows.programs.circles import Circle, Unwound, circle_of, is_angle

sphere = dist.constraints.sphere


class _Triangle(Transform):
    """From the ``n (n + 1) / 2`` entries of a triangle, row by row, its diagonal by logarithms."""

    domain = constraints.real_vector
    bijective = True

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        size = _order(x.shape[-1])
        row, column = torch.tril_indices(size, size, device=x.device)
        # Out of place, so that a batch of vectors may be mapped at once by torch.func.vmap.
        place = torch.zeros(len(row), size * size, dtype=x.dtype, device=x.device)
        place[torch.arange(len(row), device=x.device), row * size + column] = 1
        lower = (x @ place).unflatten(-1, (size, size))
        return lower.tril(-1) + torch.diag_embed(lower.diagonal(dim1=-2, dim2=-1).exp())

    def _inverse(self, y: Tensor) -> Tensor:
        size = y.shape[-1]
        free = y.tril(-1) + torch.diag_embed(y.diagonal(dim1=-2, dim2=-1).log())
        row, column = torch.tril_indices(size, size, device=y.device)
        return free[..., row, column]

    def forward_shape(self, shape: Size) -> Size:
        """Of the matrices."""
        size = _order(shape[-1])
        return Size([*shape[:-1], size, size])

    def inverse_shape(self, shape: Size) -> Size:
        """Of the vectors."""
        size = shape[-1]
        return Size([*shape[:-2], size * (size + 1) // 2])


class LowerCholeskyVector(_Triangle):
    """``(*batch, n (n + 1) / 2)`` to lower triangular matrices with a positive diagonal.

    torch's own map takes ``n * n`` numbers, of which those above the diagonal change nothing, so
    that they have no density.
    """

    codomain = constraints.lower_cholesky

    def log_abs_det_jacobian(self, x: Tensor, _y: Tensor, /) -> Tensor:
        """The sum of the diagonal's logarithms, ``(*batch,)``."""
        return _log_diagonal(x).sum(-1)


class PositiveDefiniteVector(_Triangle):
    r"""``(*batch, n (n + 1) / 2)`` to positive definite matrices :math:`L L^T`.

    The map from L to its entries on and below the diagonal has the Jacobian
    :math:`2^n \prod_i L_{ii}^{n - i + 1}` (Muirhead 1982, Aspects of Multivariate Statistical
    Theory, theorem 2.1.9).
    """

    codomain = constraints.positive_definite

    def _call(self, x: Tensor) -> Tensor:
        lower = super()._call(x)
        return lower @ lower.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return super()._inverse(torch.linalg.cholesky(y))

    def log_abs_det_jacobian(self, x: Tensor, _y: Tensor, /) -> Tensor:
        """Of the exponentials of the diagonal and of the product, ``(*batch,)``."""
        log_diagonal = _log_diagonal(x)
        size = log_diagonal.shape[-1]
        powers = torch.arange(size + 1, 1, -1, dtype=x.dtype, device=x.device)
        return size * math.log(2) + (powers * log_diagonal).sum(-1)


def _log_diagonal(x: Tensor) -> Tensor:
    """The entries of the diagonal, as they stand in a triangle's vector."""
    index = torch.arange(1, _order(x.shape[-1]) + 1, device=x.device)
    return x[..., index * (index + 1) // 2 - 1]


def _order(entries: int) -> int:
    """How many rows a triangle of so many entries has."""
    return int((8 * entries + 1) ** 0.5) // 2


def bijection(support: Constraint) -> Transform:
    """From R^n onto a support; of a circle its chart, which is no bijection.

    Args:
        support: of a continuous distribution.

    Raises:
        NotImplementedError: there is none.
    """
    if isinstance(support, MixtureSameFamilyConstraint):
        return bijection(support.base_constraint)
    if isinstance(support, constraints.independent):
        inner, dims = bijection(support.base_constraint), support.reinterpreted_batch_ndims
        return torch.distributions.IndependentTransform(inner, dims) if dims else inner
    if isinstance(support, Circle):
        return Unwound(support.center)
    if support is constraints.positive_definite:
        return PositiveDefiniteVector()
    if support is constraints.lower_cholesky:
        return LowerCholeskyVector()
    return biject_to(support)


def support_of_site(name: str, fn: Any, known: Constraint | None = None) -> Constraint:
    """The support that a latent site has in this run, of an angle the circle and not the line.

    Args:
        name: the site's.
        fn: its distribution.
        known: the support that it was given at set-up, of which an angle keeps its chart.

    Raises:
        ValueError: the site is discrete, lives on a sphere, or has no support; it names the site.
    """
    kind = type(_innermost(fn)).__name__
    if is_angle(fn):
        return circle_of(fn, 0.0) if known is None else known
    try:
        support = fn.support
    except NotImplementedError as error:
        raise _no_map(name, kind, error) from error
    if support is sphere:
        raise ValueError(
            f"model: latent site {name!r} ({kind}) is a direction on a sphere, onto which there is "
            f"no map from R^n with a density; {SPHERE_ADVICE}"
        )
    if support.is_discrete:
        raise ValueError(
            f"model: latent site {name!r} is a discrete {kind} without finite support; sum it out "
            "by hand, or name it in hide= (it is then drawn from its prior)"
        )
    return support


def bijection_of_site(name: str, fn: Any, known: Constraint | None = None) -> Transform:
    """From R^n onto the support that a latent site has in this run.

    Args:
        name: the site's.
        fn: its distribution.
        known: the support that it was given at set-up, of which an angle keeps its chart.

    Raises:
        ValueError: the site is discrete or lives on a sphere, or there is no such map; it names
            the site.
    """
    support = support_of_site(name, fn, known)
    try:
        return bijection(support)
    except NotImplementedError as error:
        raise _no_map(name, type(_innermost(fn)).__name__, error) from error


def _no_map(name: str, kind: str, error: NotImplementedError) -> ValueError:
    return ValueError(
        f"model: latent site {name!r} ({kind}) has a support that no map from R^n to it is "
        f"known for ({error or 'torch has none'}); write it by pyro.deterministic as a "
        "function of sites with a plain support, or name it in hide="
    )


def _innermost(fn: Any) -> Any:
    """The distribution inside ``Independent`` and ``mask``."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution") and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
