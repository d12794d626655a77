"""Where the guide of a structured model starts: Gaussians of its globals, and of rows given them.

The globals' is at the mode of their density with the rows integrated by Laplace's approximation:
the mode of all numbers together is useless in a hierarchy, where scales shrink to nothing.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.programs.log_density import ERRORS, LogDensity
from pyroflows.structured.ascent import by_curvature, climbed, inverse_factor, inverse_root
from pyroflows.structured.laplace import Marginal, RowLaplace
from pyroflows.structured.structure import Structure
from pyroflows.transforms.rows import Arrow, RowGaussian

_ROUNDS = 6  # of second derivatives by differences
_STEP = 0.5  # standard deviations over which these are taken
_JUDGED = 5  # points of an ascent
_DRAWS = 8  # by which a Gaussian is judged


class RowSlopes(NamedTuple):
    """How rows' locations and log-scales move with the globals, ``(n, k, G)`` each."""

    loc: Tensor
    log_scale: Tensor


class _Start(NamedTuple):
    """Where the globals are, a factor of their covariance, and how rows move with them."""

    at: Marginal
    tril: Tensor
    slopes: list[RowSlopes]


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
        if len(structure.globals):
            at, tril, slopes = _of_globals(laplace, at)
        else:
            none = [start.new_zeros(*group.shape, 0) for group in structure.groups]
            tril, slopes = start.new_zeros(0, 0), [RowSlopes(each, each) for each in none]
    except (*ERRORS, torch.linalg.LinAlgError):
        return None
    rows = [
        RowGaussian(at.latent[group], slope, inverse_factor(precision), log_slope)
        for group, precision, (slope, log_slope) in zip(
            structure.groups, at.precisions, slopes, strict=True
        )
    ]
    arrow = Arrow(structure.order, at.latent[structure.globals], tril, rows)
    parts = [arrow.loc, tril, *(part for row in rows for part in row)]
    return arrow if all(part.isfinite().all() for part in parts) else None


def _of_globals(laplace: RowLaplace, at: Marginal) -> _Start:
    """The Gaussian at the maximum, or the one on the way there that has the best ELBO.

    Where globals are themselves a hierarchy, the maximum is at a scale of nothing.
    """
    way = climbed(laplace, at, by_curvature(laplace, at))
    starts = []
    try:
        tril = by_curvature(laplace, way[-1])
        for _ in range(_ROUNDS):
            starts = [_with_slopes(laplace, way[-1], tril)]
            tril = starts[0].tril
            more = climbed(laplace, way[-1], tril)
            if len(more) == 1:
                break
            way += more[1:]
    except (*ERRORS, torch.linalg.LinAlgError):  # the way led to where the density has no end
        starts = []
    for each in way[:: -max(1, len(way) // _JUDGED)]:
        with contextlib.suppress(*ERRORS, torch.linalg.LinAlgError):
            starts.append(_Start(each, by_curvature(laplace, each), []))
    best = max(starts, key=lambda start: _elbo(laplace, start))
    return best if best.slopes else _with_slopes(laplace, best.at, best.tril)


def _with_slopes(laplace: RowLaplace, at: Marginal, tril: Tensor) -> _Start:
    """The factor by differences in units of another one, and the slopes of rows in those of it."""
    curvature, slopes = _differences(laplace, at, tril)
    better = inverse_root(curvature)
    slopes = [RowSlopes(*(part @ better for part in group)) for group in slopes]
    return _Start(at, tril @ better, slopes)


def _elbo(laplace: RowLaplace, start: _Start) -> float:
    """Of a Gaussian of the globals in nats, but for a constant."""
    half = torch.randn(_DRAWS // 2, len(start.tril)).to(start.tril)
    total = 0.0
    for noise in torch.cat([half, -half]):
        there = start.at.latent.clone()
        there[laplace.structure.globals] += start.tril @ noise
        total += laplace.value(there) / _DRAWS
    return total + start.tril.diagonal().log().sum().item()


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
    return inverse_factor(precision).diagonal(dim1=-2, dim2=-1).log()
