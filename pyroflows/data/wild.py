"""Rows far outside all others, which alone would set the scale of a fit: told, and left out."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyroflows.data.reach import Reach, outermost, repeated_far_out
from pyroflows.data.rows import Rows

_MOST = 0.1  # of all rows; more are no slips
_SHOWN = 3
_SAMPLE = 5_000  # rows that are looked through for codes


class Screen:
    """Leaves out rows whose data or context lie far outside those of all others, and says which.

    Args:
        support: of the data. What is bounded is judged where it is mapped to all numbers;
            integers, which are bounded by themselves, are not judged.
        rows: those that show what is usual.
        columns: names of the columns, of the data and then of the context; may be none.
        use: what wild rows are left out of, in words.

    Warns:
        UserWarning: there are too many wild rows for slips; none are left out then.

    Example:
        >>> import warnings, torch
        >>> rows = Rows(torch.linspace(-1.0, 1.0, 200).reshape(-1, 2))
        >>> rows.x[3, 1] = 1e30
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     kept = Screen(constraints.real_vector, rows, ["age", "income"]).usual(rows)
        >>> print(len(kept), str(said[0].message).partition(";")[0])
        99 x: 1 of 100 rows is far outside all others and left out of the fit: row 3 ('income' is
        1e+30, the others go from -0.98995 to 1)
    """

    def __init__(
        self,
        support: constraints.Constraint,
        rows: Rows,
        columns: Sequence[str] = (),
        use: str = "the fit",
    ) -> None:
        self.support, self.columns, self.use = support, list(columns), use
        self.reaches = [Reach.of(values) for values in self._judged(rows)]
        self._told: Counter[int] = Counter()  # how often a row is among those of one pass
        self._pass: Counter[int] = Counter()  # the pass at hand
        self._warnings = 0
        lost = self._wild(rows).any(dim=1)
        self._spare = rows[~lost][:1]
        self._seen, self._lost, self._least = 0, 0, len(rows)
        self._keep_if_many(int(lost.sum()), len(rows))
        self._tell_codes(rows[~lost] if lost.any() else rows)

    def _tell_codes(self, rows: Rows) -> None:
        """Warn of values that are too many to be wild and stand for something else, it seems."""
        first, words = 0, ("", "context ")
        for values, word in zip((rows.x, rows.context), words, strict=True):
            if values is None or values.dim() != 2 or not values.is_floating_point():
                continue
            sample = values[:: -(-len(values) // _SAMPLE)]  # all over, as a table may be sorted
            for column, value, count in repeated_far_out(sample):
                named = [repr(name) for name in self.columns[first + column :][:1]]
                name = word + (named or [f"column {column}"])[0]
                warnings.warn(
                    f"x: {name} is {value:g} in {count:,} of {len(sample):,} rows, over ten times "
                    "as far out as all others: a code for a missing value? They stay in "
                    f"{self.use}, whose scale they set; impute or drop them",
                    stacklevel=4,
                )
            first += values.shape[1]

    @property
    def count(self) -> int:
        """How many rows were left out so far; those that come again in a later pass count once."""
        return (self._told | self._pass).total()

    def _keep_if_many(self, lost: int, seen: int) -> None:
        """Leave none out any more where too many would be: the first rows were no sample."""
        if lost > max(1, _MOST * seen):
            self.reaches = []
            warnings.warn(
                f"x: {lost:,} of {seen:,} rows are far outside the others, too many for slips, so "
                f"from now on they stay in {self.use}, whose scale they may set: shuffle the rows "
                "if they are sorted, look at them, or fit the logarithm of such columns",
                stacklevel=3,
            )

    def _judged(self, rows: Rows) -> list[Tensor]:
        """Data and context, as they are judged: ``(rows, columns, ...)`` each."""
        x = [] if self.support.is_discrete else [unbounded(rows.x, self.support)]
        return x if rows.context is None else [*x, rows.context]

    def _wild(self, rows: Rows) -> Tensor:
        """Which are, ``(rows, columns)`` of booleans: those of the data, then of the context."""
        if not self.reaches:
            return torch.zeros(len(rows), 1, dtype=torch.bool, device=rows.x.device)
        pairs = zip(self.reaches, self._judged(rows), strict=True)
        return torch.cat([reach.beyond(values) for reach, values in pairs], dim=1)

    def usual(
        self, rows: Rows, name: str = "x", numbers: Sequence[int] | np.ndarray | None = None
    ) -> Rows:
        """The rows that are not wild, and a warning of those that are.

        Args:
            rows: to look through.
            name: what to call them.
            numbers: those of the rows; by default their places.

        Warns:
            UserWarning: which rows are wild and in which column; of each once.
        """
        wild = self._wild(rows)
        kept = self._without(rows, wild)
        self._seen += len(rows)
        if kept is rows:
            return rows
        places = wild.any(dim=1).nonzero()[:, 0].tolist()
        self._lost += len(places)
        self._keep_if_many(self._lost, max(self._seen, self._least))
        if not self.reaches:
            return rows
        new = [place for place in places if self._is_new(rows, place)]
        if new and self._warnings < _SHOWN:
            number = range(len(rows)) if numbers is None else numbers
            shown = ", ".join(
                f"row {number[place]} ({self._described(rows, place, wild[place], kept)})"
                for place in new[:_SHOWN]
            )
            self._warn(f"{name}: {len(new):,} of {len(rows):,} rows", len(new), shown)
        return kept

    def without(self, rows: Rows) -> Rows:
        """The rows that are not wild, without a word: they will come again."""
        return self._without(rows, self._wild(rows))

    def _without(self, rows: Rows, wild: Tensor) -> Rows:
        """Those left, the very rows where none is wild; where all are, a usual one."""
        lost = wild.any(dim=1)
        if not lost.any():
            return rows
        return self._spare if lost.all() else rows[~lost]

    def _warn(self, counted: str, count: int, shown: str) -> None:
        self._warnings += 1
        more = f" and {count - _SHOWN:,} more" if count > _SHOWN else ""
        last = "; further ones are counted" if self._warnings == _SHOWN else ""
        warnings.warn(
            f"{counted} {'is' if count == 1 else 'are'} far outside all others and left out of "
            f"{self.use}: {shown}{more}; correct or drop them, or impute what stands for a missing "
            f"value{last}",
            stacklevel=3,
        )

    def end_pass(self) -> None:
        """The same rows come again; say how many were left out where some were not told of."""
        self._told |= self._pass
        self._pass.clear()
        if self._warnings == _SHOWN:
            self._warnings += 1
            warnings.warn(
                f"x: in all {self.count:,} rows were far outside all others and left out of "
                f"{self.use}",
                stacklevel=2,
            )

    def _is_new(self, rows: Rows, place: int) -> bool:
        """Whether a row was not seen in a pass before, as often as in this one."""
        key = hash(tuple(rows[place : place + 1].flat()[0].tolist()))
        self._pass[key] += 1
        return self._pass[key] > self._told[key]

    def _described(self, rows: Rows, place: int, wild: Tensor, kept: Rows) -> str:
        """The first wild value of a row beside the usual ones, in the units of the data."""
        column, word = int(wild.nonzero()[0, 0]), ""
        values, usual = rows.x, kept.x
        judged = 0 if self.support.is_discrete else len(self.reaches[0].low)
        index = column
        if column >= judged:
            assert rows.context is not None
            assert kept.context is not None
            values, usual, word = rows.context, kept.context, "context "
            column -= judged
            index = rows.x.shape[1] + column
        elif judged != values.shape[1]:
            return f"value {column} of its unconstrained form"
        name = f"{word}column {column}"
        if index < len(self.columns):
            name = f"{word}{self.columns[index]!r}"
        low, high = (end[0, column].item() for end in outermost(values[place : place + 1]))
        lowest, highest = outermost(usual)
        ends = lowest[:, column].min().item(), highest[:, column].max().item()
        value = high if high > ends[1] else low
        return f"{name} is {value:g}, the others go from {ends[0]:g} to {ends[1]:g}"


def column_names(*values: Any) -> list[str]:
    """Those of data, and then of their context, where these are frames; none otherwise."""
    names: list[str] = []
    for value in values:
        columns = getattr(value, "columns", None)
        if columns is None:
            break
        names += map(str, columns)
    return names


def unbounded(values: Tensor, support: constraints.Constraint) -> Tensor:
    """What a bounded support's bijection makes of values: where a flow over them works."""
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    inner = support
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    if isinstance(inner, type(constraints.real)):
        return values
    try:
        return biject_to(support).inv(values)
    except NotImplementedError:  # a support of the user's own
        return values
