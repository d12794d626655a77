"""The training loop: mini-batches, averaged weights, a way back from bad steps, the best kept.

``pf.fit`` and ``pf.distill`` say what the loss is and how weights are judged; this file does the
rest, on one device or many (Lightning Fabric).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from pyroflows._checks import to_builtin
from pyroflows._distributed import draw_apart
from pyroflows.data.position import Passes
from pyroflows.training.checkpoints import Checkpoints
from pyroflows.training.compiled import prepare_compiler
from pyroflows.training.history import History
from pyroflows.training.progress import Progress
from pyroflows.training.weights import Average, Snapshot

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MAX_ROLLBACKS = 3


class DivergedError(RuntimeError):
    """Training kept running into losses that are not finite.

    The message says what to try; the module holds its best weights, so the error may be caught.

    Example:
        >>> import pyroflows as pf
        >>> try:
        ...     raise pf.DivergedError("training: the loss is not finite")
        ... except RuntimeError as error:
        ...     print(error)
        training: the loss is not finite
    """


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
        progress: say on stderr how far it is.
        label: what it is called there.
        compile: the loss is compiled; ask for a compiler.
        skip: leave out steps that are not finite and count them, rather than roll back.
        curves: further numbers of a line of the history, by name, asked for after each evaluation
            and shown in place of the scores.
        epsilon: of Adam, which divides each gradient by its own size. Of one that is a float32
            rounding error, torch's 1e-8 makes a full step; then the order in which rows are summed
            moves the losses of 50 steps by 1e-3.
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
    curves: Callable[[], dict[str, float]] | None = None
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        """Numbers of numpy's become Python's: a history of them could not be saved."""
        for name, value in vars(self).items():
            object.__setattr__(self, name, to_builtin(value))


def optimise(
    model: nn.Module,
    loss: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    evaluate: Callable[[], float] | None,
    settings: Settings,
    fabric: Fabric,
    keep: Checkpoints | None = None,
    history: History | None = None,
) -> History:
    """Minimise ``loss(*batch)`` over the parameters of ``model``; the best weights stay in it.

    Args:
        model: what is trained, part of ``loss``.
        loss: a module that returns the mean loss of a batch.
        batches: one epoch each time it is iterated.
        evaluate: a score of the present weights, higher is better, the same in all processes; None
            to judge by the training loss. Its ``state_dict``, if it has one, is kept too.
        settings: how.
        fabric: where.
        keep: checkpoints to write, and one to go on from.
        history: an empty one to fill, with a unit of its own; by default in nats.

    Raises:
        DivergedError: losses stayed non-finite after three rollbacks.
        OSError: a checkpoint could not be written.
    """
    run = _Run(model, loss, batches, evaluate, settings, fabric, keep, history)
    start = time.perf_counter() - run.history.seconds
    epochs = settings.max_epochs
    progress = Progress(settings.label, "epoch", epochs, run.epoch, settings.progress)
    try:
        while not run.end():
            run.do_epoch()
            run.history.seconds = time.perf_counter() - start
            run.save()
            if run.history.steps:
                progress.tell(**_shown(run.history))
            progress.update()
        if not run.history.steps:
            run.give_up()
        run.history.stopped = run.end()
    except KeyboardInterrupt:
        run.history.stopped = "interrupted"
        progress.say(f"{settings.label}: interrupted, with the best weights of {run.history}")
    finally:
        run.best.restore()
        progress.close()
        run.history.seconds = time.perf_counter() - start
    return run.history


class _Run:
    """All that changes while training: done epoch by epoch, saved, and put back.

    Its arguments are those of ``optimise``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        batches: Iterable[tuple[Any, ...]],
        evaluate: Callable[[], float] | None,
        settings: Settings,
        fabric: Fabric,
        keep: Checkpoints | None,
        history: History | None,
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("flow: it has no parameters that require a gradient, nothing to train")
        if settings.compile:
            prepare_compiler(fabric.device)
            loss.compile()
        self.model, self.evaluate = model, evaluate
        self.settings, self.fabric, self.keep = settings, fabric, keep
        self.loss, self.optimiser = _set_up(fabric, loss, self.parameters, settings)
        draw_apart(fabric)
        self.average = Average(self.parameters, settings.average)
        self.best = Snapshot(model)
        self.passes = Passes(batches, fabric.device)
        self.history = History() if history is None else history
        self.epoch = 0
        self.factor = 1.0
        self.since_best = 0
        self.sums = _Sums()
        if keep is not None and keep.found is not None:
            self._load(keep.found["shared"], keep.own)

    def end(self) -> str:
        """Why training is over, in words; none while it is not."""
        counted, most = self.history.counted, self.settings.max_epochs
        if self.evaluate is not None and self.since_best >= self.settings.patience:
            return f"no better score for {self.settings.patience} {counted}s"
        return f"all {most} {counted}s done" if self.epoch >= most else ""

    def do_epoch(self) -> None:
        """Steps over all batches, a look at the weights, and a line of the history."""
        self._train()
        self.loss.eval()
        with self.average.in_place():
            train, val = self.sums.mean(self.fabric), None
            good = math.isfinite(train) and _all_finite(self.parameters)
            if good and self.evaluate is not None:
                val = self.evaluate()
                good = math.isfinite(val)
            if good:
                self._record(train, val)
        if not good:
            self._roll_back()
        self.epoch += 1
        self.sums = _Sums()

    def _train(self) -> None:
        """One pass over the batches; no host synchronisation, unless steps may be skipped."""
        self.loss.train()
        try:
            count = len(self.passes.batches)
        except TypeError:  # a stream
            count = None
        for batch in self.passes:
            place = self.passes.position
            self._step(batch, self.epoch + ((place - 1) / count if count else 0.0))
            if self.keep is not None and count and place < count:
                self._save_if_due(self.epoch + place / count)
        if not self.sums.seen:
            raise ValueError("x: the data loader gave no batch")

    def _step(self, batch: tuple[Any, ...], done: float) -> None:
        share = done / self.settings.max_epochs
        for group in self.optimiser.param_groups:
            group["lr"] = self.factor * self.settings.lr * 0.5 * (1 + math.cos(math.pi * share))
        batch = self.fabric.to_device(batch)
        value = self.loss(*batch)
        self.optimiser.zero_grad()
        self.fabric.backward(value)
        norm = self.fabric.clip_gradients(
            self.loss, self.optimiser, max_norm=self.settings.clip, error_if_nonfinite=False
        )
        self.sums.seen += 1
        # The gradients' norm is the same in all processes, so they skip together.
        if self.settings.skip and not math.isfinite(norm):
            self.history.skipped += 1
            if _scales(self.fabric):
                self.optimiser.step()  # which leaves it out too, and lowers the loss's scale
            return
        self.optimiser.step()
        self.average.update()
        self.sums.add(value.detach(), len(batch[0]) if isinstance(batch[0], Tensor) else 1)

    def _record(self, train: float, val: float | None) -> None:
        history = self.history
        curves = self.settings.curves() if self.settings.curves else None
        history.record(self.epoch, train, val, self.optimiser.param_groups[0]["lr"], curves)
        self.since_best += 1
        if history.improved():
            history.best = len(history.steps) - 1
            self.best.take()
            self.since_best = 0

    def _roll_back(self) -> None:
        """Return to the best weights with a smaller step, or give up."""
        self.history.rollbacks += 1
        if self.history.rollbacks > MAX_ROLLBACKS:
            self.give_up()
        self.factor *= 0.3
        self.loss, self.optimiser = _set_up(self.fabric, self.loss, self.parameters, self.settings)
        self.best.restore()
        self.average.restart()

    def give_up(self) -> NoReturn:
        """Say what was tried, and what may help."""
        history = self.history
        history.stopped = "diverged"
        kept = "the best weights found" if history.steps else "the weights it came with"
        raise DivergedError(
            f"the loss was not finite, also after {min(history.rollbacks, MAX_ROLLBACKS)} "
            f"rollbacks, the last with a step size of {self.factor * self.settings.lr:.2g}. The "
            f"flow holds {kept} ({len(history.steps)} good epochs). Try a smaller lr=, a smaller "
            "clip=, flow.double(), a smaller bound= in the builder, or look for extreme rows"
        )

    def save(self) -> None:
        """Write a checkpoint after an epoch, where it is time or training is over."""
        if self.keep is not None and self.end():
            self._save(self.epoch)
        elif self.keep is not None:
            self._save_if_due(self.epoch)

    def _save_if_due(self, progress: float) -> None:
        if self.keep.due(progress):
            self._save(progress)

    def _save(self, progress: float) -> None:
        judge = getattr(self.evaluate, "state_dict", dict)()
        shared = {
            "model": self.model.state_dict(),
            "best": self.best.copies,
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict()["state"],
            "precision": self.fabric.strategy.precision.state_dict(),
            "history": dataclasses.asdict(self.history),
            "epoch": self.epoch,
            "factor": self.factor,
            "since_best": self.since_best,
            "progress": progress,
        }
        own = {"passes": self.passes.state_dict(), "sums": vars(self.sums), "judge": judge}
        self.keep.save(progress, shared, own)

    def _load(self, shared: dict[str, Any], own: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; a process that had none keeps its own random numbers."""
        self.model.load_state_dict(shared["model"])
        self.best.load(shared["best"])
        self.average.load_state_dict(shared["average"])
        state = self.optimiser.state_dict()
        self.optimiser.load_state_dict({**state, "state": shared["optimiser"]})
        self.fabric.strategy.precision.load_state_dict(shared["precision"])
        self.history = History(**shared["history"])
        self.epoch, self.factor = shared["epoch"], shared["factor"]
        self.since_best = shared["since_best"]
        self.keep.restart(shared["progress"])
        if own is not None:
            self.passes.load_state_dict(own["passes"])
            self.sums = _Sums(**own["sums"])
            if own["judge"]:
                self.evaluate.load_state_dict(own["judge"])
        self.keep.found = None  # as large as the training itself


@dataclass
class _Sums:
    """The training loss so far in an epoch."""

    total: Tensor | None = None
    rows: int = 0
    seen: int = 0

    def add(self, value: Tensor, rows: int) -> None:
        part = value * rows
        self.total = part if self.total is None else self.total.to(part.device) + part
        self.rows += rows

    def mean(self, fabric: Fabric) -> float:
        """The mean score over all processes; NaN where no step was finite."""
        if self.total is None:
            return math.nan
        total = self.total.double().to(fabric.device)
        pair = torch.stack([total, torch.full_like(total, self.rows)])
        pair = fabric.all_reduce(pair, reduce_op="sum")
        return -(pair[0] / pair[1]).item()


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
    fused = not _scales(fabric) and fabric.device.type in ("cpu", "cuda")
    kind = {"fused": True} if fused else {"foreach": True}
    optimiser = torch.optim.AdamW(groups, lr=settings.lr, eps=settings.epsilon, **kind)
    if hasattr(loss, "_forward_module"):  # set up before a rollback
        return loss, fabric.setup_optimizers(optimiser)
    return fabric.setup(loss, optimiser)


def _scales(fabric: Fabric) -> bool:
    """Whether the loss is scaled, as in half precision."""
    return getattr(fabric.strategy.precision, "scaler", None) is not None


def _all_finite(parameters: list[nn.Parameter]) -> bool:
    with torch.no_grad():
        norms = torch._foreach_norm([p.detach() for p in parameters])
        return bool(torch.isfinite(torch.stack(norms)).all())


def _shown(history: History) -> dict[str, str]:
    if history.curves:
        return {name: f"{values[-1]:.3f}" for name, values in history.curves.items()}
    shown = {"train": f"{history.train[-1]:.3f}"}
    if history.val:
        shown["val"] = f"{history.val[-1]:.3f}"
    shown["best"] = f"{history.score:.3f} {history.unit}"
    return shown
