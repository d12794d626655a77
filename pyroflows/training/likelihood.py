"""Maximum likelihood: train any flow on data, in one call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows._checks import (
    check_not_negative,
    check_positive,
    check_share,
    check_whole,
    to_builtin,
)
from pyroflows._distributed import gathered, open_fabric
from pyroflows.data.checks import check_is_flow, checked_rows, reference
from pyroflows.data.loaders import Validation, count_batches, sources
from pyroflows.discrete.levels import bits_per_dim
from pyroflows.discrete.noise import fixed_noise
from pyroflows.discrete.quantization import quantized
from pyroflows.distributions.flow import Flow
from pyroflows.training.checkpoints import open_checkpoints, shapes_of
from pyroflows.training.history import History
from pyroflows.training.loop import Settings, optimise
from pyroflows.training.regularize import (
    checked_dropout,
    default_dropout,
    default_weight_decay,
    features,
    set_dropout,
)

INITIAL_ROWS, INITIAL_IMAGES = 20_000, 2_000  # an image tells of its channels at every pixel


class _Loss(nn.Module):
    """Mean negative log-likelihood in nats, as a module: what DDP wraps."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return -self.flow(context, validate_args=False).log_prob(x).mean()


def initialize(flow: Flow, x: Any, context: Any = None) -> None:
    """The data-dependent start that ``fit`` makes: sets ``Standardize`` and ``ActNorm`` layers.

    Nothing else in the package alters this state; it is part of the ``state_dict``.

    Args:
        flow: any flow, or a ``pf.quantized`` one, changed in place.
        x: ``(rows, *flow.event_shape)``, in data units.
        context: ``(rows, *flow.context_shape)`` for a conditional flow.

    Raises:
        ValueError: what is no flow, or data that do not fit it.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow = pf.maf(1)
        >>> pf.initialize(flow, torch.tensor([[10.0], [20.0], [30.0]]))
        >>> flow.sample((1000,)).mean().round(decimals=-1)
        tensor(20.)
    """
    check_is_flow(flow=flow)
    rows = checked_rows(flow, x, context).to(flow.device)
    flow.initialize(rows.x, rows.context)


def fit(
    flow: Flow,
    x: Any,
    context: Any = None,
    *,
    bins: int | None = None,
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
    checkpoint: str | Path | None = None,
    every: float = 1,
    resume: bool = False,
    progress: bool = True,
    compile: bool = False,
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
            Or a model of integers, such as ``pf.quantized`` gives, scored in bits per dimension.
        x: the data: a tensor or array ``(rows, *flow.event_shape)``, a ``Dataset`` or
            ``DataLoader`` of rows or of pairs (row, context), a memory-mapped array, or a path to a
            ``.npy`` or ``.parquet`` file of any size, with the context in the columns after the
            features. Files are read block by block: at most 128 MiB of rows are in
            memory (``pyroflows.tables`` says which). With several processes a ``Dataset`` is
            sharded; your own ``DataLoader`` you shard yourself.
        context: ``(rows, *flow.context_shape)`` for a conditional flow.
        bins: for integers 0 to ``bins - 1`` under a flow: short for ``pf.quantized(flow, bins)``,
            which trains the flow with new uniform noise each step.
        val: what to stop on: a share of the rows (of those in a file 65,536 at most), rows, a pair
            (rows, context), a ``DataLoader``, a file, or None to train all epochs and keep the best
            training score. With several processes a ``DataLoader`` gives all of them the same
            batches, each row once and unshuffled: each process scores its part of these.
        max_epochs: the schedule's length; by default about 8,000 steps, within 20 to 300 epochs.
        batch_size: rows a step, over all devices; by default 64 to 1,024 by the number of rows, or
            256 of an ``IterableDataset``. A ``DataLoader`` brings its own.
        lr: first step size.
        weight_decay: of AdamW, for weight matrices; by default 100 features / rows, at most 1. An
            image counts by its channels and a signal as one feature, where convolutions see every
            place of a row.
        dropout: share of hidden units dropped while training, for flows whose ``log_prob`` is one
            pass; by default 0.2 below 100 rows a feature, falling to zero at 10,000. The flow
            keeps none of it.
        average: decay of the weights' exponential average; by default a memory of four epochs,
            within 100 to 2,000 steps; 0 for none.
        clip: largest gradient norm.
        patience: epochs without a better validation score before stopping.
        start: make the data-dependent start first (``pf.initialize``); False to go on training.
        seed: of the split, of the batches, and of noise in the validation score; the global
            generator is used for dropout and for dequantisation only.
        checkpoint: a folder to keep checkpoints in: all that training depends on, written so that
            a process may end at any moment. The last two are kept.
        every: epochs from one checkpoint to the next; 0.1 for ten in each.
        resume: go on from the last checkpoint in that folder, if there is one, to the very losses
            of a training that was never interrupted (on a CPU). ``max_epochs`` is a total. The
            other arguments are to be the same; data sets draw from the global generators of torch,
            numpy and Python, or are the same in each pass.
        progress: show train and validation nats on stderr: a bar on a terminal, a line every ten
            seconds elsewhere.
        compile: run the step under ``torch.compile``: pays for flows small enough for calls to
            cost more than arithmetic, after about a minute of compiling.
        accelerator: as in Lightning Fabric; by default where the flow is.
        devices: as in Fabric: how many, or which. Each takes an equal part of each batch; losses
            are those of one process where the rows of a batch divide by the number of them, else a
            few rows count twice. Start several with ``torchrun``.
        strategy: as in Fabric, for example ``"ddp"``.
        precision: ``"bf16-mixed"`` or ``"16-mixed"`` as in Fabric; by default the flow's own.
        num_nodes: as in Fabric.

    Returns:
        The course of training, with ``.plot()``.

    Raises:
        ValueError: what is no flow, data that do not fit it (integers, or floats where it is a
            model of integers, NaN, another shape, outside its support or on its border, no rows),
            an argument out of range, a checkpoint of another training, or no compiler to compile
            with; nothing is trained then.
        DivergedError: the loss was not finite again after three rollbacks; the flow holds the best
            weights found.
        OSError: a checkpoint could not be written; the flow holds the best weights so far, and the
            checkpoints before are whole.

    Example:
        >>> import torch, pyroflows as pf
        >>> x = torch.randn(500, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
        >>> history = pf.fit(pf.nice(2, hidden=(16,)), x, max_epochs=3, progress=False)
        >>> len(history.val)
        3
    """
    check_is_flow(flow=flow)
    flow = flow if bins is None else quantized(flow, bins)
    check_positive(lr=lr, clip=clip)
    check_whole(1, patience=patience)
    check_whole(0, seed=seed)
    given = {"max_epochs": max_epochs, "batch_size": batch_size}
    check_whole(1, **{name: value for name, value in given.items() if value is not None})
    if average is not None:
        check_share(average=average)
    if weight_decay is not None:
        check_not_negative(weight_decay=weight_decay)
    seed, batch_size = to_builtin(seed), to_builtin(batch_size)
    fabric = open_fabric(
        reference(flow),
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision,
        num_nodes=num_nodes,
    )
    shard = fabric.global_rank, fabric.world_size
    batches, validation = sources(flow, x, context, val, batch_size, seed, shard)
    plenty = batches.count / features(flow)
    dropout = default_dropout(flow, plenty) if dropout is None else checked_dropout(flow, dropout)
    steps = count_batches(batches)
    if len(counts := set(gathered(fabric, steps))) > 1:
        raise ValueError(f"x: expected as many batches in each process, got {sorted(counts)}")
    settings = Settings(
        max_epochs=max_epochs or min(max(8000 // steps, 20), 300),
        lr=lr,
        weight_decay=default_weight_decay(plenty) if weight_decay is None else weight_decay,
        clip=clip,
        patience=patience,
        average=_default_average(steps) if average is None else average,
        progress=progress and fabric.is_global_zero,
        label="fit",
        compile=compile,
    )
    evaluate = None if validation is None else lambda: _score(flow, validation, fabric, seed)
    identity = {"fit": "maximum likelihood", "rows": str(batches.count), "seed": seed}
    identity.update(shapes_of(flow))
    keep = open_checkpoints(checkpoint, every, resume, identity, fabric)
    before = copy.deepcopy(flow.state_dict())
    try:
        if start and (keep is None or keep.found is None):
            rows = batches.first(INITIAL_IMAGES if len(flow.event_shape) == 3 else INITIAL_ROWS)
            initialize(flow, rows.x, rows.context)
        set_dropout(flow, dropout)
        history = _empty_history(flow)
        return optimise(flow, _Loss(flow), batches, evaluate, settings, fabric, keep, history)
    except ValueError:
        flow.load_state_dict(before)  # a bad batch of a loader: as if nothing had been done
        raise
    finally:
        set_dropout(flow, 0.0)
        flow.eval()


def _empty_history(flow: Flow) -> History:
    """Probabilities are told in bits per dimension, densities in nats."""
    if not flow.support.is_discrete:
        return History()
    return History(unit="bits/dim", per_nat=bits_per_dim(1.0, flow.event_shape))


def _default_average(steps: int) -> float:
    return 1 - 1 / min(max(4 * steps, 100), 2000)


@torch.no_grad()
def _score(flow: Flow, validation: Validation, fabric: Any, seed: int) -> float:
    """Mean log-likelihood of held-out rows in nats, each row once over all processes.

    Where it is a bound with noise in it, the noise is the same each time.
    """
    total = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    size = 512 if len(flow.event_shape) == 3 else 4096  # rows, for what convolutions hold of each
    with fixed_noise(seed, fabric.device):
        for index, rows in enumerate(validation.chunks(size)):
            if index % fabric.world_size == fabric.global_rank:
                rows = rows.to(fabric.device)
                log_prob = flow(rows.context, validate_args=False).log_prob(rows.x)
                total[0] += log_prob.double().sum()
                total[1] += len(rows)
    total = fabric.all_reduce(total, reduce_op="sum")
    if not total[1]:
        raise ValueError(
            "val: the data loader gave no rows; give one that can be gone through again after "
            "each epoch"
        )
    return (total[0] / total[1]).item()
