"""Training batches and validation rows, from tensors, data sets, loaders or files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    random_split,
)
from torch.utils.data.distributed import DistributedSampler

from pyroflows.data.batches import Batches, Streamed
from pyroflows.data.checks import as_pair, checked_rows
from pyroflows.data.files import TableBatches, hold_out, is_table, open_table
from pyroflows.data.fingerprint import facts_of_loader
from pyroflows.data.position import generators_of, generators_put_back, seed_generators
from pyroflows.data.rows import Batch, Rows, validation_count
from pyroflows.data.wild import Screen, column_names
from pyroflows.distributions.flow import Flow

_STREAMED = 256  # rows in a batch, where nobody knows how many there are


class Loader(Streamed):
    """A data loader, its batches checked as they come.

    Args:
        flow: decides what rows may be.
        loader: gives them.
        asked: rows in a batch over all processes, where that is not the loader's own number.
        name: of the argument it was given as.
    """

    def __init__(
        self, flow: Flow, loader: DataLoader, asked: int | None = None, name: str = "x"
    ) -> None:
        self.flow = flow
        self.loader = loader
        self.asked = asked or loader.batch_size
        self.name = name
        self.context_name = "context" if name == "x" else f"{name}'s context"
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.loader)  # a TypeError for streams, which have none

    def __iter__(self) -> Iterator[Batch]:
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(self.epoch)
            self.epoch += 1
        for index, batch in enumerate(self.loader):
            x, context = as_pair(batch)
            where = f"(batch {index} of the loader)"
            name, context_name = f"{self.name} {where}", f"{self.context_name} {where}"
            rows = checked_rows(self.flow, x, context, name=name, context_name=context_name)
            yield (rows if self.screen is None else self.screen.usual(rows, name)).batch
        if self.screen is not None:
            self.screen.end_pass()

    def first(self, most: int) -> Rows:
        """The first rows of an order of their own: the same each time, and nothing is drawn."""
        state = self.state_dict()
        with generators_put_back(torch.device("cpu")):
            seed_generators(0)
            for generator in generators_of(self.loader):
                generator.manual_seed(0)
            try:
                return super().first(most)
            finally:
                self.load_state_dict(state)

    def facts(self) -> dict[str, Any]:
        """By which the loader is known again."""
        return facts_of_loader(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """The epochs begun, and where the loader's own generators stand."""
        generators = [generator.get_state() for generator in generators_of(self.loader)]
        return {"epoch": self.epoch, "generators": generators}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the epoch that follows."""
        self.epoch = state["epoch"]
        for generator, value in zip(generators_of(self.loader), state["generators"], strict=True):
            generator.set_state(value)

    @property
    def count(self) -> float:
        """How many there are; infinity for a stream."""
        dataset: Any = self.loader.dataset
        try:
            return len(dataset)
        except TypeError:
            return math.inf


Source = Batches | Loader | TableBatches
Validation = Rows | Loader | TableBatches


def sources(
    flow: Flow,
    x: Any,
    context: Any,
    val: Any,
    batch_size: int | None,
    seed: int,
    shard: tuple[int, int],
) -> tuple[Source, Validation | None]:
    """Training batches and validation rows, checked.

    Args:
        flow: decides what rows may be.
        x: as in ``pf.fit``, and so the next three.
        context: of rows in memory.
        val: a share of the rows, rows, or None.
        batch_size: rows in a batch, over all processes; None for the usual.
        seed: of the split and of the batches' order.
        shard: number of this process, and how many there are.
    """
    if is_table(x):
        if context is not None:
            raise ValueError("context: a file brings its own, in the columns after the features")
        return _in_file(flow, x, val, batch_size, seed, shard)
    if isinstance(x, (DataLoader, Dataset)):
        if context is not None:
            raise ValueError("context: a Dataset or DataLoader brings its own, in pairs with x")
        return _streams(flow, x, val, batch_size, seed, shard)
    rows = checked_rows(flow, x, context)
    screen = Screen(flow.support, rows, column_names(x, context))
    rows = screen.usual(rows)
    validation: Validation | None = None
    if isinstance(val, Real):
        rows, validation = rows.split(float(val), seed)
    elif val is not None:
        validation = _screened(_validation(flow, val, shard), screen)
    batches = Batches(rows, batch_size or default_size(len(rows)), seed, *shard)
    batches.screen = screen
    return batches, validation


def _screened(validation: Validation, screen: Screen, numbers: Any = None) -> Validation:
    """Validation rows without the wild ones, which would make their score that of one row."""
    if isinstance(validation, Rows):
        return screen.usual(validation, "val", numbers)
    validation.screen = screen
    return validation


def screened(
    batches: Source, validation: Validation | None, first: Rows
) -> tuple[Validation | None, Rows]:
    """See that wild rows are left out of what comes batch by batch, by the rows that come first.

    Of rows in memory they are left out before these are split.

    Args:
        batches: of the training.
        validation: its other rows.
        first: the first rows of the training.

    Returns:
        The validation rows and the first rows, without the wild ones.
    """
    if isinstance(batches, Batches):
        return validation, first
    batches.screen = Screen(batches.flow.support, first, batches.columns)
    held_out = getattr(batches, "left_out", ())  # of a file; none where validation rows were given
    if validation is not None:
        validation = _screened(validation, batches.screen, held_out if len(held_out) else None)
    return validation, batches.screen.without(first)


def _in_file(
    flow: Flow,
    x: Any,
    val: Any,
    batch_size: int | None,
    seed: int,
    shard: tuple[int, int],
) -> tuple[Source, Validation | None]:
    """``sources`` for a file, which is read in part only."""
    table = open_table(x)
    index: np.ndarray | None = None
    validation: Validation | None = None
    if isinstance(val, Real):
        index, validation = hold_out(flow, table, float(val), seed)
    elif val is not None:
        validation = _validation(flow, val, shard)
    size = batch_size or default_size(table.shape[0])
    return TableBatches(flow, table, size, seed, *shard, left_out=index), validation


def _validation(flow: Flow, val: Any, shard: tuple[int, int]) -> Validation:
    if is_table(val):
        return TableBatches(flow, open_table(val, "val"), 4096, seed=0)
    if isinstance(val, DataLoader):
        if shard[1] > 1 and isinstance(val.sampler, (DistributedSampler, RandomSampler)):
            raise ValueError(
                "val: expected a DataLoader that gives the same batches in all processes, as each "
                f"scores its part of them, got one with a {type(val.sampler).__name__}; build it "
                "without shuffle= and sampler=, or give the Dataset"
            )
        return Loader(flow, val, name="val")
    if isinstance(val, Dataset):
        return Loader(flow, DataLoader(val, batch_size=1024), name="val")
    x, context = as_pair(val)
    return checked_rows(flow, x, context, name="val", context_name="val's context")


def _streams(
    flow: Flow,
    x: Any,
    val: Any,
    batch_size: int | None,
    seed: int,
    shard: tuple[int, int],
) -> tuple[Source, Validation | None]:
    """``sources`` for a data set, or for a loader, which cannot be split."""
    if isinstance(x, TensorDataset):
        if len(x.tensors) > 2:
            raise ValueError(
                "x: expected a TensorDataset of rows, or of rows and their context, got one of "
                f"{len(x.tensors)} tensors; leave the others out"
            )
        rows, context = as_pair(x.tensors)
        return sources(flow, rows, context, val, batch_size, seed, shard)
    if isinstance(x, DataLoader) and batch_size is not None:
        raise ValueError(
            f"batch_size: a DataLoader brings its own ({x.batch_size}), got {batch_size}; build "
            "the loader with another, or give the Dataset"
        )
    validation: Validation | None = None
    if isinstance(val, Real):
        if isinstance(x, (DataLoader, IterableDataset)):
            what = "a DataLoader" if isinstance(x, DataLoader) else "an IterableDataset"
            raise ValueError(
                f"val: {what} cannot be split; give val= rows or a DataLoader, or None"
            )
        count = len(x)
        part = validation_count(count, float(val))
        generator = torch.Generator().manual_seed(seed)
        x, val = random_split(x, [count - part, part], generator=generator)
    if val is not None:
        validation = _validation(flow, val, shard)
    if isinstance(x, DataLoader):
        return Loader(flow, x), validation
    rank, processes = shard
    usual = _STREAMED if isinstance(x, IterableDataset) else default_size(len(x))
    asked = batch_size or usual
    size = max(1, asked // processes)
    if isinstance(x, IterableDataset):
        x = DataLoader(x if processes == 1 else EachNth(x, rank, processes), batch_size=size)
    else:
        sampler: DistributedSampler[Any] = DistributedSampler(
            x, processes, rank, shuffle=True, seed=seed
        )
        x = DataLoader(x, batch_size=size, sampler=sampler)
    return Loader(flow, x, asked), validation


class EachNth(IterableDataset):
    """One process's share of a stream: one row of each ``processes``, a last few left out.

    All read the whole stream, which has to be the same in each.
    """

    def __init__(self, stream: IterableDataset, rank: int, processes: int) -> None:
        self.stream = stream
        self.rank = rank
        self.processes = processes

    def __iter__(self) -> Iterator[Any]:
        stream = iter(self.stream)
        while len(group := list(itertools.islice(stream, self.processes))) == self.processes:
            yield group[self.rank]


def default_size(rows: int) -> int:
    """Near 2.5 sqrt(rows), a power of two: 128 at 3,000 rows, 1,024 from 130,000 on."""
    return min(max(2 ** round(math.log2(2.5 * max(rows, 1) ** 0.5)), 64), 1024)


def count_batches(batches: Source) -> int:
    """Batches an epoch; a guess for a stream."""
    try:
        return max(len(batches), 1)
    except TypeError:
        return 40
