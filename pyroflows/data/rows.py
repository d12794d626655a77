"""Rows in memory, each with its context where there is one: indexed, moved, chunked, split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.data.fingerprint import facts_of

Batch = tuple[Tensor, Tensor | None]  # what a training step takes: data and context


@dataclass(frozen=True, eq=False)
class Rows:
    """Data, and the context of each row; the one place that knows that there may be none.

    Attributes:
        x: ``(rows, *event)``.
        context: ``(rows, *context_shape)``, or None.

    Example:
        >>> rows = Rows(torch.arange(5.0)[:, None])
        >>> len(rows), rows[3:].x.tolist(), [len(part) for part in rows.chunks(2)]
        (5, [[3.0], [4.0]], [2, 2, 1])
    """

    x: Tensor
    context: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Several one after another; all of them have a context, or none."""
        contexts = [part.context for part in parts if part.context is not None]
        return cls(torch.cat([part.x for part in parts]), torch.cat(contexts) if contexts else None)

    @classmethod
    def mixed(cls, parts: list[Rows], order: Tensor) -> Rows:
        """Several in one, in this order of all their rows; takes them out of the list.

        Each goes to its places at once, so that no copy of them all is made in between.
        """
        x, context = parts[0].batch
        rows = cls(
            x.new_empty(len(order), *x.shape[1:]),
            None if context is None else context.new_empty(len(order), *context.shape[1:]),
        )
        places, begin = torch.empty_like(order), 0
        places[order] = torch.arange(len(order))
        parts.reverse()
        while parts:
            part = parts.pop()
            place = places[begin : begin + len(part)]
            rows.x[place] = part.x
            if rows.context is not None and part.context is not None:
                rows.context[place] = part.context
            begin += len(part)
        return rows

    @property
    def batch(self) -> Batch:
        """``(x, context)``, as a training step takes them."""
        return self.x, self.context

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        return sum(part.nbytes for part in self.batch if part is not None)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor | slice) -> Rows:
        return self._each(lambda part: part[index])

    def to(self, device: Any) -> Rows:
        """On another device, or in another dtype."""
        return self._each(lambda part: part.to(device))

    def flat(self) -> Tensor:
        """All numbers of each row, its data and its context, ``(rows, numbers)``."""
        return torch.cat([part.flatten(1) for part in self.batch if part is not None], dim=1)

    def _each(self, of: Callable[[Tensor], Tensor]) -> Rows:
        return Rows(of(self.x), None if self.context is None else of(self.context))

    def facts(self) -> dict[str, Any]:
        """By which they are known again: how many, and hashes of their values."""
        return {"rows": len(self), "x": facts_of(self.x), "context": facts_of(self.context)}

    def chunks(self, size: int) -> Iterator[Rows]:
        """All rows in order, ``size`` at a time."""
        for begin in range(0, len(self), size):
            yield self[begin : begin + size]

    def split(self, share: float, seed: int) -> tuple[Rows, Rows]:
        """A random share of the rows apart: ``(rest, share)``.

        Raises:
            ValueError: the share is not in (0, 1), or leaves one side empty.
        """
        order = shuffled(len(self), torch.Generator().manual_seed(seed)).to(self.x.device)
        apart = validation_count(len(self), share)
        return self[order[apart:]], self[order[:apart]]

    def spread(self, most: int) -> Rows:
        """At most so many, evenly spaced: the first rows of sorted data would be no sample."""
        return self[:: -(-len(self) // most)]


def validation_count(rows: int, share: float) -> int:
    """How many of the rows a share is.

    Raises:
        ValueError: the share is not in (0, 1), or leaves one side empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"val: expected a share in (0, 1), rows, or None, got {share}")
    count = round(share * rows)
    if count in (0, rows):
        raise ValueError(
            f"val: a share of {share} of {rows} rows leaves nothing to train on or to validate "
            "with; give more rows, or val=None"
        )
    return count


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """A random order from a generator on the CPU, whatever the default device is."""
    return torch.randperm(count, generator=generator, device="cpu")
