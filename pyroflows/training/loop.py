"""The training loop: steps, averaged weights, a way back from bad steps, the best kept, resuming.

What a step is, a ``Task`` says; how long a period of steps is, what it scored and when training is
over, a ``Schedule``. ``pf.fit`` and ``pf.distill`` share one of each (``training.epochs``);
``pf.fit_guide`` has its own (``infer.plateau``).
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor

from pyroflows._checks import to_builtin
from pyroflows.data.position import Passes
from pyroflows.training.checkpoints import Checkpoints
from pyroflows.training.history import LINES, History
from pyroflows.training.progress import Progress
from pyroflows.training.state import ANY, Finite, Maybe, Number, check_like
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
        """Periods done; None where a checkpoint within a period makes no sense."""

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
        self.fabric, self.checkpoints, self.history = fabric, checkpoints, history
        schedule.run = self
        self.lr = float(pace.lr)
        self.optimiser = self._new_optimiser()
        self.average = Average(task.parameters, pace.average)
        self.best = Snapshot([*task.parameters, *task.buffers])
        if checkpoints is not None and checkpoints.found:
            self._load(checkpoints)

    def train(self) -> History:
        """Until the schedule ends it; the task ends with the weights that are kept.

        Raises:
            DivergedError: losses stayed non-finite after three rollbacks.
            OSError: a checkpoint could not be written.
        """
        history, schedule, pace = self.history, self.schedule, self.pace
        start = time.perf_counter() - history.seconds
        bar = Progress(pace.label, schedule.unit, schedule.total, schedule.done, pace.progress)
        try:
            while not schedule.end():
                self._do_period(bar)
                history.seconds = time.perf_counter() - start
                self._save_after_period()
            if not history.steps:
                schedule.give_up()
            history.stopped = schedule.end()
        except KeyboardInterrupt:
            history.stopped = "interrupted"
            bar.say(f"{pace.label}: interrupted; what it came to: {history}")
        except BaseException:
            self.best.restore()
            raise
        finally:
            self.optimiser.zero_grad()
            bar.close()
            history.seconds = time.perf_counter() - start
        schedule.finish()
        if history.share_lost > MUCH_LOST:
            lost = ", and ".join(history.lost())
            warnings.warn(f"{pace.label}: {lost}; try a smaller lr= ({history})", stacklevel=3)
        return history

    def _do_period(self, bar: Progress) -> None:
        """Its steps, an evaluation, and a line of the history or a rollback."""
        begin = self.schedule.done
        for batch in self.schedule.batches():
            self._step(batch)
            bar.update(self.schedule.done - begin)
            begin = self.schedule.done
            self._save_if_due(self.schedule.progress(within=True))
        if not self.schedule.judge():
            self._roll_back()
        elif self.history.steps:
            bar.tell(**self.schedule.facts())
        bar.update(self.schedule.done - begin)

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
        if self.history.rollbacks == self.schedule.most_rollbacks:
            self.schedule.give_up()
        self.history.rollbacks += 1
        self.lr *= SHRINK
        self.optimiser = self._new_optimiser()
        self.best.restore()
        self.average.restart()
        self.schedule.rolled_back()

    def _save_after_period(self) -> None:
        """Write a checkpoint where it is time, or training is over."""
        if self.schedule.end():
            self._save(self.schedule.progress())
        else:
            self._save_if_due(self.schedule.progress())

    def _save_if_due(self, progress: float | None) -> None:
        if self.checkpoints is not None and progress is not None and self.checkpoints.due(progress):
            self._save(progress)

    def _save(self, progress: float | None) -> None:
        if self.checkpoints is None or progress is None:
            return
        shared, apart = self.schedule.state_dict()
        alike = {
            "tensors": [*self.task.parameters, *self.task.buffers],
            "best": self.best.copies,
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict()["state"],
            "precision": self.fabric.strategy.precision.state_dict(),
            "history": dataclasses.asdict(self.history),
            "lr": self.lr,
            "step_size": self.optimiser.param_groups[0]["lr"],
            "schedule": shared,
            "progress": progress,
        }
        mine = {"passes": self.passes.state_dict(), "schedule": apart}
        self.checkpoints.save(progress, alike, mine)

    @torch.no_grad()
    def _load(self, checkpoints: Checkpoints) -> None:
        """Go on from a checkpoint; a process that had none keeps its own random numbers."""
        shared, mine = checkpoints.load(self._check)
        tensors = [*self.task.parameters, *self.task.buffers]
        for tensor, value in zip(tensors, shared["tensors"], strict=True):
            tensor.copy_(value)
        self.best.load(shared["best"])
        self.average.load_state_dict(shared["average"])
        self._load_moments(shared["optimiser"])
        self.fabric.strategy.precision.load_state_dict(shared["precision"])
        self.history = History(**shared["history"])
        self.lr = shared["lr"]
        for group in self.optimiser.param_groups:
            group["lr"] = shared["step_size"]
        checkpoints.restart(shared["progress"])
        if mine is not None:
            self.passes.load_state_dict(mine["passes"])
        self.schedule.load_state_dict(shared["schedule"], mine and mine["schedule"])

    def _check(self, state: dict[str, Any]) -> None:
        """See that a state may be put in place, before any of it is.

        Raises:
            ValueError: it may not.
        """
        shared, apart = self.schedule.pattern()
        check_like(state["shared"], {**self._pattern(), "schedule": shared}, "its state")
        for mine in state["processes"]:
            check_like(mine, {"passes": ANY, "schedule": apart}, "a process")
            self.passes.check(mine["passes"])
        if not History(**state["shared"]["history"]).is_whole:
            raise ValueError("the lines of its history are not of one length")
        progress, lr = state["shared"]["progress"], state["shared"]["lr"]
        if not (0 <= progress < 2**53 and lr > 0):
            raise ValueError(f"progress {progress}, step size {lr}")

    def _pattern(self) -> dict[str, Any]:
        """What the state that all processes share looks like."""
        parameters, buffers = self.task.parameters, self.task.buffers
        moments = {
            index: Maybe({"step": Number(), "exp_avg": p, "exp_avg_sq": p})
            for index, p in enumerate(self._optimised())
        }
        return {
            "tensors": [*parameters, *buffers],
            "best": [*map(Finite, parameters), *buffers],
            "average": {"steps": 0, "values": parameters},
            "optimiser": moments,
            "precision": self.fabric.strategy.precision.state_dict(),
            "history": {**dataclasses.asdict(self.history), **LINES},
            "lr": self.lr,
            "step_size": self.lr,
            "progress": 0.0,
        }

    def _optimised(self) -> list[Tensor]:
        """The parameters in the optimiser's order."""
        return [p for group in self.optimiser.param_groups for p in group["params"]]

    def _load_moments(self, state: dict[int, dict[str, Any]]) -> None:
        """Each moment laid out in memory as its parameter, with which kernels pair it."""
        parameters = self._optimised()
        state = {
            index: {
                name: torch.empty_like(parameters[index], dtype=value.dtype).copy_(value)
                if isinstance(value, Tensor) and value.shape == parameters[index].shape
                else value
                for name, value in values.items()
            }
            for index, values in state.items()
        }
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})


def scales(fabric: Fabric) -> bool:
    """Whether the loss is scaled, as in half precision."""
    return getattr(fabric.strategy.precision, "scaler", None) is not None
