"""Where training rows come from: tensors, data sets or loaders, and what is held out of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torch.utils.data.distributed import DistributedSampler

from pyroflows.distribution import Flow
from pyroflows.rows import Batch, Batches, as_pair, checked_rows, held_count, split_rows


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


Source = Batch | Loader


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
    if isinstance(x, (DataLoader, Dataset)):
        if context is not None:
            raise ValueError("context: a Dataset or DataLoader brings its own, in pairs with x")
        return _streams(flow, x, val, batch_size, seed, shard)
    train = checked_rows(flow, x, context)
    if val is None:
        return train, None
    if isinstance(val, (int, float)):
        return split_rows(train, float(val), seed)
    return train, _held_out(flow, val)


def _held_out(flow: Flow, val: Any) -> Source:
    if isinstance(val, DataLoader):
        return Loader(flow, val)
    if isinstance(val, Dataset):
        return Loader(flow, DataLoader(val, batch_size=1024))
    x, context = as_pair(val)
    return checked_rows(flow, x, context, name="val", context_name="val's context")


def _streams(
    flow: Flow,
    x: Dataset | DataLoader,
    val: Any,
    batch_size: int | None,
    seed: int,
    shard: tuple[int, int],
) -> tuple[Source, Source | None]:
    """The same for a data set, or for a loader, which cannot be split."""
    if isinstance(x, TensorDataset):
        rows, context = as_pair(x.tensors[:2])
        return sources(flow, rows, context, val, batch_size, seed, shard)
    held = None
    if isinstance(val, (int, float)):
        if isinstance(x, DataLoader):
            raise ValueError(
                "val: a DataLoader cannot be split; give val= rows or a DataLoader, or None"
            )
        count = len(x)
        part = held_count(count, float(val))
        generator = torch.Generator().manual_seed(seed)
        x, val = random_split(x, [count - part, part], generator=generator)
    if val is not None:
        held = _held_out(flow, val)
    if isinstance(x, Dataset):
        rank, processes = shard
        sampler = DistributedSampler(x, processes, rank, shuffle=True, seed=seed)
        x = DataLoader(x, batch_size=max(1, (batch_size or 256) // processes), sampler=sampler)
    return Loader(flow, x), held


def batches_of(
    train: Source, batch_size: int | None, seed: int, shard: tuple[int, int]
) -> Batches | Loader:
    """Mini-batches of rows held in memory; a loader brings its own."""
    if isinstance(train, Loader):
        return train
    rows = len(train[0])
    if batch_size is None:
        # Near 2.5 sqrt(rows), a power of two: 128 at 3,000 rows, 1,024 from 130,000 on.
        batch_size = 2 ** round(torch.tensor(2.5 * rows**0.5).log2().item())
        batch_size = min(max(batch_size, 64), 1024)
    return Batches(train, batch_size, seed, *shard)


def count_rows(train: Source) -> float:
    """How many rows there are; infinity for a stream."""
    if isinstance(train, tuple):
        return len(train[0])
    try:
        return len(train.loader.dataset)
    except TypeError:
        return math.inf


def count_batches(batches: Batches | Loader) -> int:
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
