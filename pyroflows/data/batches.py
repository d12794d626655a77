"""Mini-batches: of rows in memory, shuffled anew each epoch, or as another source gives them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.data.rows import Batch, Rows, shuffled
from pyroflows.data.wild import Screen
from pyroflows.distributions.flow import Flow


class Batches:
    """Random mini-batches from tensors, without Python work per row.

    Iterating is one epoch: every row once, in a new order from a generator of its own. With several
    processes each sees its part, of equal size, of the one order all share.

    Args:
        rows: data and context.
        size: rows in a batch, over all processes.
        seed: of the order.
        rank: number of this process.
        processes: how many there are.

    Attributes:
        screen: what left out wild rows before.
    """

    screen: Screen | None = None

    def __init__(self, rows: Rows, size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.rows = rows
        self.asked = size
        self.size = max(1, size // processes)
        self.rank = rank
        self.processes = processes
        self.generator = torch.Generator().manual_seed(seed)

    def _order(self) -> Tensor:
        order = shuffled(len(self.rows), self.generator)
        short = -len(order) % self.processes  # equal shards: the first rows fill up the last ones
        return torch.cat([order, order[:short]])[self.rank :: self.processes]

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)

    def starting_at(self, position: int) -> Iterator[Batch]:
        """One epoch from a batch on."""
        indices = self._order().to(self.rows.x.device).split(self.size)
        return (self.rows[index].batch for index in indices[position:])

    def __len__(self) -> int:
        shard = -(-len(self.rows) // self.processes)
        return -(-shard // self.size)

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def facts(self) -> dict[str, Any]:
        """By which the rows are known again."""
        return self.rows.facts()

    def first(self, most: int) -> Rows:
        """Some of the rows, for the start that depends on data."""
        return self.rows.spread(most)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the generator of the order stands."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the orders that follow."""
        self.generator.set_state(state["generator"])


class Streamed(ABC):
    """A source whose batches come one after another, of a size of its own.

    Attributes:
        flow: whose rows they are.
        columns: their names, where they have some.
        screen: leaves out wild rows, once it is known what is usual.
    """

    flow: Flow
    columns: Sequence[str] = ()
    screen: Screen | None = None

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """By which the source is known again."""

    def chunks(self, _size: int) -> Iterator[Rows]:
        """One epoch, in batches of the source's own size."""
        return (Rows(*batch) for batch in self)

    def first(self, most: int) -> Rows:
        """The first batches, until there are so many rows, for the start that depends on data.

        Raises:
            ValueError: there is no batch.
        """
        parts: list[Rows] = []
        for part in self.chunks(most):
            parts.append(part)
            if sum(map(len, parts)) >= most:
                break
        if not parts:
            raise ValueError("x: the data loader gave no batch")
        return Rows.joined(parts)
