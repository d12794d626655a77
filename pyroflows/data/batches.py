"""Rows in batches, shuffled anew each epoch, and a share of them held out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyroflows.data.rows import Batch


def split_rows(rows: Batch, share: float, seed: int) -> tuple[Batch, Batch]:
    """A random share of the rows apart: ``(rest, share)``.

    Raises:
        ValueError: the share is not in (0, 1), or leaves one side empty.
    """
    x, context = rows
    order = shuffled(len(x), torch.Generator().manual_seed(seed)).to(x.device)
    held = held_count(len(x), share)

    def take(index: Tensor) -> Batch:
        return x[index], None if context is None else context[index]

    return take(order[held:]), take(order[:held])


def held_count(rows: int, share: float) -> int:
    """How many of the rows a share is.

    Raises:
        ValueError: the share is not in (0, 1), or leaves one side empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"val: expected a share in (0, 1), rows, or None, got {share}")
    held = round(share * rows)
    if held in (0, rows):
        raise ValueError(
            f"val: a share of {share} of {rows} rows leaves nothing to train on or to validate "
            "with; give more rows, or val=None"
        )
    return held


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """A random order from a generator on the CPU, whatever the default device is."""
    return torch.randperm(count, generator=generator, device="cpu")


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
    """

    def __init__(
        self, rows: Batch, size: int, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.rows = rows
        self.size = max(1, size // processes)
        self.rank = rank
        self.processes = processes
        self.generator = torch.Generator().manual_seed(seed)

    def _order(self) -> Tensor:
        count = len(self.rows[0])
        order = shuffled(count, self.generator)
        short = -count % self.processes  # equal shards: the first rows fill up the last ones
        return torch.cat([order, order[:short]])[self.rank :: self.processes]

    def __iter__(self) -> Iterator[Batch]:
        x, context = self.rows
        for index in self._order().to(x.device).split(self.size):
            yield x[index], None if context is None else context[index]

    def __len__(self) -> int:
        own = -(-len(self.rows[0]) // self.processes)
        return -(-own // self.size)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the generator of the order stands."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the orders that follow."""
        self.generator.set_state(state["generator"])
