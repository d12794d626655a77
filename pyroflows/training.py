"""The training loop: mini-batches, averaged weights, a way back from bad steps, the best kept.

``pf.fit`` and ``pf.distill`` say what the loss is and how weights are judged; this file does the
rest, on one device or many (Lightning Fabric).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from pyroflows.compiling import prepare_compiler
from pyroflows.history import History

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MAX_ROLLBACKS = 3


class DivergedError(RuntimeError):
    """Training kept running into losses that are not finite."""


@dataclass(frozen=True)
class Settings:
    """How to train; the public functions document these.

    Attributes:
        max_epochs: the schedule's length.
        lr: first step size of Adam; falls to zero as half a cosine.
        weight_decay: of AdamW, for weight matrices.
        clip: largest gradient norm.
        patience: epochs without a better score before stopping.
        average: decay of the exponential average of the weights; 0 for none.
        progress: a progress bar, where there is a terminal.
        label: what the bar says.
        compile: the loss is compiled; ask for a compiler.
        skip: leave out steps that are not finite and count them, rather than roll back.
        shown: what else the bar shows, asked for after each epoch.
    """

    max_epochs: int
    lr: float
    weight_decay: float
    clip: float
    patience: int
    average: float
    progress: bool
    label: str
    compile: bool = False
    skip: bool = False
    shown: Callable[[], dict[str, str]] | None = None


def open_fabric(
    like: Tensor,
    *,
    accelerator: str | None,
    devices: int | str | list[int],
    strategy: str,
    precision: str | None,
    num_nodes: int,
) -> Fabric:
    """A launched Fabric; by default on the device, and in the dtype, of ``like``."""
    from lightning_fabric import Fabric

    own = "64-true" if like.dtype == torch.float64 else "32-true"
    if precision not in (None, own, "16-mixed", "bf16-mixed"):
        raise ValueError(
            f"precision: expected None, '16-mixed' or 'bf16-mixed' for a flow in {like.dtype} "
            f"(move the flow itself with .to(dtype)), got {precision!r}"
        )
    if accelerator is None and devices == 1 and like.device.index is not None:
        devices = [like.device.index]
    precision = precision or own
    fabric = Fabric(
        accelerator=accelerator or like.device.type,
        devices=devices,
        strategy=strategy,
        precision=precision,
        num_nodes=num_nodes,
    )
    fabric.launch()
    return fabric


class _Snapshot:
    """A copy of a module's parameters and buffers that can be put back in place."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = [*module.parameters(), *module.buffers()]
        self._copies = [t.detach().clone() for t in self._tensors]

    @torch.no_grad()
    def take(self) -> None:
        for copy, tensor in zip(self._copies, self._tensors, strict=True):
            copy.copy_(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        for copy, tensor in zip(self._copies, self._tensors, strict=True):
            tensor.copy_(copy)


class Average:
    """An exponential average of the parameters; its early steps weigh all weights so far alike."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.restart()

    def restart(self) -> None:
        """Forget the weights so far."""
        self._steps = 0
        self._values = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are."""
        self._steps += 1
        decay = min(self._decay, self._steps / (9 + self._steps))
        torch._foreach_lerp_(self._values, self._parameters, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged weights in the module, for as long as the context lasts."""
        if not self._decay:
            yield
            return
        raw = [p.detach().clone() for p in self._parameters]
        self._put(self._values)
        try:
            yield
        finally:
            self._put(raw)

    def put(self) -> None:
        """Leave the averaged weights in the module."""
        if self._decay:
            self._put(self._values)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def optimise(
    model: nn.Module,
    loss: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    evaluate: Callable[[], float] | None,
    settings: Settings,
    fabric: Fabric,
) -> History:
    """Minimise ``loss(*batch)`` over the parameters of ``model``; the best weights stay in it.

    Args:
        model: what is trained, part of ``loss``.
        loss: a module that returns the mean loss of a batch.
        batches: one epoch each time it is iterated.
        evaluate: a score of the present weights, higher is better; None to judge by the training
            loss.
        settings: how.
        fabric: where.

    Raises:
        DivergedError: losses stayed non-finite after three rollbacks.
    """
    start = time.perf_counter()
    history = History()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("flow: it has no parameters that require a gradient, nothing to train")
    if settings.compile:
        prepare_compiler(fabric.device)
        loss.compile()
    loss, optimiser = _set_up(fabric, loss, parameters, settings)
    average = Average(parameters, settings.average)
    best = _Snapshot(model)
    factor = 1.0
    since_best = 0
    bar = _progress(settings)
    history.stopped = f"all {settings.max_epochs} epochs done"
    try:
        for epoch in bar:
            loss.train()
            share = (epoch / settings.max_epochs, (epoch + 1) / settings.max_epochs)
            train, skipped = _epoch(
                loss, batches, optimiser, average, settings, fabric, factor, share
            )
            history.skipped += skipped
            loss.eval()
            with average.in_place():
                finite = math.isfinite(train) and _all_finite(parameters)
                val = evaluate() if evaluate is not None and finite else None
                if not finite or (val is not None and not math.isfinite(val)):
                    factor = _roll_back(history, factor, settings)
                    loss, optimiser = _set_up(fabric, loss, parameters, settings)
                    restarted = True
                else:
                    restarted = False
                    lr = optimiser.param_groups[0]["lr"]
                    history.record(epoch, train, val, lr)
                    since_best += 1
                    if len(history.steps) == 1 or _scores(history)[-1] > history.score:
                        history.best = len(history.steps) - 1
                        best.take()
                        since_best = 0
            if restarted:
                best.restore()
                average.restart()
                continue
            shown = settings.shown() if settings.shown else _postfix(history)
            bar.set_postfix(shown, refresh=False)
            if evaluate is not None and since_best >= settings.patience:
                history.stopped = f"no better score for {settings.patience} epochs"
                break
        if not history.steps:
            _give_up(history, factor, settings)
    except KeyboardInterrupt:
        history.stopped = "interrupted"
    finally:
        best.restore()
        bar.close()
        history.seconds = time.perf_counter() - start
    return history


def _set_up(
    fabric: Fabric, loss: nn.Module, parameters: list[nn.Parameter], settings: Settings
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The loss and a fresh optimiser, ready for the devices."""
    # Biases and scales are left alone: decay is for weight matrices.
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    # One kernel for all; with loss scaling it would unscale the gradients after they are clipped.
    scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
    fused = not scaled and fabric.device.type in ("cpu", "cuda")
    kind = {"fused": True} if fused else {"foreach": True}
    optimiser = torch.optim.AdamW(groups, lr=settings.lr, **kind)
    if hasattr(loss, "_forward_module"):  # set up before a rollback
        return loss, fabric.setup_optimizers(optimiser)
    return fabric.setup(loss, optimiser)


def _epoch(
    loss: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    optimiser: torch.optim.Optimizer,
    average: Average,
    settings: Settings,
    fabric: Fabric,
    factor: float,
    share: tuple[float, float],
) -> tuple[float, int]:
    """One pass over the batches: the mean training score, and how many steps were skipped.

    The only host synchronisation is last, unless steps may be skipped.
    """
    total, rows, seen, skipped = None, 0, 0, 0
    try:
        count = len(batches)
    except TypeError:  # a stream
        count = None
    for index, batch in enumerate(batches):
        done = share[0] + (share[1] - share[0]) * (index / count if count else 0.0)
        for group in optimiser.param_groups:
            group["lr"] = factor * settings.lr * 0.5 * (1 + math.cos(math.pi * done))
        batch = fabric.to_device(batch)
        value = loss(*batch)
        optimiser.zero_grad()
        fabric.backward(value)
        norm = fabric.clip_gradients(
            loss, optimiser, max_norm=settings.clip, error_if_nonfinite=False
        )
        seen += 1
        # The gradients' norm is the same in all processes, so they skip together.
        if settings.skip and not math.isfinite(norm):
            skipped += 1
            continue
        optimiser.step()
        average.update()
        weight = len(batch[0]) if isinstance(batch[0], Tensor) else 1
        part = value.detach() * weight
        total = part if total is None else total + part
        rows += weight
    if not seen:
        raise ValueError("x: the data loader gave no batch")
    if total is None:
        return math.nan, skipped
    pair = torch.stack([total.double(), torch.tensor(rows, device=total.device).double()])
    pair = fabric.all_reduce(pair, reduce_op="sum")
    return -(pair[0] / pair[1]).item(), skipped


def _all_finite(parameters: list[nn.Parameter]) -> bool:
    with torch.no_grad():
        norms = torch._foreach_norm([p.detach() for p in parameters])
        return bool(torch.isfinite(torch.stack(norms)).all())


def _scores(history: History) -> list[float]:
    return history.val or history.train


def _roll_back(history: History, factor: float, settings: Settings) -> float:
    """Count a rollback and return the smaller step factor, or give up."""
    history.rollbacks += 1
    if history.rollbacks > MAX_ROLLBACKS:
        _give_up(history, factor, settings)
    return 0.3 * factor


def _give_up(history: History, factor: float, settings: Settings) -> NoReturn:
    history.stopped = "diverged"
    kept = "the best weights found" if history.steps else "the weights it came with"
    raise DivergedError(
        f"the loss was not finite, also after {min(history.rollbacks, MAX_ROLLBACKS)} rollbacks, "
        f"the last with a step size of {factor * settings.lr:.2g}. The flow holds {kept} "
        f"({len(history.steps)} good epochs). Try a smaller lr=, a smaller clip=, flow.double(), a "
        "smaller bound= in the builder, or look for extreme rows"
    )


def _progress(settings: Settings) -> Any:
    from tqdm.auto import tqdm

    # disable=None: silent where there is no terminal to draw on.
    disable = None if settings.progress else True
    return tqdm(range(settings.max_epochs), desc=settings.label, unit="epoch", disable=disable)


def _postfix(history: History) -> dict[str, str]:
    shown = {"train": f"{history.train[-1]:.3f}"}
    if history.val:
        shown["val"] = f"{history.val[-1]:.3f}"
    shown["best"] = f"{history.score:.3f} {history.unit}"
    return shown
