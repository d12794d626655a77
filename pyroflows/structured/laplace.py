r"""Rows at their modes, all at once, and the density of the globals with the rows integrated.

.. math:: \log p(g, y) \approx \log p(g, \hat l(g), y) + \sum_i \tfrac{k_i}2 \log 2\pi
          - \tfrac12 \log\det A_i(g)

with each row's mode and precision given g: Laplace's approximation, as of Rue, Martino & Chopin
2009 (INLA), doi:10.1111/j.1467-9868.2008.00700.x. Rows are independent given the globals, so that
one derivative of their sum is that of each, and k second derivatives are all their matrices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.programs.log_density import ERRORS, LogDensity
from pyroflows.structured.structure import Structure, by_row

_ITERATIONS = 40
_ARRIVED = 1e-3  # nats that a step of all rows may gain at their modes
_SHORTER = 0.3
_HALVINGS = 12
_ROUNDING = 1e-6  # of a row's density, by which it may fall


class Rows(NamedTuple):
    """The rows of a model at a vector.

    Attributes:
        values: log-densities of the globals alone, then of each row, ``(1 + rows,)``.
        gradients: of each group, ``(n, k)``.
        precisions: minus the second derivatives, ``(n, k, k)``.
    """

    values: Tensor
    gradients: list[Tensor]
    precisions: list[Tensor]


class Marginal(NamedTuple):
    """The density of globals by Laplace's approximation of the rows.

    Attributes:
        value: in nats; minus infinity where a row has no maximum.
        gradient: along the globals, ``(G,)``.
        latent: the vector with the rows at their modes, ``(D,)``.
        precisions: of the rows of each group there.
    """

    value: float
    gradient: Tensor
    latent: Tensor
    precisions: list[Tensor]


class RowLaplace:
    """A model whose rows are moved to their modes.

    Args:
        log_p: its log-density.
        structure: its globals and rows.
    """

    def __init__(self, log_p: LogDensity, structure: Structure) -> None:
        self.log_p, self.structure = log_p, structure

    def values(self, latent: Tensor) -> Tensor:
        """Log-densities of globals and rows at a vector, ``(1 + rows,)``."""
        return by_row(self.log_p.factors(latent), self.structure)

    @torch.enable_grad()
    def rows(self, latent: Tensor, graph: bool = False) -> Rows:
        """Values and two derivatives of the rows.

        Args:
            latent: the vector, ``(D,)``; attached where ``graph`` is wanted.
            graph: keep the graph of the derivatives.
        """
        if not graph:
            latent = latent.detach().requires_grad_()
        values = self.values(latent)
        (gradient,) = torch.autograd.grad(values[1:].sum(), latent, create_graph=True)
        groups = self.structure.groups
        columns: list[list[Tensor]] = [[] for _ in groups]
        for c in range(max(group.shape[1] for group in groups)):
            tangent = torch.zeros_like(latent)
            for group in groups:
                if c < group.shape[1]:
                    tangent[group[:, c]] = 1
            (second,) = torch.autograd.grad(
                (gradient * tangent).sum(),
                latent,
                retain_graph=True,
                create_graph=graph,
                materialize_grads=True,
                allow_unused=True,
            )
            for group, column in zip(groups, columns, strict=True):
                if c < group.shape[1]:
                    column.append(-second[group])
        stacked = [torch.stack(column, dim=-1) for column in columns]
        precisions = [0.5 * (matrix + matrix.mT) for matrix in stacked]
        found = Rows(values, [gradient[group] for group in groups], precisions)
        if graph:
            return found
        return Rows(values.detach(), [g.detach() for g in found.gradients], precisions)

    def at_modes(self, latent: Tensor) -> Tensor:
        """The vector with each row at its mode, given the globals: Newton steps, row by row.

        Args:
            latent: where they start.
        """
        for _ in range(_ITERATIONS):
            rows = self.rows(latent)
            steps = [
                _ascent(gradient, precision)
                for gradient, precision in zip(rows.gradients, rows.precisions, strict=True)
            ]
            gains = [(g * s).sum() for g, s in zip(rows.gradients, steps, strict=True)]
            latent = self._moved(latent, steps, rows.values)
            # The last step too: curvatures are off by what modes are, not by its square.
            if not 0.5 * torch.stack(gains).sum() > _ARRIVED:
                break
        return latent

    @torch.no_grad()
    def _moved(self, latent: Tensor, steps: list[Tensor], before: Tensor) -> Tensor:
        """The vector a step on, each row's as long as raises its own density."""
        groups = self.structure.groups
        length = torch.ones_like(before[1:])
        lowest = before[1:] - _ROUNDING * (1 + before[1:].abs())
        for _ in range(_HALVINGS):
            there, parts = latent.clone(), length.split([len(group) for group in groups])
            for group, step, part in zip(groups, steps, parts, strict=True):
                there[group] = latent[group] + part[:, None] * step
            short = ~(self.values(there)[1:] >= lowest)
            if not short.any():
                return there
            length = torch.where(short, _SHORTER * length, length)
        return latent

    def value(self, latent: Tensor) -> float:
        """The density of the globals of a vector, in nats; minus infinity where there is none.

        Args:
            latent: ``(D,)``, from whose rows modes are found.
        """
        return self.value_at_modes(latent)[0]

    def value_at_modes(self, latent: Tensor) -> tuple[float, Tensor]:
        """The same, and the vector with its rows at their modes.

        Args:
            latent: ``(D,)``.
        """
        try:
            latent = self.at_modes(latent)
            rows = self.rows(latent)
        except ERRORS:
            return -math.inf, latent
        terms = [_laplace_terms(precision).double().sum() for precision in rows.precisions]
        value = float(rows.values.double().sum() + torch.stack(terms).sum())
        return value if math.isfinite(value) else -math.inf, latent

    def marginal(self, latent: Tensor) -> Marginal:
        """The density of the globals of a vector, and its gradient; modes are found from its rows.

        The modes move with the globals as the implicit function theorem says, and the curvatures
        with both: three derivatives of the model.

        Args:
            latent: ``(D,)``.
        """
        latent = self.at_modes(latent)
        plain = self.rows(latent)
        places = self.structure.globals
        with torch.enable_grad():
            g = latent[places].detach().requires_grad_()
            fixed = latent.detach().clone().requires_grad_()
            (pull,) = torch.autograd.grad(
                self.values(fixed.index_copy(0, places, g))[1:].sum(), fixed, create_graph=True
            )
            moved = latent.detach().index_copy(0, places, g)
            for group, precision in zip(self.structure.groups, plain.precisions, strict=True):
                step = _solve(precision, pull[group])
                at = latent[group].detach() + step - step.detach()
                moved = moved.index_copy(0, group.flatten(), at.flatten())
            rows = self.rows(moved, graph=True)
            value = rows.values.double().sum()
            for precision in rows.precisions:
                value = value + _laplace_terms(precision).double().sum()
            (gradient,) = torch.autograd.grad(value, g, materialize_grads=True, allow_unused=True)
        finite = bool(value.isfinite() & gradient.isfinite().all())
        return Marginal(
            value.item() if finite else -math.inf, gradient.detach(), latent, plain.precisions
        )


def _laplace_terms(precision: Tensor) -> Tensor:
    """Logarithms of the integrals of Gaussians of height one, ``(n,)``; NaN without a maximum."""
    size = precision.shape[-1]
    if size == 1:
        log_det = precision[..., 0, 0].log()
    else:
        tril, info = torch.linalg.cholesky_ex(precision)
        log_det = 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_det = torch.where(info == 0, log_det, math.nan)
    return 0.5 * (size * math.log(2 * math.pi) - log_det)


def _solve(precision: Tensor, right: Tensor) -> Tensor:
    """``A_i^-1 b_i`` of each row, ``(n, k)``."""
    if right.shape[-1] == 1:
        return right / precision[..., 0]
    return torch.linalg.solve(precision, right[..., None])[..., 0]


def _ascent(gradient: Tensor, precision: Tensor) -> Tensor:
    """Newton steps upwards: directions without curvature of the right sign get its size."""
    if gradient.shape[-1] == 1:
        return gradient / precision[..., 0].abs().clamp(min=1e-6)
    strength, axes = torch.linalg.eigh(precision)
    strength = strength.abs()
    strength = strength.clamp(min=1e-6).maximum(1e-6 * strength.amax(-1, keepdim=True))
    along = (axes.mT @ gradient[..., None]) / strength[..., None]
    return (axes @ along)[..., 0]
