"""Ascents to the mode of a model's globals, its rows integrated by Laplace's approximation."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroflows.programs.log_density import ERRORS
from pyroflows.structured.laplace import Marginal, RowLaplace

_ITERATIONS = 40
_ARRIVED = 0.02  # nats that a step may gain at the mode
_LENGTHS = 12
_STEEP = 0.5  # share of a density's slope along a step that is left at the end of a short one


def climbed(laplace: RowLaplace, at: Marginal, tril: Tensor) -> list[Marginal]:
    """The way to a maximum over the globals by BFGS (Nocedal & Wright 2006, section 6.1).

    Args:
        laplace: the model.
        at: where it starts.
        tril: a factor of a covariance to start with, ``(G, G)``.

    Returns:
        The points of the way, ``at`` first.
    """
    way = [at]
    places = laplace.structure.globals
    covariance = (tril @ tril.mT).double()
    for _ in range(_ITERATIONS):
        gradient = at.gradient.double()
        step = covariance @ gradient
        if not 0.5 * step @ gradient > _ARRIVED:
            break
        found = _along(laplace, at, step.to(tril))
        if found is None:
            break
        moved = (found.latent[places] - at.latent[places]).double()
        change = gradient - found.gradient.double()
        curved = moved @ change
        if curved > 0:
            back = torch.eye(len(moved)).to(moved) - torch.outer(moved, change) / curved
            covariance = back @ covariance @ back.mT + torch.outer(moved, moved) / curved
        at = found
        way.append(at)
    return way


def _along(laplace: RowLaplace, at: Marginal, step: Tensor) -> Marginal | None:
    """A higher point along a step: twice as far while it rises steeply, else half as far."""
    best: Marginal | None = None
    length = 1.0
    for _ in range(_LENGTHS):
        there = at.latent.clone()
        there[laplace.structure.globals] += length * step
        try:
            found: Marginal | None = laplace.marginal(there)
        except (*ERRORS, torch.linalg.LinAlgError):
            found = None
        if found is not None and found.value > (best or at).value:
            if found.gradient @ step < _STEEP * (at.gradient @ step):
                return found
            best, length = found, 2 * length
        elif best is not None:
            return best
        else:
            length *= 0.5
    return best


@torch.enable_grad()
def by_curvature(laplace: RowLaplace, at: Marginal) -> Tensor:
    """A factor ``(G, G)`` of the globals' covariance by the joint curvature, rows eliminated.

    That of the rows' integral but for how the rows' own curvatures change.

    Args:
        laplace: the model.
        at: where.
    """
    latent = at.latent.detach().requires_grad_()
    places, groups = laplace.structure.globals, laplace.structure.groups
    (gradient,) = torch.autograd.grad(laplace.values(latent).sum(), latent, create_graph=True)
    precision = []
    factors = [inverse_factor(matrix) for matrix in at.precisions]
    across = []
    for place in places:
        (second,) = torch.autograd.grad(gradient[place], latent, retain_graph=True)
        precision.append(-second[places])
        across.append(
            torch.cat(
                [
                    (factor.mT @ second[group][..., None]).flatten()
                    for factor, group in zip(factors, groups, strict=True)
                ]
            )
        )
    rows = torch.stack(across)
    schur = torch.stack(precision) - rows @ rows.mT
    return inverse_root(0.5 * (schur + schur.mT))


def inverse_root(precision: Tensor) -> Tensor:
    """A lower factor of the inverse; directions of the wrong sign get the size of theirs.

    Args:
        precision: symmetric, ``(G, G)``.
    """
    strength, axes = torch.linalg.eigh(precision.double())
    strength = strength.abs()
    strength = strength.clamp(min=1e-12).maximum(1e-9 * strength.max())
    scales = axes / strength.sqrt()
    upper = torch.linalg.qr(scales.mT).R
    return (upper * upper.diagonal().sign()[:, None]).mT.to(precision)


def inverse_factor(precision: Tensor) -> Tensor:
    """Lower factors of the inverses of positive definite matrices, ``(n, k, k)``.

    Args:
        precision: the matrices.
    """
    if precision.shape[-1] == 1:
        return precision.rsqrt()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))
