"""Where chains over the globals of a model walk to, that a guide hardly draws.

Weights tell nothing of a tail where the guide does not draw: where a spread may be nothing, its
logarithm has such a tail.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from pyroflows.distributions.flow import Flow
from pyroflows.programs.log_density import LogDensity
from pyroflows.structured.laplace import RowLaplace
from pyroflows.structured.structure import Structure
from pyroflows.transforms import Chain
from pyroflows.transforms.rows import RowsGivenGlobals, WhitenRows

_CHAINS, _STEPS = 20, 40
_OPTIMAL = 2.4  # over the root of the dimension: a random walk's step (Roberts et al. 1997)
_DRAWS = 256  # by which the guide's spread is seen
_THIN = math.log(10)  # nats by which a guide's density is too low for mass to be covered by it
_WORTH = 0.02  # share of the posterior that is worth a word


@torch.no_grad()
def share_beyond_of_globals(
    log_p: LogDensity, flow: Flow, structure: Structure
) -> tuple[float, Tensor] | None:
    """The share of the posterior that chains walk into, where a guide has hardly any density.

    Random walks over the globals start from the guide's draws, the rows integrated by Laplace's
    approximation at each step: 800 searches for the rows' modes. They may not have come as far as
    they would, so the share is a lower bound, but for the approximation's error.

    Args:
        log_p: of the model.
        flow: of the guide.
        structure: of the model.

    Returns:
        The share where the globals' density by the guide is below a tenth of what it should be, and
        points from there, ``(n, D)``; None where it is below 2 %.
    """
    rows, whiten = cast(Chain, flow.transform)
    rows, whiten = cast(RowsGivenGlobals, rows), cast(WhitenRows, whiten)
    if rows.outer is None:
        return None
    laplace = RowLaplace(log_p, structure)
    count = len(structure.globals)
    spread = _whitened(whiten, flow.sample((_DRAWS,))).std(0)
    latent = list(flow.sample((_CHAINS,)))
    at = _whitened(whiten, torch.stack(latent))
    value = _values(laplace, latent)
    # The walk's densities are compared to the guide's with the constant by which both are one.
    constant = (value - _log_q(rows, at)).logsumexp(0) - math.log(_CHAINS)
    bare, points = 0, []
    for step in range(_STEPS):
        there = at + _OPTIMAL / count**0.5 * spread * torch.randn_like(at)
        moved = [
            one.index_copy(0, structure.globals, whiten.loc + whiten.tril @ u)
            for one, u in zip(latent, there, strict=True)
        ]
        found = _values(laplace, moved)
        takes = torch.rand(_CHAINS).to(value).log() < found - value
        at = torch.where(takes[:, None], there, at)
        value = torch.where(takes, found, value)
        latent = [new if take else old for new, old, take in zip(moved, latent, takes, strict=True)]
        if 2 * step >= _STEPS:
            missing = value - constant - _log_q(rows, at) > _THIN
            bare += int(missing.sum())
            points += [one for one, out in zip(latent, missing, strict=True) if out]
    share = bare / (_CHAINS * (_STEPS - _STEPS // 2))
    return (share, torch.stack(points)) if share > _WORTH else None


def _values(laplace: RowLaplace, latent: list[Tensor]) -> Tensor:
    """Log-densities of the globals of vectors, whose rows are put at their modes."""
    values = []
    for index, one in enumerate(latent):
        value, latent[index] = laplace.value_at_modes(one)
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def _whitened(whiten: WhitenRows, latent: Tensor) -> Tensor:
    """The globals of vectors ``(n, D)`` in standard deviations of the start, ``(n, G)``."""
    off = latent[:, whiten.order[: whiten.layout.globals]] - whiten.loc
    return torch.linalg.solve_triangular(whiten.tril.mT, off, upper=True, left=False)


def _log_q(rows: RowsGivenGlobals, at: Tensor) -> Tensor:
    """The guide's log-density of whitened globals ``(n, G)``, in nats."""
    assert rows.outer is not None
    base, log_det = rows.outer.inverse_and_log_det(at)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(base).sum(-1)
    return (normal + log_det).double()
