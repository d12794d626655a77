"""Maximum likelihood: train any flow on data, in one call."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pyroflows._checks import (
    check_not_negative,
    check_positive,
    check_share,
    check_whole,
    to_builtin,
)
from pyroflows._distributed import gathered, open_fabric, reduced
from pyroflows.data.checks import check_is_flow, checked_rows
from pyroflows.data.loaders import Validation, count_batches, screened, sources
from pyroflows.data.wild import Screen, column_names
from pyroflows.discrete.noise import fixed_noise
from pyroflows.discrete.pixel_model import PixelCNN
from pyroflows.discrete.quantization import Quantized, quantized
from pyroflows.distributions.flow import Flow
from pyroflows.training.checkpoints import Checkpoint, open_checkpoints
from pyroflows.training.epochs import Settings, optimise
from pyroflows.training.history import History, empty_history
from pyroflows.training.identity import facts_of_fit
from pyroflows.training.recipe import MOVED, FitRecipe, complete
from pyroflows.training.regularize import (
    checked_dropout,
    default_average,
    default_dropout,
    default_weight_decay,
    features,
    set_dropout,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from typing_extensions import Unpack

FIT_RECIPE = {
    "lr": 1e-3,
    "weight_decay": None,
    "dropout": None,
    "average": None,
    "clip": 5.0,
    "patience": 30,
    "start": True,
}
INITIAL_ROWS, INITIAL_IMAGES = 20_000, 2_000  # an image tells of its channels at every pixel


class _Loss(nn.Module):
    """Mean negative log-likelihood in nats, as a module: what DDP wraps."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return -self.flow(context, validate_args=False).log_prob(x).mean()


def initialize(flow: Flow | Quantized | PixelCNN, x: Any, context: Any = None) -> None:
    """The data-dependent start that ``fit`` makes: sets ``Standardize`` and ``ActNorm`` layers.

    Nothing else in the package alters this state; it is part of the ``state_dict``. Rows far
    outside all others, as ``fit`` leaves out, have no part in it.

    Args:
        flow: any flow, or a ``pf.quantized`` one, changed in place.
        x: ``(rows, *flow.event_shape)``, in data units.
        context: ``(rows, *flow.context_shape)`` for a conditional flow.

    Raises:
        ValueError: what is no flow, or data that do not fit it.

    Warns:
        UserWarning: which rows are far outside all others.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow = pf.maf(1)
        >>> pf.initialize(flow, torch.tensor([[10.0], [20.0], [30.0]]))
        >>> flow.sample((1000,)).mean().round(decimals=-1)
        tensor(20.)
    """
    check_is_flow(flow=flow)
    rows = checked_rows(cast("Flow", flow), x, context)
    screen = Screen(flow.support, rows, column_names(x, context), "the start")
    rows = screen.usual(rows).to(flow.device)
    flow.initialize(rows.x, rows.context)


def fit(
    flow: Flow | Quantized | PixelCNN,
    x: Any,
    context: Any = None,
    *,
    bins: int | None = None,
    val: Any = 0.1,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
    compile: bool = False,
    fabric: Fabric | dict[str, Any] | None = None,
    **recipe: Unpack[FitRecipe],
) -> History:
    """Train a flow in place by maximum likelihood; it ends with its best weights, in eval mode.

    AdamW with cosine decay, clipped gradients and an exponential average of the weights; early
    stopping on held-out rows. A loss that is not finite sends it back to the best weights with a
    smaller step. Training costs one ``log_prob`` and its gradient a batch. Ctrl-C and SIGTERM end
    it after the step at hand, with the best weights so far.

    Rows with a value far outside those of all others (a gap of a factor of 10 at least, and one
    that the tail of the column does not explain), such as 1e30 or a -9999 for what is missing,
    would set the scale for all. They are left out of training and of the validation score, with a
    warning that names them.

    Args:
        flow: any flow; one whose ``fast`` is ``"sample"`` trains too, at several times the cost.
            Or a model of integers, such as ``pf.quantized`` gives, scored in bits per dimension.
        x: the data: a tensor or array ``(rows, *flow.event_shape)``, a ``Dataset`` or
            ``DataLoader`` of rows or of pairs (row, context), a memory-mapped array, or a path to a
            ``.npy`` or ``.parquet`` file of any size, with the context in the columns after the
            features. Files are read block by block: at most 128 MiB of rows are in
            memory (``pyroflows.tables`` says which). With several processes a ``Dataset`` is
            sharded; your own ``DataLoader`` you shard yourself.
        context: ``(rows, *flow.context_shape)`` for a conditional flow, whose networks read it as
            it is: bring its columns to mean 0 and spread 1 first, or most of it is lost on them.
        bins: for integers 0 to ``bins - 1`` under a flow: short for ``pf.quantized(flow, bins)``,
            which trains the flow with new uniform noise each step.
        val: what to stop on: a share of the rows (of those in a file 65,536 at most), rows, a pair
            (rows, context), a ``DataLoader``, a file, or None to train all epochs and keep the best
            training score. With several processes a ``DataLoader`` gives all of them the same
            batches, each row once and unshuffled: each process scores its part of these.
        max_epochs: the schedule's length; by default about 8,000 steps, within 20 to 300 epochs.
        batch_size: rows a step, over all devices; by default 64 to 1,024 by the number of rows, or
            256 of an ``IterableDataset``. A ``DataLoader`` brings its own.
        seed: of the split, of the batches, and of noise in the validation score; the global
            generator is used for dropout and for dequantisation only.
        checkpoint: a folder to keep checkpoints in, one an epoch, or a ``pf.Checkpoint``, which
            says how often and whether to go on from the last.
        progress: show train and validation nats on stderr: a bar on a terminal, a line every ten
            seconds elsewhere.
        compile: run the step under ``torch.compile``: pays for flows small enough for calls to
            cost more than arithmetic, after about a minute of compiling.
        fabric: a ``lightning_fabric.Fabric`` that you launched, or its arguments by name, such as
            ``{"devices": 2, "precision": "bf16-mixed"}``; by default one process where the flow is,
            in its own dtype. Each device takes an equal part of each batch; losses are those of one
            process where the rows of a batch divide by the number of them, else a few rows count
            twice. Start several with ``torchrun``.
        **recipe: numbers that are rarely changed, all with a default:
            ``lr``, the first step size (1e-3);
            ``weight_decay`` of AdamW, for weight matrices: by default 100 features / rows, at most
            1. An image counts by its channels and a signal as one feature, where convolutions see
            every place of a row;
            ``dropout``, the share of hidden units dropped while training, for flows whose
            ``log_prob`` is one pass: by default 0.2 below 100 rows a feature, falling to zero at
            10,000. The flow keeps none of it;
            ``average``, the decay of the weights' exponential average: by default a memory of four
            epochs, within 100 to 2,000 steps; 0 for none;
            ``clip``, the largest gradient norm (5);
            ``patience``, epochs without a better validation score before stopping (30);
            ``start``, whether to make the data-dependent start first (``pf.initialize``); False to
            go on training.

    Returns:
        The course of training, with ``.plot()``.

    Raises:
        TypeError: an argument that there is not.
        ValueError: what is no flow, data that do not fit it (integers, or floats where it is a
            model of integers, NaN, another shape, outside its support or on its border, no rows),
            an argument out of range, a checkpoint of another training, or no compiler to compile
            with; nothing is trained then.
        DivergedError: the loss was not finite again after three rollbacks; the flow holds the best
            weights found.
        OSError: a checkpoint could not be written; the flow holds the best weights so far, and the
            checkpoints before are whole.

    Warns:
        UserWarning: which rows are left out as far outside all others, and by which column.

    Example:
        >>> import torch, pyroflows as pf
        >>> x = torch.randn(500, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
        >>> history = pf.fit(pf.nice(2, hidden=(16,)), x, max_epochs=3, progress=False)
        >>> len(history.val)
        3
    """
    check_is_flow(flow=flow)
    numbers = _checked(recipe, seed=seed, max_epochs=max_epochs, batch_size=batch_size)
    # A model of integers is trained as a flow is.
    model = cast("Flow", flow if bins is None else quantized(cast("Flow", flow), bins))
    seed, batch_size = to_builtin(seed), to_builtin(batch_size)
    at = open_fabric(fabric, model)
    shard = at.global_rank, at.world_size
    batches, validation = sources(model, x, context, val, batch_size, seed, shard)
    plenty = batches.count / features(model)
    dropout = numbers["dropout"]
    dropout = default_dropout(model, plenty) if dropout is None else checked_dropout(model, dropout)
    steps = count_batches(batches)
    if len(counts := set(gathered(at, steps))) > 1:
        raise ValueError(f"x: expected as many batches in each process, got {sorted(counts)}")
    decay, average = numbers["weight_decay"], numbers["average"]
    settings = Settings(
        max_epochs=max_epochs or min(max(8000 // steps, 20), 300),
        lr=numbers["lr"],
        weight_decay=default_weight_decay(plenty) if decay is None else decay,
        clip=numbers["clip"],
        patience=numbers["patience"],
        average=default_average(steps) if average is None else average,
        progress=progress and at.is_global_zero,
        label="fit",
        compile=compile,
    )
    identity = partial(
        facts_of_fit, model, batches, validation, vars(settings), dropout, val=val, seed=seed
    )
    with (
        open_checkpoints(checkpoint, identity, at, model.state_dict().values()) as checkpoints,
        _as_before_if_refused(model),
    ):
        first = batches.first(INITIAL_IMAGES if len(model.event_shape) == 3 else INITIAL_ROWS)
        held_out, first = screened(batches, validation, at.broadcast(first))
        if numbers["start"] and not (checkpoints is not None and checkpoints.found):
            model.initialize(*first.to(model.device).batch)
        set_dropout(model, dropout)
        history = empty_history(model)
        loss = _Loss(model)
        evaluate = None if held_out is None else lambda: _score(model, held_out, at, seed)
        history = optimise(model, loss, batches, evaluate, settings, at, checkpoints, history)
        history.left_out = 0 if batches.screen is None else batches.screen.count
        return history


def _checked(recipe: Mapping[str, Any], **sizes: int | None) -> dict[str, Any]:
    """All numbers of a recipe.

    Raises:
        TypeError: an argument that there is not.
        ValueError: one that has moved, or a number out of range.
    """
    known = tuple(signature(fit).parameters)
    numbers = complete(recipe, FIT_RECIPE, known, MOVED)
    check_positive(lr=numbers["lr"], clip=numbers["clip"])
    check_whole(1, patience=numbers["patience"])
    check_whole(0, seed=sizes.pop("seed"))
    check_whole(1, **{name: value for name, value in sizes.items() if value is not None})
    if numbers["average"] is not None:
        check_share(average=numbers["average"])
    if numbers["weight_decay"] is not None:
        check_not_negative(weight_decay=numbers["weight_decay"])
    return numbers


@contextlib.contextmanager
def _as_before_if_refused(flow: Flow) -> Iterator[None]:
    """Where a bad batch of a loader is refused, the flow is as if nothing had been done."""
    before = copy.deepcopy(flow.state_dict())
    try:
        yield
    except ValueError:
        flow.load_state_dict(before)
        raise
    finally:
        set_dropout(flow, 0.0)
        flow.eval()


@torch.no_grad()
def _score(flow: Flow, validation: Validation, fabric: Fabric, seed: int) -> float:
    """Mean log-likelihood of validation rows in nats, each row once over all processes.

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
    total = reduced(fabric, total, "sum")
    if not total[1]:
        raise ValueError(
            "val: the data loader gave no rows; give one that can be gone through again after "
            "each epoch"
        )
    return (total[0] / total[1]).item()
