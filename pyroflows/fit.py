"""Maximum likelihood: train any flow on data, in one call."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torch.utils.data.distributed import DistributedSampler

from pyroflows.distribution import Flow
from pyroflows.history import History
from pyroflows.nets import MADE, MLP
from pyroflows.rows import (
    Batch,
    Batches,
    as_pair,
    checked_rows,
    held_count,
    reference,
    split_rows,
)
from pyroflows.training import Settings, open_fabric, optimise

INITIAL_ROWS = 20_000


class _Loss(nn.Module):
    """Mean negative log-likelihood in nats, as a module: what DDP wraps."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return -self.flow(context, validate_args=False).log_prob(x).mean()


class _Loader:
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


def initialize(flow: Flow, x: Any, context: Any = None) -> None:
    """The data-dependent start that ``fit`` makes: sets ``Standardize`` and ``ActNorm`` layers.

    Nothing else in the package alters this state; it is part of the ``state_dict``.

    Args:
        flow: any flow, changed in place.
        x: ``(rows, *flow.event_shape)``, in data units.
        context: ``(rows, *flow.context_shape)`` for a conditional flow.

    Raises:
        ValueError: data that do not fit the flow.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow = pf.maf(1)
        >>> pf.initialize(flow, torch.tensor([[10.0], [20.0], [30.0]]))
        >>> flow.sample((1000,)).mean().round(decimals=-1)
        tensor(20.)
    """
    rows, context = checked_rows(flow, x, context)
    device = reference(flow).device
    context = None if context is None else context.to(device)
    flow.transform.initialize(rows.to(device), context)


def fit(
    flow: Flow,
    x: Any,
    context: Any = None,
    *,
    val: Any = 0.1,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 1e-3,
    weight_decay: float | None = None,
    dropout: float | None = None,
    average: float | None = None,
    clip: float = 5.0,
    patience: int = 30,
    start: bool = True,
    seed: int = 0,
    progress: bool = True,
    accelerator: str | None = None,
    devices: int | str | list[int] = 1,
    strategy: str = "auto",
    precision: str | None = None,
    num_nodes: int = 1,
) -> History:
    """Train a flow in place by maximum likelihood; it ends with its best weights, in eval mode.

    AdamW with cosine decay, clipped gradients and an exponential average of the weights; early
    stopping on held-out rows. A loss that is not finite sends it back to the best weights with a
    smaller step. Training costs one ``log_prob`` and its gradient a batch.

    Args:
        flow: any flow; one whose ``fast`` is ``"sample"`` trains too, at several times the cost.
        x: the data: a tensor or array ``(rows, *flow.event_shape)``, a ``Dataset`` or
            ``DataLoader`` of rows or of pairs (row, context).
        context: ``(rows, *flow.context_shape)`` for a conditional flow.
        val: what to stop on: a share of the rows, rows, a pair (rows, context), a ``DataLoader``,
            or None to train all epochs and keep the best training score. With several processes
            a ``Dataset`` is sharded; your own ``DataLoader`` you shard yourself.
        max_epochs: the schedule's length; by default about 8,000 steps, within 20 to 300 epochs.
        batch_size: rows a step, over all devices; by default 64 to 1,024 by the number of rows.
        lr: first step size.
        weight_decay: of AdamW, for weight matrices; by default 100 features / rows, at most 1.
        dropout: share of hidden units dropped while training, for flows whose ``log_prob`` is one
            pass; by default 0.2 below 100 rows a feature, falling to zero at 10,000. The flow
            keeps none of it.
        average: decay of the weights' exponential average; by default a memory of four epochs,
            within 100 to 2,000 steps; 0 for none.
        clip: largest gradient norm.
        patience: epochs without a better validation score before stopping.
        start: make the data-dependent start first (``pf.initialize``); False to go on training.
        seed: of the split and of the batches; the global generator is used for dropout only.
        progress: show a progress bar with train and validation nats.
        accelerator: as in Lightning Fabric; by default where the flow is.
        devices: as in Fabric: how many, or which.
        strategy: as in Fabric, for example ``"ddp"``.
        precision: ``"bf16-mixed"`` or ``"16-mixed"`` as in Fabric; by default the flow's own.
        num_nodes: as in Fabric.

    Returns:
        The course of training, with ``.plot()``.

    Raises:
        ValueError: data that do not fit the flow (integers, NaN, another shape, outside its
            support, no rows), or an argument out of range; nothing is trained then.
        DivergedError: the loss was not finite again after three rollbacks; the flow holds the best
            weights found.

    Example:
        >>> import torch, pyroflows as pf
        >>> x = torch.randn(500, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
        >>> history = pf.fit(pf.nice(2, hidden=(16,)), x, max_epochs=3, progress=False)
        >>> len(history.val)
        3
    """
    if lr <= 0 or clip <= 0:
        raise ValueError(f"lr, clip: expected positive numbers, got {lr} and {clip}")
    if patience < 1 or (max_epochs is not None and max_epochs < 1):
        raise ValueError(
            f"patience, max_epochs: expected at least 1, got {patience} and {max_epochs}"
        )
    fabric = open_fabric(
        reference(flow),
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision,
        num_nodes=num_nodes,
    )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    shard = fabric.global_rank, fabric.world_size
    train, held = _sources(flow, x, context, val, batch_size, seed, shard)
    plenty = _rows(train) / flow.event_shape.numel()
    dropout = _default_dropout(flow, plenty) if dropout is None else _checked_dropout(flow, dropout)
    batches = _batches(train, batch_size, seed, shard)
    steps = _steps(batches)
    settings = Settings(
        max_epochs=max_epochs or min(max(8000 // steps, 20), 300),
        lr=lr,
        weight_decay=min(100 / plenty, 1.0) if weight_decay is None else weight_decay,
        clip=clip,
        patience=patience,
        average=_default_average(steps) if average is None else average,
        progress=progress and fabric.is_global_zero,
        label="fit",
    )
    evaluate = None if held is None else lambda: _score(flow, held, fabric)
    before = copy.deepcopy(flow.state_dict())
    try:
        if start:
            _start(flow, train)
        _set_dropout(flow, dropout)
        return optimise(flow, _Loss(flow), batches, evaluate, settings, fabric)
    except ValueError:
        flow.load_state_dict(before)  # a bad batch of a loader: as if nothing had been done
        raise
    finally:
        _set_dropout(flow, 0.0)
        flow.eval()


def _default_average(steps: int) -> float:
    return 1 - 1 / min(max(4 * steps, 100), 2000)


def _default_dropout(flow: Flow, rows_a_feature: float) -> float:
    """0.2 below 100 rows a feature, log-linearly to 0 at 10,000."""
    if not _scores_in_one_pass(flow) or rows_a_feature == math.inf:
        return 0.0
    return 0.2 * min(max(math.log(1e4 / rows_a_feature) / math.log(100), 0.0), 1.0)


def _scores_in_one_pass(flow: Flow) -> bool:
    return flow.fast in ("log_prob", "both")


def _checked_dropout(flow: Flow, share: float) -> float:
    if not 0 <= share < 1:
        raise ValueError(f"dropout: expected a share in [0, 1), got {share}")
    if share and not _scores_in_one_pass(flow):
        raise ValueError(
            f"dropout: expected 0 for a flow with fast={flow.fast!r}, whose inverse is solved for "
            f"with the nets as they are, got {share}"
        )
    return share


def _set_dropout(flow: Flow, share: float) -> None:
    """Our networks carry their dropout as a plain number, used while training."""
    for module in flow.transform.modules():
        if isinstance(module, (MLP, MADE)):
            module.dropout = share


Source = Batch | _Loader


def _sources(
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
        return _Loader(flow, val)
    if isinstance(val, Dataset):
        return _Loader(flow, DataLoader(val, batch_size=1024))
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
        return _sources(flow, rows, context, val, batch_size, seed, shard)
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
    return _Loader(flow, x), held


def _batches(
    train: Source, batch_size: int | None, seed: int, shard: tuple[int, int]
) -> Batches | _Loader:
    if isinstance(train, _Loader):
        return train
    rows = len(train[0])
    if batch_size is None:
        # Near 2.5 sqrt(rows), a power of two: 128 at 3,000 rows, 1,024 from 130,000 on.
        batch_size = 2 ** round(torch.tensor(2.5 * rows**0.5).log2().item())
        batch_size = min(max(batch_size, 64), 1024)
    return Batches(train, batch_size, seed, *shard)


def _rows(train: Source) -> float:
    """How many rows there are; infinity for a stream."""
    if isinstance(train, tuple):
        return len(train[0])
    try:
        return len(train.loader.dataset)
    except TypeError:
        return math.inf


def _steps(batches: Batches | _Loader) -> int:
    """Batches an epoch; a guess for a stream."""
    try:
        return max(len(batches), 1)
    except TypeError:
        return 40


def _start(flow: Flow, train: Source) -> None:
    if not isinstance(train, _Loader):
        initialize(flow, *(None if t is None else t[:INITIAL_ROWS] for t in train))
        return
    xs, contexts = [], []
    for x, context in train:
        xs.append(x)
        contexts.append(context)
        if sum(map(len, xs)) >= INITIAL_ROWS:
            break
    if not xs:
        raise ValueError("x: the data loader gave no batch")
    initialize(flow, torch.cat(xs), None if contexts[0] is None else torch.cat(contexts))


@torch.no_grad()
def _score(flow: Flow, held: Source, fabric: Any) -> float:
    """Mean log-likelihood of held-out rows in nats, each row once over all processes."""
    total = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    batches = held if isinstance(held, _Loader) else _chunks(held)
    for index, (x, context) in enumerate(batches):
        if index % fabric.world_size == fabric.global_rank:
            x, context = fabric.to_device((x, context))
            log_prob = flow(context, validate_args=False).log_prob(x)
            total[0] += log_prob.double().sum()
            total[1] += len(x)
    total = fabric.all_reduce(total, reduce_op="sum")
    return (total[0] / total[1]).item()


def _chunks(rows: Batch, size: int = 4096) -> Iterator[Batch]:
    x, context = rows
    for begin in range(0, len(x), size):
        stop = begin + size
        yield x[begin:stop], None if context is None else context[begin:stop]
