"""A run's state as checkpoints hold it: written, looked at, and put back."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor

from pyroflows.training.checkpoints import Checkpoints
from pyroflows.training.history import LINES, History
from pyroflows.training.state import ANY, Finite, Maybe, Number, check_like


class Kept:
    """The checkpoints of a run; with none, all of it does nothing.

    Args:
        run: a ``training.loop.Run``, which has all that changes while training.
        checkpoints: to write, and one to go on from.
    """

    def __init__(self, run: Any, checkpoints: Checkpoints | None) -> None:
        self.run: Any = weakref.proxy(run)  # no circle, which would keep what was trained alive
        self.checkpoints = checkpoints

    def save_if_due(self, progress: float | None) -> None:
        """Write a checkpoint where it is time.

        Args:
            progress: periods done; None where there is nothing to write.
        """
        if self.checkpoints is not None and progress is not None and self.checkpoints.due(progress):
            self.save(progress)

    def save(self, progress: float | None) -> None:
        """Write a checkpoint.

        Args:
            progress: periods done; None where there is nothing to write.
        """
        if self.checkpoints is None or progress is None:
            return
        run = self.run
        shared, apart = run.schedule.state_dict()
        alike = {
            "tensors": [*run.task.parameters, *run.task.buffers],
            "best": run.best.copies,
            "average": run.average.state_dict(),
            "optimiser": run.optimiser.state_dict()["state"],
            "precision": run.fabric.strategy.precision.state_dict(),
            "history": dataclasses.asdict(run.history),
            "lr": run.lr,
            "step_size": run.optimiser.param_groups[0]["lr"],
            "schedule": shared,
            "progress": progress,
        }
        mine = {"passes": run.passes.state_dict(), "schedule": apart}
        self.checkpoints.save(progress, alike, mine)

    @torch.no_grad()
    def load(self) -> None:
        """Go on from a checkpoint, if there is one.

        A process that had no part in it keeps its own random numbers.

        Raises:
            ValueError: there are some, and none that may be gone on from; nothing was changed.
        """
        if self.checkpoints is None or not self.checkpoints.found:
            return
        shared, mine = self.checkpoints.load(self._check)
        run = self.run
        tensors = [*run.task.parameters, *run.task.buffers]
        for tensor, value in zip(tensors, shared["tensors"], strict=True):
            tensor.copy_(value)
        run.best.load(shared["best"])
        run.average.load_state_dict(shared["average"])
        self._load_moments(shared["optimiser"])
        run.fabric.strategy.precision.load_state_dict(shared["precision"])
        run.history = History(**shared["history"])
        run.lr = shared["lr"]
        for group in run.optimiser.param_groups:
            group["lr"] = shared["step_size"]
        self.checkpoints.restart(shared["progress"])
        if mine is not None:
            run.passes.load_state_dict(mine["passes"])
        run.schedule.load_state_dict(shared["schedule"], mine and mine["schedule"])

    def _check(self, state: dict[str, Any]) -> None:
        """See that a state may be put in place, before any of it is.

        Raises:
            ValueError: it may not.
        """
        shared, apart = self.run.schedule.pattern()
        check_like(state["shared"], {**self._pattern(), "schedule": shared}, "its state")
        for mine in state["processes"]:
            check_like(mine, {"passes": ANY, "schedule": apart}, "a process")
            self.run.passes.check(mine["passes"])
        if not History(**state["shared"]["history"]).is_whole:
            raise ValueError("the lines of its history are not of one length")
        progress, lr = state["shared"]["progress"], state["shared"]["lr"]
        if not (0 <= progress < 2**53 and lr > 0):
            raise ValueError(f"progress {progress}, step size {lr}")

    def _pattern(self) -> dict[str, Any]:
        """What the state that all processes share looks like."""
        run = self.run
        # Steps may leave NaN in what they change until training goes back; the rest stays finite.
        parameters, rest = run.task.parameters, [*map(_as_finite, run.task.buffers)]
        moments = {
            index: Maybe({"step": Number(), "exp_avg": p, "exp_avg_sq": p})
            for index, p in enumerate(self._optimised())
        }
        return {
            "tensors": [*parameters, *rest],
            "best": [*map(Finite, parameters), *rest],
            "average": {"steps": 0, "values": parameters},
            "optimiser": moments,
            "precision": run.fabric.strategy.precision.state_dict(),
            "history": {**dataclasses.asdict(run.history), **LINES},
            "lr": run.lr,
            "step_size": run.lr,
            "progress": 0.0,
        }

    def _optimised(self) -> list[Tensor]:
        """The parameters in the optimiser's order."""
        return [p for group in self.run.optimiser.param_groups for p in group["params"]]

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
        optimiser = self.run.optimiser
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def _as_finite(tensor: Tensor) -> Tensor | Finite:
    """The pattern of a tensor that is as finite as this one."""
    return Finite(tensor) if bool(torch.isfinite(tensor).all()) else tensor
