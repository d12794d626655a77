"""Where training rows come from: tensors, data sets or loaders, and what is held out of them."""

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

from pyroflows.data.batches import Batches, held_count, split_rows
from pyroflows.data.files import TableBatches, hold_out, is_table, open_table
from pyroflows.data.rows import Batch, as_pair, checked_rows
from pyroflows.distributions.flow import Flow

_STREAMED = 256  # rows in a batch, where nobody knows how many there are


class Loader:
    """A data loader, its batches checked as they come."""

    def __init__(self, flow: Flow, loader: DataLoader) -> None:
        self.flow = flow
        self.loader = loader
        self.epoch = -1

    def __len__(self) -> int:
        return len(self.loader)  # a TypeError for streams, which have none

    def __iter__(self) -> Iterator[Batch]:
        if hasattr(self.loader.sampler, "set_epoch"):
            self.epoch += 1
            self.loader.sampler.set_epoch(self.epoch)
        for index, batch in enumerate(self.loader):
            x, context = as_pair(batch)
            yield checked_rows(
                self.flow,
                x,
                context,
                name=f"x (batch {index} of the loader)",
                context_name=f"context (batch {index} of the loader)",
            )

    def state_dict(self) -> dict[str, Any]:
        """The passes so far, and where the loader's own generators stand."""
        generators = [generator.get_state() for generator in self._generators()]
        return {"epoch": self.epoch, "generators": generators}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the pass that follows."""
        self.epoch = state["epoch"]
        for generator, value in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(value)

    def _generators(self) -> list[torch.Generator]:
        owners = (self.loader, self.loader.sampler)
        found = [getattr(owner, "generator", None) for owner in owners]
        return list(dict.fromkeys(g for g in found if g is not None))

    @property
    def rows(self) -> float:
        """How many there are; infinity for a stream."""
        dataset: Any = self.loader.dataset
        try:
            return len(dataset)
        except TypeError:
            return math.inf


Source = Batch | Loader | TableBatches


def sources(
    flow: Flow,
    x: Any,
    context: Any,
    val: Any,
    batch_size: int | None,
    seed: int,
    shard: tuple[int, int],
) -> tuple[Source, Source | None]:
    """Training data and what is held out, checked."""
    if is_table(x):
        if context is not None:
            raise ValueError("context: a file brings its own, in the columns after the features")
        return _in_file(flow, x, val, batch_size, seed, shard)
    if isinstance(x, (DataLoader, Dataset)):
        if context is not None:
            raise ValueError("context: a Dataset or DataLoader brings its own, in pairs with x")
        return _streams(flow, x, val, batch_size, seed, shard)
    train = checked_rows(flow, x, context)
    if val is None:
        return train, None
    if isinstance(val, Real):
        return split_rows(train, float(val), seed)
    return train, _held_out(flow, val, shard)


def _in_file(
    flow: Flow,
    x: Any,
    val: Any,
    batch_size: int | None,
    seed: int,
    shard: tuple[int, int],
) -> tuple[Source, Source | None]:
    """The same for a file, which is read in part only."""
    table = open_table(x)
    index: np.ndarray | None = None
    held: Source | None = None
    if isinstance(val, Real):
        index, held = hold_out(flow, table, float(val), seed)
    elif val is not None:
        held = _held_out(flow, val, shard)
    size = batch_size or default_size(table.shape[0])
    return TableBatches(flow, table, size, seed, *shard, held=index), held


def _held_out(flow: Flow, val: Any, shard: tuple[int, int]) -> Source:
    if is_table(val):
        return TableBatches(flow, open_table(val, "val"), 4096, seed=0)
    if isinstance(val, DataLoader):
        if shard[1] > 1 and isinstance(val.sampler, (DistributedSampler, RandomSampler)):
            raise ValueError(
                "val: expected a DataLoader that gives the same batches in all processes, as each "
                f"scores its part of them, got one with a {type(val.sampler).__name__}; build it "
                "without shuffle= and sampler=, or give the Dataset"
            )
        return Loader(flow, val)
    if isinstance(val, Dataset):
        return Loader(flow, DataLoader(val, batch_size=1024))
    x, context = as_pair(val)
    return checked_rows(flow, x, context, name="val", context_name="val's context")


def _streams(
    flow: Flow,
    x: Any,
    val: Any,
    batch_size: int | None,
    seed: int,
    shard: tuple[int, int],
) -> tuple[Source, Source | None]:
    """The same for a data set, or for a loader, which cannot be split."""
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
    held = None
    if isinstance(val, Real):
        if isinstance(x, (DataLoader, IterableDataset)):
            what = "a DataLoader" if isinstance(x, DataLoader) else "an IterableDataset"
            raise ValueError(
                f"val: {what} cannot be split; give val= rows or a DataLoader, or None"
            )
        count = len(x)
        part = held_count(count, float(val))
        generator = torch.Generator().manual_seed(seed)
        x, val = random_split(x, [count - part, part], generator=generator)
    if val is not None:
        held = _held_out(flow, val, shard)
    if isinstance(x, DataLoader):
        return Loader(flow, x), held
    rank, processes = shard
    usual = _STREAMED if isinstance(x, IterableDataset) else default_size(len(x))
    size = max(1, (batch_size or usual) // processes)
    if isinstance(x, IterableDataset):
        x = DataLoader(x if processes == 1 else EachNth(x, rank, processes), batch_size=size)
    else:
        sampler: DistributedSampler[Any] = DistributedSampler(
            x, processes, rank, shuffle=True, seed=seed
        )
        x = DataLoader(x, batch_size=size, sampler=sampler)
    return Loader(flow, x), held


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


def batches_of(
    train: Source, batch_size: int | None, seed: int, shard: tuple[int, int]
) -> Batches | Loader | TableBatches:
    """Mini-batches of rows held in memory; a loader or a file brings its own."""
    if not isinstance(train, tuple):
        return train
    return Batches(train, batch_size or default_size(len(train[0])), seed, *shard)


def default_size(rows: int) -> int:
    """Near 2.5 sqrt(rows), a power of two: 128 at 3,000 rows, 1,024 from 130,000 on."""
    return min(max(2 ** round(math.log2(2.5 * max(rows, 1) ** 0.5)), 64), 1024)


def count_rows(train: Source) -> float:
    """How many rows there are; infinity for a stream."""
    return len(train[0]) if isinstance(train, tuple) else train.rows


def count_batches(batches: Batches | Loader | TableBatches) -> int:
    """Batches an epoch; a guess for a stream."""
    try:
        return max(len(batches), 1)
    except TypeError:
        return 40


def chunks(rows: Batch, size: int = 4096) -> Iterator[Batch]:
    """All rows in order, ``size`` at a time."""
    x, context = rows
    for begin in range(0, len(x), size):
        stop = begin + size
        yield x[begin:stop], None if context is None else context[begin:stop]
