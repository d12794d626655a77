"""Which numbers of a model's vector are global, and which make rows independent given these.

The factors of the joint density tell: a row's numbers are in no factor together with another row's.
What a factor depends on shows in its derivatives, whatever the plates are called and wherever the
data are indexed. (Webb et al. 2018, arXiv:1712.00287, read such independence off a graph.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.programs.log_density import ERRORS, LogDensity

MOST_GLOBALS = 400  # numbers, which have a full covariance
_LEAST_ROWS = 16  # of a site whose rows are worth a look
_LONGEST = 64  # numbers of a row
_MOST_GROUPS = 8  # of rows of different make
_DIGIT = 512  # rows are numbered by two digits, each of which single precision tells exactly
_ALIKE = 1e-2  # relative difference of codes that single precision may make
_POINTS = 3  # at which a factor may show what it depends on


@dataclass(frozen=True)
class Structure:
    """Numbers of a vector in groups of rows, independent given the globals.

    Attributes:
        globals: the places of the globals, ``(G,)``.
        groups: the places of the rows of each group, ``(n, k)``.
        owner: the row that each factor belongs to, counted through all groups from 1 on; 0 of
            those of globals alone, ``(factors,)``.
    """

    globals: Tensor
    groups: tuple[Tensor, ...]
    owner: Tensor

    @property
    def rows(self) -> int:
        """How many rows there are in all groups."""
        return sum(len(group) for group in self.groups)

    @property
    def order(self) -> Tensor:
        """The places of globals, then of the rows one by one, ``(D,)``."""
        return torch.cat([self.globals, *(group.flatten() for group in self.groups)])


class _Numbers(NamedTuple):
    """Rows that a site may be made of: their places, and which of them each factor depends on."""

    places: Tensor  # (rows, numbers)
    row_of: Tensor  # (factors,), -1 for none


def structure_of(log_p: LogDensity, start: Tensor) -> Structure | None:
    """The structure of a model, or None where it has too many globals or no rows.

    Costs some ten runs of the model and their derivatives, for each site of many numbers.

    Args:
        log_p: its log-density.
        start: a vector where it can be run, ``(D,)``.
    """
    points = [start + 0.3 * torch.randn(len(start)).to(start) for _ in range(_POINTS)]
    try:
        probe = _Probe(log_p, points)
        found, begin = [], 0
        for site in log_p.sites:
            size = site.free_shape.numel()
            numbers = torch.arange(begin, begin + size)
            found += [_rows_of(probe, numbers.reshape(site.free_shape))]
            begin += size
        rows = [numbers for numbers in found if numbers is not None]
        structure = _joined(rows, len(start))
    except ERRORS:
        return None
    if structure is None or not _holds(log_p, structure, points):
        return None
    return structure


class _Probe:
    """Which rows the factors depend on, by their derivatives at several points."""

    def __init__(self, log_p: LogDensity, points: Sequence[Tensor]) -> None:
        self.pushes = [pushforward(log_p.factors, point) for point in points]
        self.like = points[0]

    def rows_of_factors(self, places: Tensor) -> Tensor | None:
        """The row among ``(n, m)`` places in each factor, -1 for none; None where one has two."""
        found = None
        count = len(places)
        index = torch.arange(count)
        codes = [torch.ones(count), index % _DIGIT, index // _DIGIT, 1 + torch.rand(count)]
        weight = 0.5 + torch.rand(places.shape)
        tangents = self.like.new_zeros(len(codes), len(self.like))
        for tangent, code in zip(tangents, codes, strict=True):
            tangent[places] = (weight * code[:, None]).to(tangent)
        for push in self.pushes:
            moved = push(tangents)
            if not moved.isfinite().all():
                return None
            touched = moved[0] != 0
            if (moved[:, ~touched] != 0).any():
                return None
            low, high, check = moved[1:] / torch.where(touched, moved[0], 1.0)
            row = (low.round() + _DIGIT * high.round()).long().clamp(0, count - 1)
            off = torch.stack(
                [low - low.round(), high - high.round(), check - codes[3].to(check)[row]]
            )
            if (off[:, touched].abs() > _ALIKE * (1 + 0.5 * low[touched].abs())).any():
                return None
            row = torch.where(touched, row, -1)
            if found is not None:
                both = (found >= 0) & touched
                if (found[both] != row[both]).any():
                    return None
                row = torch.maximum(found, row)
            found = row
        return found


def pushforward(function: Callable[[Tensor], Tensor], point: Tensor) -> Callable[[Tensor], Tensor]:
    """Directional derivatives of a function at a point, by reverse mode taken twice.

    Forward mode lacks the formulas of many a density.

    Args:
        function: of a vector ``(D,)``, with values ``(F,)``.
        point: where.

    Returns:
        A function of tangents ``(t, D)`` with values ``(t, F)``.
    """
    with torch.enable_grad():
        point = point.clone().requires_grad_()
        value = function(point)
        weight = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad(value, point, weight, create_graph=True)

    def push(tangents: Tensor) -> Tensor:
        return torch.stack(
            [torch.autograd.grad(pulled, weight, one, retain_graph=True)[0] for one in tangents]
        )

    return push


def _rows_of(probe: _Probe, numbers: Tensor) -> _Numbers | None:
    """The finest rows of a site that no factor has two of; None where it has no such rows."""
    for dims in range(numbers.dim(), 0, -1):
        for places in {dims: _leading(numbers, dims), -1: _last(numbers)}.values():
            if not len(places) >= _LEAST_ROWS or places.shape[1] > _LONGEST:
                continue
            row_of = probe.rows_of_factors(places)
            if row_of is not None:
                return _Numbers(places, row_of)
    return None


def _leading(numbers: Tensor, dims: int) -> Tensor:
    """Rows along so many leading dimensions."""
    return numbers.reshape(numbers.shape[:dims].numel(), -1)


def _last(numbers: Tensor) -> Tensor:
    """Rows along the last dimension."""
    return numbers.movedim(-1, 0).reshape(numbers.shape[-1], -1)


def _joined(rows: list[_Numbers], size: int) -> Structure | None:
    """Rows of several sites that meet in factors as rows of one; sites that tie all up global."""
    rows = sorted(rows, key=lambda numbers: len(numbers.places), reverse=True)
    while rows:
        component, kept = _components(rows)
        lengths = torch.bincount(component)
        if lengths.max() <= _LONGEST:
            groups = _groups(component, kept)
            if len(groups) <= _MOST_GROUPS:
                break
        rows = rows[:-1]
    else:
        return None
    is_global = torch.ones(size, dtype=torch.bool)
    is_global[kept] = False
    places = is_global.nonzero()[:, 0]
    if len(places) > MOST_GLOBALS:
        return None
    return Structure(places, groups, _owner(rows, groups, size))


def _components(rows: list[_Numbers]) -> tuple[Tensor, Tensor]:
    """The component of each number and its place, both ``(numbers,)``."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    counts = [len(numbers.places) for numbers in rows]
    offsets = [sum(counts[:i]) for i in range(len(counts))]
    nodes = torch.stack(
        [
            torch.where(numbers.row_of >= 0, numbers.row_of + offset, -1)
            for numbers, offset in zip(rows, offsets, strict=True)
        ]
    )
    one, other = [], []
    last = nodes[0]
    for now in nodes[1:]:
        both = (last >= 0) & (now >= 0)
        one.append(last[both])
        other.append(now[both])
        last = torch.where(now >= 0, now, last)
    ends = torch.cat([torch.empty(0, dtype=torch.long), *one]).numpy()
    others = torch.cat([torch.empty(0, dtype=torch.long), *other]).numpy()
    total = sum(counts)
    graph = coo_array(([1] * len(ends), (ends, others)), shape=(total, total))
    label = torch.as_tensor(connected_components(graph, directed=False)[1]).long()
    of_numbers = [
        label[offset : offset + count, None].expand(-1, numbers.places.shape[1])
        for numbers, offset, count in zip(rows, offsets, counts, strict=True)
    ]
    component = torch.cat([part.reshape(-1) for part in of_numbers])
    return component, torch.cat([numbers.places.reshape(-1) for numbers in rows])


def _groups(component: Tensor, places: Tensor) -> tuple[Tensor, ...]:
    """The places of components of equal length together, ``(n, k)`` each."""
    order = places.argsort()
    order = order[component[order].argsort(stable=True)]
    component, places = component[order], places[order]
    length = torch.bincount(component)[component]
    groups = [places[length == k].reshape(-1, int(k)) for k in length.unique()]
    # In the order of their first numbers, so that neighbours in the vector are neighbours here.
    return tuple(group[group[:, 0].argsort()] for group in groups)


def _owner(rows: list[_Numbers], groups: tuple[Tensor, ...], size: int) -> Tensor:
    """The row of all groups, from 1 on, that each factor belongs to; 0 for none."""
    row_of_place = torch.zeros(size, dtype=torch.long)
    begin = 1
    for group in groups:
        row_of_place[group] = torch.arange(begin, begin + len(group))[:, None]
        begin += len(group)
    owner = torch.zeros_like(rows[0].row_of)
    for numbers in rows:
        touched = numbers.row_of >= 0
        first = numbers.places[numbers.row_of.clamp(min=0), 0]
        owner = torch.where(touched, row_of_place[first], owner)
    return owner


def by_row(factors: Tensor, structure: Structure) -> Tensor:
    """Log-densities by row, those of globals first, ``(*batch, 1 + rows)``.

    Args:
        factors: ``(*batch, factors)``, in nats.
        structure: of the model.
    """
    total = factors.new_zeros(*factors.shape[:-1], 1 + structure.rows)
    return total.index_add(-1, structure.owner.to(factors.device), factors)


@torch.no_grad()
def _holds(log_p: LogDensity, structure: Structure, points: Sequence[Tensor]) -> bool:
    """Whether rows, moved one half of them, leave the other half's densities as they were."""
    for point in points[:2]:
        moved = torch.rand(1 + structure.rows) < 0.5
        moved[0] = False
        other, begin = point.clone(), 1
        for group in structure.groups:
            chosen = group[moved[begin : begin + len(group)]]
            other[chosen] += torch.randn(chosen.shape).to(other)
            begin += len(group)
        before, after = (by_row(log_p.factors(x), structure) for x in (point, other))
        stays = ~moved
        near = torch.isclose(before[stays], after[stays], rtol=1e-5, atol=1e-5)
        if not near.all() or not math.isfinite(before.sum()):
            return False
    return True
