"""The schedule of a guide's training: windows of steps, smaller where the ELBO is flat or falls.

What training returns was measured: after each window the averaged parameters are scored by fresh
particles, the same each time, and so is the start. The last of these is kept that is as good as the
best within its noise: the very best would be the one that suits these particles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from pyroflows._distributed import reduced
from pyroflows.data.position import Passes, Repeated
from pyroflows.infer.elbo_task import ElboTask
from pyroflows.training.loop import SHRINK, Schedule
from pyroflows.training.state import Many, Maybe

if TYPE_CHECKING:
    from lightning_fabric import Fabric

WINDOW = 100
_MEASURED = 8  # batches at most by which parameters are measured
_DROPS = 3  # of the step, the last of which ends training
_NOISY_DROPS, _NOISY_FLAT = 5, 3  # where steps see a part of the rows: so many flat windows a drop
_STRAYS = 10  # failures in a row, before anything worked, that are no stray particles
_MOST_FALLS = 8  # each with 0.3 of the step, before training ends where it was best
_FALL = 10.0, 3.0  # standard errors and nats by which it is lower than a measured one
_NOISE = 2.0, 0.01  # standard errors and nats within which two ELBOs are alike
_NOTHING_LEFT = 0.01  # nats that are not worth a further step
_RUNAWAY = 1e4  # spread, in units of the start's, of a posterior that has no end


class Plateau(Schedule):
    """Windows of 100 steps; where the ELBO is flat the step shrinks, after the third time it ends.

    It ends at once where importance weights say that nothing is left to gain.

    Where it falls below one that was measured, training returns there with a smaller step.

    Args:
        task: what is trained.
        steps: the arguments of each step, without end.
        max_steps: how many at most.
        slack: nats by which the first batches may tell otherwise of parameters than all data; None
            where parameters are measured by all, so that it is a score.
        noisy: whether steps see a part of the rows, whose choice hides what the ELBO gains.
    """

    unit = "step"
    skips = True
    most_rollbacks = _MOST_FALLS + 1

    def __init__(
        self,
        task: ElboTask,
        steps: Iterator[tuple[Any, ...]],
        max_steps: int,
        slack: float | None,
        noisy: bool,
    ) -> None:
        self.task, self.total, self.slack, self.noisy = task, max_steps, slack, noisy
        self._best = -math.inf  # measured
        self._error = 0.0  # of the window that measured best; none is known of the start
        self._steps: Iterator[tuple[Any, ...]] | None = steps
        self._window: list[float] = []
        self._taken = 0  # steps of the window, those left out too
        self._last_error: Exception | None = None
        self._now: tuple[float, float] | None = None
        self._before: tuple[float, float] | None = None
        self._drops = 0
        self._flat = 0  # windows in a row
        self._found = False  # whether nothing is left to gain
        self._falls = 0  # windows that sent training back

    def batches(self) -> Iterator[Any]:
        """Those up to the next whole hundred of steps."""
        if self._steps is None:
            self._steps = endless(self.run.passes)
        if not (self.run.history.steps or self._taken):
            start = self.task.measure()
            if math.isfinite(start):
                self._record(0, start, start, 0.0)
        begin = self.done - self._taken
        end = min(begin - begin % WINDOW + WINDOW, self.total)
        while self.done < end:
            yield next(self._steps)

    def add(self, loss: Tensor | float, _batch: Any, /) -> None:
        """Take in the ELBO of a step."""
        self.done += 1
        self._taken += 1
        self._window.append(-float(loss))

    def skipped(self) -> None:
        """Raise the model's own error where no step has worked and this is no stray particle."""
        self.done += 1
        self._taken += 1
        self._last_error = self.task.error
        history = self.run.history
        failing = history.skipped > _STRAYS and not (self._window or self._has_worked)
        if self.task.error is not None and failing:
            raise self.task.error

    def judge(self) -> bool:
        """Record the window's ELBO; a smaller step where it is flat, a way back where it fell."""
        good = self._judge()
        self._window, self._taken, self._last_error = [], 0, None
        return good

    def _judge(self) -> bool:
        run = self.run
        if 2 * len(self._window) < self._taken:
            self._falls += 1
            if self._falls > _MOST_FALLS or not (self._window or self._has_worked):
                self.give_up()
            return False
        now = self._now = _middle_and_error(self._window)
        with run.average.in_place():
            measured = self.task.measure()
            strays = _runaway_sites(self.task.programs[1], run.fabric)
            if strays and measured > self._best:
                self._say_improper(now[0], strays)
            if strays or not _is_near(measured, self._best, self._noise(now[1]), _FALL):
                self._falls += 1
                return False
            self._record(self.done, now[0], measured, now[1])
            self._found = self.slack is None and self.task.gap(self.done) < _NOTHING_LEFT
        flat = self._before is not None and _is_flat(self._before, now)
        self._before = now
        self._flat = self._flat + 1 if flat else 0
        if self._flat == (_NOISY_FLAT if self.noisy else 1):
            self._flat = 0
            self._drops += 1
            if self._drops < self._most_drops:
                run.lr *= SHRINK
                self._before = None
        return True

    @property
    def _most_drops(self) -> int:
        return _NOISY_DROPS if self.noisy else _DROPS

    @property
    def _has_worked(self) -> bool:
        """Whether a window was recorded: the start is a line of its own."""
        return any(self.run.history.steps)

    @staticmethod
    def _say_improper(elbo: float, sites: list[str]) -> NoReturn:
        raise ValueError(
            f"model: the ELBO ({elbo:.4g} nats) grows without bound along "
            f"{', '.join(map(repr, sites))}, where the guide has grown, moved or shrunk by a "
            "factor of 10,000 from its start: the posterior is improper there. Give these sites a "
            "proper prior, or check the likelihood"
        )

    def _record(self, step: int, elbo: float, measured: float, error: float) -> None:
        """A line of the history, and its parameters kept unless they are clearly worse."""
        within = _NOISE if self.slack is None else _FALL
        keep = _is_near(measured, self._best, self._noise(error), within)
        if measured > self._best:
            self._best, self._error = measured, error
        self.run.record(step, elbo, measured if self.slack is None else None, keep=keep)

    def _noise(self, error: float) -> float:
        """What a window's error says of a fall: where steps are too large, all would be noise."""
        most = self._error if self.slack is None else self.slack / _FALL[0]
        return min(error, most)

    def progress(self, within: bool = False) -> float | None:
        """Windows done; within one a checkpoint is not due."""
        return None if within else self.done / WINDOW

    def end(self) -> str:
        """Why training is over, in words; none while it is not."""
        if self._falls > _MOST_FALLS:
            return f"the ELBO fell {self._falls} times, the last with steps of {self.run.lr:.1g}"
        if self._found:
            return (
                f"the ELBO is within {_NOTHING_LEFT} nats of the evidence after {self.done} steps"
            )
        if self._drops == self._most_drops:
            return f"the ELBO is flat after {self.done} steps"
        all_done = self.done >= self.total and not self._taken
        return f"all {self.total} steps done" if all_done else ""

    def finish(self) -> None:
        """The parameters that were kept, averaged over the steps before them."""
        self.run.best.restore()

    def facts(self) -> dict[str, str]:
        """The last window's ELBO and its error."""
        return {} if self._now is None else {"elbo": f"{self._now[0]:.2f} +- {self._now[1]:.2f}"}

    def give_up(self) -> NoReturn:
        """Say what was found, and what may help."""
        first = (self.done - 1) // WINDOW * WINDOW
        said = next(iter(str(self._last_error or "it does not").splitlines()), "without a word")
        raise FloatingPointError(
            f"{len(self._window) or 'no'} finite ELBOs in steps {first} to {self.done - 1}: the "
            "model's log-density is NaN or infinite where the guide draws, or it raises "
            f"({said}). Try another init_loc_fn=, a smaller lr=, or "
            "float64"
        )

    def rolled_back(self) -> None:
        """What the ELBO was before says nothing about what it gains now."""
        self._before = None

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Where it is, the same in all processes."""
        best = self._best if math.isfinite(self._best) else None
        window = {"done": self.done, "window": self._window, "taken": self._taken}
        judged = {"before": self._before, "best": best, "error": self._error}
        return {
            **window,
            **judged,
            "drops": self._drops,
            "flat": self._flat,
            "found": self._found,
            "falls": self._falls,
        }, {}

    def pattern(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What both of these look like."""
        window = {"done": 0, "window": Many(0.0), "taken": 0}
        judged = {"before": Maybe([0.0, 0.0]), "best": Maybe(0.0), "error": 0.0}
        return {**window, **judged, "drops": 0, "flat": 0, "found": False, "falls": 0}, {}

    def load_state_dict(self, shared: dict[str, Any], _apart: dict[str, Any] | None, /) -> None:
        """Go on from there, with the batches from where these were."""
        self.done, self._best, self._error = shared["done"], shared["best"], shared["error"]
        self._window, self._taken = shared["window"], shared["taken"]
        if self._best is None:
            self._best = -math.inf
        self._drops, self._falls = shared["drops"], shared["falls"]
        self._flat, self._found = shared["flat"], shared["found"]
        self._before = None if shared["before"] is None else tuple(shared["before"])
        self.task.firsts = first_steps(self.run.passes)
        self._steps = None


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """A batch as the arguments of one step."""
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def first_steps(batches: Passes) -> list[tuple[Any, ...]]:
    """The arguments of the first steps, by which parameters are measured, from the first pass.

    Args:
        batches: whose first pass has begun.
    """
    count = 1 if isinstance(batches.batches, Repeated) else _MEASURED
    return [as_arguments(batch) for batch in batches.first(count)]


def endless(batches: Passes) -> Iterator[tuple[Any, ...]]:
    """The batches again and again, each as the arguments of one step."""
    while True:
        empty = not batches.position  # of a pass gone on with nothing may be left
        for batch in batches:
            empty = False
            yield as_arguments(batch)
        if empty:
            raise ValueError("batches: expected at least one each time they are gone through")


@torch.no_grad()
def _runaway_sites(guide: Any, fabric: Fabric) -> list[str]:
    """Along which a flow guide has run away from its start: steps too large, or no end there."""
    if not hasattr(guide, "spread"):
        return []
    spread = reduced(fabric, guide.spread(256), "mean")
    bad = ((spread[1] > _RUNAWAY) | (spread[0] < 1 / _RUNAWAY)).any(0)
    return guide.sites_of(bad) if bad.any() else []


def _middle_and_error(values: list[float]) -> tuple[float, float]:
    """Median and its standard error, which single wild draws do not move."""
    tensor = torch.tensor(values, dtype=torch.float64)
    middle = tensor.median()
    # 1.4826 MAD estimates a Gaussian's spread; its median errs 1.2533 times as much as its mean.
    spread = 1.4826 * (tensor - middle).abs().median()
    return middle.item(), 1.2533 * spread.item() / len(values) ** 0.5


def _is_flat(before: tuple[float, float], now: tuple[float, float]) -> bool:
    noise = 2 * math.hypot(before[1], now[1])
    return now[0] - before[0] < max(noise, 0.01)


def _is_near(elbo: float, best: float, error: float, within: tuple[float, float]) -> bool:
    """Whether it is as high as the best, within so many standard errors and nats; never for NaN."""
    return best - elbo <= within[0] * error + within[1]
