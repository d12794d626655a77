"""How far the values of a column usually go: what no tail of theirs explains is wild."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 5  # values on one side of the median, below which there is no tail to speak of
LEAST_GAP = 10.0  # training copes with what is nearer than so many times the reach of the others
_SHARE = 0.04  # of the values on one side, which may be wild
_TAIL = 5  # times as many: the values that show how the tail falls off
_CHANCE = 9.2  # minus the log of 1e-4, the chance of such a gap under that tail
_SAMPLE = 5_000  # rows that show the tail
_DISTINCT = 20  # other values, below which a column is one of codes altogether
_PLACES = 1_000_000  # of a column, that show its median


@dataclass(frozen=True)
class Reach:
    r"""How far the values of each column go, on either side of its median, without the wild ones.

    The distances :math:`D_1 \ge D_2 \ge \dots` from the median fall off like some power of the
    rank, :math:`D_i \propto i^{-E}`, where the tail of the column says how fast (Hill 1975, Annals
    of Statistics 3(5)). Under such a tail the largest is ``g`` times the next with probability
    :math:`g^{-1/E}`. A gap of which the chance is below 1e-4, and of a factor of 10 at least, is
    no part of the tail: what lies beyond is wild. So heavy tails have long reaches, and a Cauchy's
    largest value is not wild while a Gaussian's at the same place is.

    Attributes:
        low: ``(columns,)``; minus infinity where too few values differ from the median.
        high: as ``low``.

    Example:
        >>> import torch
        >>> values = torch.linspace(-1.0, 1.0, 101)[:, None]
        >>> values[7] = -9999.0
        >>> Reach.of(values).beyond(values).nonzero().tolist()
        [[7, 0]]
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Reach:
        """From ``(rows, columns, ...)``; of the places of a column a row's outermost counts."""
        sample = values[:: -(-len(values) // _SAMPLE)]
        places = sample[:: -(-sample.shape[2:].numel() * len(sample) // _PLACES)]
        center = places.movedim(1, -1).reshape(-1, values.shape[1]).median(dim=0).values
        lowest, highest = outermost(sample)
        below, above = (center - lowest).clamp(min=0), (highest - center).clamp(min=0)
        both = _Tail.of(torch.maximum(below, above))
        lowest, highest = outermost(values)
        below = _Tail.of(below).where_known(both).reach(-lowest, -center)
        above = _Tail.of(above).where_known(both).reach(highest, center)
        return cls(center - below, center + above)

    def beyond(self, values: Tensor) -> Tensor:
        """Which of ``(rows, columns, ...)`` are wild: ``(rows, columns)`` of booleans."""
        lowest, highest = outermost(values)
        return (lowest < self.low) | (highest > self.high)


def outermost(values: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest of each row's values of a column, ``(rows, columns)``."""
    if values.dim() == 2:
        return values, values
    flat = values.flatten(2)
    return flat.amin(dim=-1), flat.amax(dim=-1)


def repeated_far_out(values: Tensor) -> list[tuple[int, float, int]]:
    """Outermost values that are repeated, ten times as far from the median as all others are.

    Too many to be left out as wild, and most likely a code for a missing value.

    Args:
        values: ``(rows, columns)``.

    Returns:
        Of each the column, the value, and how many there are.

    Example:
        >>> import torch
        >>> values = torch.linspace(-1.0, 1.0, 101)[:, None]
        >>> values[:7] = -9999.0
        >>> repeated_far_out(values)
        [(0, -9999.0, 7)]
    """
    found = []
    for index, column in enumerate(values.unbind(dim=1)):
        center = column.median()
        for end in (column.min(), column.max()):
            others = column[column != end]
            count = len(column) - len(others)
            if end == center or count < 2 or len(others.unique()) < _DISTINCT:
                continue
            if (end - center).abs() > LEAST_GAP * (others - center).abs().max():
                found.append((index, end.item(), count))
    return found


@dataclass(frozen=True)
class _Tail:
    """The distances of a column on one side: which are surely usual, and what gap is none.

    Attributes:
        usual: ``(columns,)``, the largest distance of which no more than a share are wild.
        gap: the factor between neighbours that chance does not explain; NaN where too few values
            differ from the median.
    """

    usual: Tensor
    gap: Tensor

    @classmethod
    def of(cls, distances: Tensor) -> _Tail:
        ordered = distances.sort(dim=0, descending=True).values
        count = (ordered > 0).sum(dim=0)
        wild = (count * _SHARE).ceil().clamp(min=1)
        last = torch.minimum(_TAIL * wild, count - 1).clamp(min=0)
        usual, end = (
            ordered.gather(0, rank.long().clamp(max=len(ordered) - 1)[None])[0]
            for rank in (wild, last)
        )
        ranks = ((last + 1) / (wild + 1)).log()
        fall = (usual.log() - end.log()) / ranks
        gap = (_CHANCE * fall).exp().clamp(min=LEAST_GAP)
        return cls(usual, gap.masked_fill((count < FEWEST) | (last <= wild), math.nan))

    def where_known(self, other: _Tail) -> _Tail:
        """This one, and the other where this says nothing."""
        unknown = self.gap.isnan()
        pairs = ((self.usual, other.usual), (self.gap, other.gap))
        return _Tail(*(torch.where(unknown, there, here) for here, there in pairs))

    def reach(self, values: Tensor, center: Tensor) -> Tensor:
        """As far above the centre as what comes next is no gap; infinite where nobody can tell."""
        farthest = torch.maximum(values.amax(dim=0) - center, self.usual)
        for column in (farthest > self.usual * self.gap).nonzero()[:, 0].tolist():
            distances = values[:, column] - center[column]
            usual, gap = self.usual[column], self.gap[column]
            steps = torch.cat([usual[None], distances[distances > usual].sort().values])
            gaps = (steps[1:] > steps[:-1] * gap).nonzero()
            if len(gaps):
                farthest[column] = steps[gaps[0, 0]]
        return (farthest * self.gap).nan_to_num(nan=math.inf, posinf=math.inf)
