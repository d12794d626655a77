"""Where the guide of a structured model starts: Gaussians of its globals, and of rows given them.

The globals' is at the mode of their density with the rows integrated by Laplace's approximation:
the mode of all numbers together is useless in a hierarchy, where scales shrink to nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.programs.log_density import ERRORS, LogDensity
from pyroflows.structured.laplace import Marginal, RowLaplace
from pyroflows.structured.structure import Structure
from pyroflows.transforms.rows import Arrow, RowGaussian

_ITERATIONS = 40
_ARRIVED = 0.02  # nats that a step may gain at the mode
_ROUNDS = 6  # of second derivatives by differences
_STEP = 0.5  # standard deviations over which these are taken
_LENGTHS = 12
_STEEP = 0.5  # share of a density's slope along a step that is left at the end of a short one


class RowSlopes(NamedTuple):
    """How rows' locations and log-scales move with the globals, ``(n, k, G)`` each."""

    loc: Tensor
    log_scale: Tensor


def arrow_start(log_p: LogDensity, structure: Structure, start: Tensor) -> Arrow | None:
    """The Gaussians, or None where no maximum is found.

    Costs up to 40 iterations of some ten runs and a derivative for each global, then twice as many
    times as there are globals the derivatives of the rows' integral.

    Args:
        log_p: the log-density of the model.
        structure: its globals and rows.
        start: a vector where it is finite, ``(D,)``.
    """
    laplace = RowLaplace(log_p, structure)
    try:
        at = laplace.marginal(start)
        if not math.isfinite(at.value):
            return None
        count = len(structure.globals)
        tril = start.new_zeros(0, 0)
        if count:
            at = _climbed(laplace, at, _by_curvature(laplace, at), _ITERATIONS)
            tril = _by_curvature(laplace, at)
            for _ in range(_ROUNDS):
                curvature, slopes = _differences(laplace, at, tril)
                better = _factor(curvature)
                slopes = [RowSlopes(*(part @ better for part in group)) for group in slopes]
                tril, before = tril @ better, at
                at = _climbed(laplace, at, tril, _ITERATIONS)
                if at is before:
                    break
    except (*ERRORS, torch.linalg.LinAlgError):
        return None
    rows = []
    for j, (group, precision) in enumerate(zip(structure.groups, at.precisions, strict=True)):
        factor = _inverse_factor(precision)
        none = start.new_zeros(*group.shape, count)
        slope, log_slope = slopes[j] if count else RowSlopes(none, none)
        rows.append(RowGaussian(at.latent[group], slope, factor, log_slope))
    arrow = Arrow(structure.order, at.latent[structure.globals], tril, rows)
    parts = [arrow.loc, tril, *(part for row in rows for part in row)]
    return arrow if all(part.isfinite().all() for part in parts) else None


def _climbed(laplace: RowLaplace, at: Marginal, tril: Tensor, most: int) -> Marginal:
    """The maximum over the globals by BFGS, from a factor of their covariance (Nocedal 2006)."""
    places = laplace.structure.globals
    covariance = (tril @ tril.mT).double()
    for _ in range(most):
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
    return at


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
def _by_curvature(laplace: RowLaplace, at: Marginal) -> Tensor:
    """A factor ``(G, G)`` of the globals' covariance by the joint curvature, rows eliminated."""
    latent = at.latent.detach().requires_grad_()
    places, groups = laplace.structure.globals, laplace.structure.groups
    (gradient,) = torch.autograd.grad(laplace.values(latent).sum(), latent, create_graph=True)
    precision = []
    factors = [_inverse_factor(matrix) for matrix in at.precisions]
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
    return _factor(0.5 * (schur + schur.mT))


def _differences(laplace: RowLaplace, at: Marginal, tril: Tensor) -> tuple[Tensor, list[RowSlopes]]:
    """The globals' precision in units of a factor, ``(G, G)``, and how the rows move with these."""
    groups = laplace.structure.groups
    columns = []
    moves: list[list[tuple[Tensor, Tensor]]] = [[] for _ in groups]
    for axis in tril.mT:
        ends = []
        for sign in (_STEP, -_STEP):
            there = at.latent.clone()
            there[laplace.structure.globals] += sign * axis
            found = laplace.marginal(there)
            ends.append(found if math.isfinite(found.value) else at)
        width = _STEP * sum(end is not at for end in ends)
        if not width:
            raise ValueError("model: its density is finite on neither side of its mode")
        up, down = ends
        columns.append(-tril.mT @ (up.gradient - down.gradient) / width)
        for j, group in enumerate(groups):
            loc = (up.latent[group] - down.latent[group]) / width
            log_scale = (_log_scale(up.precisions[j]) - _log_scale(down.precisions[j])) / width
            moves[j].append((loc, log_scale))
    curvature = torch.stack(columns)
    slopes = [
        RowSlopes(*(torch.stack(parts, dim=-1) for parts in zip(*group, strict=True)))
        for group in moves
    ]
    return 0.5 * (curvature + curvature.mT), slopes


def _log_scale(precision: Tensor) -> Tensor:
    return _inverse_factor(precision).diagonal(dim1=-2, dim2=-1).log()


def _inverse_factor(precision: Tensor) -> Tensor:
    """Lower factors of the inverses, ``(n, k, k)``."""
    if precision.shape[-1] == 1:
        return precision.rsqrt()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))


def _factor(precision: Tensor) -> Tensor:
    """A lower factor of the inverse; directions of the wrong sign get the size of theirs."""
    strength, axes = torch.linalg.eigh(precision.double())
    strength = strength.abs()
    strength = strength.clamp(min=1e-12).maximum(1e-9 * strength.max())
    scales = axes / strength.sqrt()
    upper = torch.linalg.qr(scales.mT).R
    return (upper * upper.diagonal().sign()[:, None]).mT.to(precision)
