r"""Importance weights of the globals, the rows integrated one by one.

With K points :math:`l_{ik}` of the guide in each row, given a draw g of its globals,

.. math:: \hat w = \frac{p(g)}{q(g)} \prod_i \frac1K \sum_k
          \frac{p(l_{ik}, y_i \mid g)}{q(l_{ik} \mid g)}

has the mean of the plain weight, the evidence, without bias for any K (Andrieu & Roberts 2009,
doi:10.1214/07-AOS574), and a spread that no longer grows with the number of rows as the plain one's
does. The points are a lattice moved at random in each row, which integrates smooth rows well.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from pyroflows.distributions.flow import Flow
from pyroflows.programs.log_density import LogDensity
from pyroflows.structured.structure import Structure, by_row
from pyroflows.transforms import Chain
from pyroflows.transforms.rows import RowsGivenGlobals, WhitenRows

POINTS = 16  # of each row
_NUMBERS = 2**31  # that all runs of the model together may have
_KEPT = 2**22  # numbers of all draws
_LEAST = 200  # draws


class IntegratedDraws(NamedTuple):
    """Draws of a structured guide, weighted with their rows integrated.

    Attributes:
        picked: one point of each row, picked by weight given the globals, ``(draws, D)``.
        log_p: of the globals and the data, in nats, ``(draws,)``.
        log_q: of the globals by the guide, ``(draws,)``.
        by_weight: the mean of each number over its row's points by weight, ``(draws, D)``.
        plain: the mean over them as the guide draws them.
        gap: by how many nats the guide's rows are below their evidence, over all rows, a mean.
    """

    picked: Tensor
    log_p: Tensor
    log_q: Tensor
    by_weight: Tensor
    plain: Tensor
    gap: Tensor


def worth(log_p: LogDensity, num_samples: int) -> int:
    """How many draws are worth their cost, 200 at the least where so many are asked for.

    Args:
        log_p: of the model.
        num_samples: how many are asked for.
    """
    size = sum(site.free_shape.numel() for site in log_p.sites)
    most = min(_NUMBERS // (POINTS * (log_p.numbers or size)), _KEPT // size)
    return min(num_samples, max(_LEAST, most))


@torch.no_grad()
def integrated_draws(
    log_p: LogDensity, flow: Flow, structure: Structure, count: int
) -> IntegratedDraws:
    """Draws of the guide, each with 16 points in every row.

    Costs 16 runs of model and flow a draw, side by side as memory allows.

    Args:
        log_p: of the model.
        flow: of the guide.
        structure: of the model.
        count: how many.
    """
    at_once = max(1, log_p.at_once // POINTS)
    parts = [
        _drawn(log_p, flow, structure, min(at_once, count - start))
        for start in range(0, count, at_once)
    ]
    return IntegratedDraws(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _drawn(log_p: LogDensity, flow: Flow, structure: Structure, count: int) -> IntegratedDraws:
    rows, whiten = cast(Chain, flow.transform)
    rows, whiten = cast(RowsGivenGlobals, rows), cast(WhitenRows, whiten)
    base = _base_points(rows, count)
    y, log_dets = rows.forward_by_row(base)
    latent, more = whiten.forward_by_row(y)
    log_q = _normal_by_row(rows, base) - log_dets - more
    model = by_row(log_p.factors(latent.flatten(0, 1)), structure).unflatten(0, (count, POINTS))
    log_w = (model - log_q).double()
    of_rows = log_w[..., 1:]  # (draws, points, rows)
    share = of_rows.softmax(1)
    evidence = (of_rows.logsumexp(1) - torch.log(torch.tensor(float(POINTS)))).sum(-1)
    elbo = of_rows.mean(1).sum(-1)
    number = _row_of_number(structure)
    is_row = number >= 0
    by_weight, plain, picked = (latent[:, 0].clone() for _ in range(3))
    weight = share[..., number[is_row]].to(latent)
    values = latent[..., is_row]
    by_weight[:, is_row] = (weight * values).sum(1)
    plain[:, is_row] = values.mean(1)
    chosen = torch.multinomial(share.movedim(1, -1).reshape(-1, POINTS), 1)
    chosen = chosen.reshape(count, 1, -1)[..., number[is_row]]
    picked[:, is_row] = values.gather(1, chosen)[:, 0]
    first = log_w[:, 0, 0]
    of_globals = log_q[:, 0, 0].double()
    return IntegratedDraws(
        picked,
        first + of_globals + evidence,
        of_globals,
        by_weight,
        plain,
        evidence - elbo,
    )


def _base_points(rows: RowsGivenGlobals, count: int) -> Tensor:
    """Points of the base, ``(draws, points, D)``: globals repeated, rows on a moved lattice."""
    layout = rows.layout
    kind = rows.row_loc[0]
    first = torch.randn(count, 1, layout.globals).to(kind).expand(-1, POINTS, -1)
    parts = []
    for n, k in layout.groups:
        lattice = torch.quasirandom.SobolEngine(k).draw(POINTS)
        moved = torch.rand(count, 1, n, k, dtype=torch.float64)
        at = (lattice[:, None].double() + moved) % 1
        tiny = 1e-12
        parts.append(torch.special.ndtri(at.clamp(tiny, 1 - tiny)).to(kind))
    return layout.join(first, parts)


def _normal_by_row(rows: RowsGivenGlobals, base: Tensor) -> Tensor:
    """The base's log-densities of globals and rows, ``(*batch, 1 + rows)``."""
    first, parts = rows.layout.split(torch.distributions.Normal(0.0, 1.0).log_prob(base))
    return torch.cat([first.sum(-1, keepdim=True), *(part.sum(-1) for part in parts)], dim=-1)


def _row_of_number(structure: Structure) -> Tensor:
    """The row that each number of the vector is in, from 0 on; -1 of globals, ``(D,)``."""
    row = torch.full((len(structure.order),), -1)
    begin = 0
    for group in structure.groups:
        row[group] = torch.arange(begin, begin + len(group))[:, None]
        begin += len(group)
    return row
