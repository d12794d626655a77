"""The training loop: steps, averaged weights, a way back from bad steps, the best kept, resuming.

What a step is, a ``Task`` says; how long a period of steps is, what it scored and when training is
over, a ``Schedule``. ``pf.fit`` and ``pf.distill`` share one of each (``training.epochs``);
``pf.fit_guide`` has its own (``infer.plateau``).
"""

from __future__ import annotations

import math
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor

from pyroflows._checks import to_builtin
from pyroflows._distributed import gathered
from pyroflows.data.position import Passes
from pyroflows.training.checkpoints import Checkpoints
from pyroflows.training.history import History
from pyroflows.training.interruption import WORDS, Interruption
from pyroflows.training.kept import Kept
from pyroflows.training.progress import Progress
from pyroflows.training.weights import Average, Snapshot

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MAX_ROLLBACKS = 3
SHRINK = 0.3  # of the step size, at a rollback
MUCH_LOST = 0.05  # share of steps or periods from which on a warning says so


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
class Pace:
    """What every training has.

    Attributes:
        lr: first step size.
        average: decay of the exponential average of the weights; 0 for none.
        progress: say on stderr how far it is.
        label: what it is called there.
    """

    lr: float
    average: float
    progress: bool
    label: str

    def __post_init__(self) -> None:
        """Numbers of numpy's become Python's: a history of them could not be saved."""
        for name, value in vars(self).items():
            object.__setattr__(self, name, to_builtin(value))


class Task(Protocol):
    """What is trained, and what a step does.

    Attributes:
        parameters: the tensors that steps change.
        buffers: the others that belong to what is trained.
    """

    parameters: list[Tensor]
    buffers: list[Tensor]

    def optimiser(self) -> torch.optim.Optimizer:
        """A fresh one: at the start, and after each rollback."""

    def backward(self, batch: Any) -> Tensor | float:
        """The loss of a batch, its gradients in place; NaN where it cannot be had."""

    def clip(self) -> Tensor | float:
        """Clip the gradients; their norm before, NaN where the step is to be left out."""


class Schedule(ABC):
    """Periods of steps: what they score, how large steps are, when training is over.

    Attributes:
        unit: what progress counts: ``"epoch"`` or ``"step"``.
        total: how many of these at most.
        done: how many of these are done.
        skips: leave out steps that are not finite, rather than roll back after the period.
        most_rollbacks: before it gives up.
        run: the training it belongs to.
    """

    unit = "epoch"
    skips = False
    most_rollbacks = MAX_ROLLBACKS
    total: int
    done: int = 0
    run: Run

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Those of one period, or of what is left of one."""

    def share(self) -> float:
        """Of the step size, for the next step."""
        return 1.0

    @abstractmethod
    def add(self, loss: Tensor | float, batch: Any, /) -> None:
        """A step was taken."""

    @abstractmethod
    def skipped(self) -> None:
        """A step was left out."""

    @abstractmethod
    def judge(self) -> bool:
        """Score the period and record that; False where it cannot be, and nothing is recorded."""

    @abstractmethod
    def progress(self, within: bool = False) -> float | None:
        """Periods done; None where within a period no checkpoint is due."""

    @abstractmethod
    def end(self) -> str:
        """Why training is over, in words; none while it is not."""

    @abstractmethod
    def finish(self) -> None:
        """Leave the weights that are kept in place."""

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """What to show beside the count."""

    @abstractmethod
    def give_up(self) -> NoReturn:
        """Raise: say what was tried, and what may help."""

    @abstractmethod
    def rolled_back(self) -> None:
        """The weights are the best so far again, and steps are smaller."""

    @abstractmethod
    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What changes in it: what all processes have alike, and what each has of its own."""

    @abstractmethod
    def pattern(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What both of these look like, for ``training.state.check_like``."""

    @abstractmethod
    def load_state_dict(self, shared: dict[str, Any], apart: dict[str, Any] | None, /) -> None:
        """Go on from there."""


class Run:
    """All that changes while training: done period by period, saved, and put back.

    Args:
        task: what is trained.
        schedule: for how long.
        passes: the batches.
        pace: step size and average.
        fabric: where.
        checkpoints: to write, and one to go on from.
        history: an empty one to fill.
    """

    def __init__(
        self,
        task: Task,
        schedule: Schedule,
        passes: Passes,
        pace: Pace,
        fabric: Fabric,
        checkpoints: Checkpoints | None,
        history: History,
    ) -> None:
        self.task, self.schedule, self.passes, self.pace = task, schedule, passes, pace
        self.fabric, self.history = fabric, history
        schedule.run = weakref.proxy(self)
        self.lr = float(pace.lr)
        self.optimiser = self._new_optimiser()
        self.average = Average(task.parameters, pace.average)
        self.best = Snapshot([*task.parameters, *task.buffers])
        self.stop = Interruption()
        self.kept = Kept(self, checkpoints)
        self.kept.load()

    def train(self) -> History:
        """Until the schedule ends it; the task ends with the weights that are kept.

        Raises:
            DivergedError: losses stayed non-finite after three rollbacks.
            OSError: a checkpoint could not be written.
        """
        history, pace = self.history, self.pace
        start = time.perf_counter() - history.seconds
        bar = Progress(
            pace.label, self.schedule.unit, self.schedule.total, self.schedule.done, pace.progress
        )
        try:
            with self.stop:
                self._do_periods(bar, start)
        except KeyboardInterrupt:
            history.stopped = self.stop.word or "interrupted"
        except BaseException:
            self.best.restore()
            raise
        finally:
            self.optimiser.zero_grad()
            history.seconds = time.perf_counter() - start
            if history.stopped in WORDS.values():
                bar.say(f"{pace.label}: {history.stopped}; what it came to: {history}")
            bar.close()
        self.schedule.finish()
        if history.share_lost > MUCH_LOST:
            lost = ", and ".join(history.lost())
            warnings.warn(f"{pace.label}: {lost}; try a smaller lr= ({history})", stacklevel=3)
        return history

    def _do_periods(self, bar: Progress, start: float) -> None:
        """One after the other, each with its checkpoint where it is time."""
        history, schedule = self.history, self.schedule
        stopped = ""
        while not (stopped or schedule.end()):
            self._do_period(bar)
            history.seconds = time.perf_counter() - start
            stopped = self._stopped()
            if stopped or schedule.end():
                self.kept.save(schedule.progress(within=True) or schedule.progress())
            else:
                self.kept.save_if_due(schedule.progress())
        if not (stopped or history.steps):
            schedule.give_up()
        history.stopped = stopped or schedule.end()

    def _do_period(self, bar: Progress) -> None:
        """Its steps, an evaluation, and a line of the history or a rollback."""
        begin = self.schedule.done
        for batch in self.schedule.batches():
            self._step(batch)
            bar.update(self.schedule.done - begin)
            begin = self.schedule.done
            if self._stopped(within=True):
                return
            self.kept.save_if_due(self.schedule.progress(within=True))
        if not self.schedule.judge():
            self._roll_back()
        elif self.history.steps:
            bar.tell(**self.schedule.facts())
        bar.update(self.schedule.done - begin)

    def _stopped(self, within: bool = False) -> str:
        """By which signal training is to end here, if by any; several processes end a period."""
        if self.fabric.world_size == 1:
            return self.stop.word
        return "" if within else next(filter(None, gathered(self.fabric, self.stop.word)), "")

    def _new_optimiser(self) -> torch.optim.Optimizer:
        made = self.task.optimiser()
        for group in made.param_groups:
            group["lr"] = self.lr
        return made

    def _step(self, batch: Any) -> None:
        """One step; no host synchronisation, unless it may be skipped."""
        self.history.taken += 1
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * self.schedule.share()
        self.optimiser.zero_grad()
        loss = self.task.backward(batch)
        norm = self.task.clip()
        # The norm is the same in all processes, so they skip together.
        if self.schedule.skips and not math.isfinite(norm):
            self.history.skipped += 1
            if scales(self.fabric):
                self.optimiser.step()  # which leaves it out too, and lowers the loss's scale
            self.schedule.skipped()
            return
        self.optimiser.step()
        self.average.update()
        self.schedule.add(loss, batch)

    def record(
        self,
        step: int,
        train: float,
        val: float | None = None,
        curves: dict[str, float] | None = None,
        keep: bool | None = None,
    ) -> bool:
        """Add a line to the history; whether its weights are kept: the best, where none says so."""
        history = self.history
        history.record(step, train, val, self.optimiser.param_groups[0]["lr"], curves)
        if keep is None:
            keep = history.improved()
        if keep:
            history.best = len(history.steps) - 1
            self.best.take()
        return keep

    def _roll_back(self) -> None:
        """Return to the best weights with a smaller step, or give up."""
        if self.history.rollbacks >= self.schedule.most_rollbacks:
            self.schedule.give_up()
        self.history.rollbacks += 1
        self.lr *= SHRINK
        self.optimiser = self._new_optimiser()
        self.best.restore()
        self.average.restart()
        self.schedule.rolled_back()


def scales(fabric: Fabric) -> bool:
    """Whether the loss is scaled, as in half precision."""
    return getattr(fabric.strategy.precision, "scaler", None) is not None
