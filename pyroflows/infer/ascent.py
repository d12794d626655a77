"""The climb of the ELBO: windows of steps, a look after each, a way back, and an end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroflows.data.position import Passes
from pyroflows.infer.vectorize import ERRORS, ChangedModelError
from pyroflows.training.checkpoints import Checkpoints
from pyroflows.training.history import History
from pyroflows.training.progress import Progress
from pyroflows.training.weights import Average

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_WINDOW = 100
_DROPS = 3
_STRAYS = 10  # failures in a row, before anything worked, that are no stray particles
_ROLLBACKS = 3
_RUNAWAY = 1e4  # spread, in units of the start's, of a posterior that has no end


class Ascent:
    """The loop itself, and all that changes in it: done window by window, saved, and put back."""

    def __init__(
        self,
        backward: Callable[[tuple[Any, ...]], float],
        passes: Passes,
        parameters: list[Tensor],
        buffers: list[Tensor],
        guide: Callable[..., Any],
        lr: float,
        clip: float,
        average: float,
        max_steps: int,
        fabric: Fabric,
        keep: Checkpoints | None,
    ) -> None:
        self.backward, self.passes, self.guide = backward, passes, guide
        self.parameters, self.buffers, self.clip = parameters, buffers, clip
        self.max_steps, self.fabric, self.keep = max_steps, fabric, keep
        self.optimiser = torch.optim.Adam(parameters, lr=lr)
        self.average = Average(parameters, average)
        self.best = _Best(parameters)
        self.history = History(unit="nats of the ELBO", counted="step")
        self.step = 0
        self.before: tuple[float, float] | None = None
        self.drops = 0
        if keep is not None and keep.found is not None:
            self._load(keep.found["shared"], keep.own)

    def run(self, steps: Iterator[tuple[Any, ...]], progress: Progress) -> None:
        """Windows of steps until the ELBO is flat or the steps are done."""
        start = time.perf_counter() - self.history.seconds
        try:
            while self.drops < _DROPS and self.step < self.max_steps:
                begin = self.step
                window, error = self._window(steps, progress)
                if self._is_failing(window, self.step - begin):
                    self._roll_back(window, error)
                else:
                    self._look(window, progress)
                self.history.seconds = time.perf_counter() - start
                if self.keep is not None:
                    self._save()
            if self.drops == _DROPS:
                self.history.stopped = f"the ELBO is flat after {self.step} steps"
            else:
                self.history.stopped = f"all {self.max_steps} steps done"
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
            progress.say(f"fit_guide: interrupted, with the parameters of {self.history}")
        finally:
            self.optimiser.zero_grad()
            self.history.seconds = time.perf_counter() - start
        if self.history.steps:
            self.average.put()
        self.history.best = max(len(self.history.steps) - 1, 0)

    def _window(
        self, steps: Iterator[tuple[Any, ...]], progress: Progress
    ) -> tuple[list[float], Exception | None]:
        """Steps until the next look: their ELBOs, and the last error of the model."""
        window: list[float] = []
        last = None
        end = min(self.step - self.step % _WINDOW + _WINDOW, self.max_steps)
        while self.step < end:
            elbo, error = _step(
                self.backward, next(steps), self.parameters, self.optimiser, self.clip, self.fabric
            )
            self.step += 1
            progress.update()
            if elbo is not None:
                self.average.update()
                window.append(elbo)
                continue
            self.history.skipped += 1
            last = error
            failing = self.history.skipped > _STRAYS and not (window or self.history.steps)
            if error is not None and failing:
                raise error
        return window, last

    def _is_failing(self, window: list[float], taken: int) -> bool:
        """Whether too few of the steps taken had a finite ELBO."""
        few = 2 * len(window) < taken
        return few and bool(self.history.steps or not window)

    def _roll_back(self, window: list[float], error: Exception | None) -> None:
        """Return to the best parameters with a smaller step, or give up."""
        self.best.restore()
        if not self.history.steps or self.history.rollbacks == _ROLLBACKS:
            first = (self.step - 1) // _WINDOW * _WINDOW
            raise FloatingPointError(
                f"{len(window) or 'no'} finite ELBOs in steps {first} to {self.step - 1}: the "
                "model's log-density is NaN or infinite where the guide draws, or it raises "
                f"({error or 'it does not'}). Try another init_loc_fn=, a smaller lr=, or float64"
            )
        self.history.rollbacks += 1
        lr = 0.3 * self.optimiser.param_groups[0]["lr"]
        self.optimiser = torch.optim.Adam(self.parameters, lr=lr)
        self.average.restart()
        self.before = None

    def _look(self, window: list[float], progress: Progress) -> None:
        """Record a window's ELBO; a smaller step where it is flat."""
        now = _middle_and_error(window)
        group = self.optimiser.param_groups[0]
        self.best.take(now[0])
        self.history.record(self.step, now[0], None, group["lr"])
        progress.tell(elbo=f"{now[0]:.2f} +- {now[1]:.2f}")
        _check_bounded(self.guide, now[0], self.fabric)
        flat = self.before is not None and _is_flat(self.before, now)
        self.before = now
        if flat:
            self.drops += 1
            if self.drops < _DROPS:
                group["lr"] *= 0.3
                self.before = None

    def _save(self) -> None:
        """Write a checkpoint, where it is time or training is over."""
        progress = self.step / _WINDOW
        over = self.drops == _DROPS or self.step == self.max_steps
        if not (over or self.keep.due(progress)):
            return
        shared = {
            "parameters": self.parameters,
            "buffers": self.buffers,
            "average": self.average.state_dict(),
            "best": self.best.state_dict(),
            "optimiser": self.optimiser.state_dict()["state"],
            "lr": self.optimiser.param_groups[0]["lr"],
            "history": dataclasses.asdict(self.history),
            "step": self.step,
            "before": self.before,
            "drops": self.drops,
        }
        try:
            self.keep.save(progress, shared, {"passes": self.passes.state_dict()})
        except OSError:
            self.best.restore()
            raise

    @torch.no_grad()
    def _load(self, shared: dict[str, Any], own: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; a process that had none keeps its own random numbers."""
        saved = [*shared["parameters"], *shared["buffers"]]
        for tensor, value in zip([*self.parameters, *self.buffers], saved, strict=True):
            tensor.copy_(value)
        self.average.load_state_dict(shared["average"])
        self.best.load_state_dict(shared["best"])
        state = self.optimiser.state_dict()
        self.optimiser.load_state_dict({**state, "state": shared["optimiser"]})
        self.optimiser.param_groups[0]["lr"] = shared["lr"]
        self.history = History(**shared["history"])
        self.step, self.drops = shared["step"], shared["drops"]
        self.before = None if shared["before"] is None else tuple(shared["before"])
        self.keep.restart(self.step / _WINDOW)
        if own is not None:
            self.passes.load_state_dict(own["passes"])
        self.keep.found = None


class _Best:
    """The parameters at the end of the best window so far."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._elbo = -math.inf
        self._values: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"elbo": self._elbo, "values": self._values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a best."""
        self._elbo, self._values = state["elbo"], state["values"]

    def take(self, elbo: float) -> None:
        """Keep the parameters, if the ELBO is the best so far."""
        if elbo > self._elbo:
            self._elbo = elbo
            self._values = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, if any were kept."""
        for parameter, value in zip(self._parameters, self._values, strict=False):
            parameter.copy_(value)


def _step(
    backward: Callable[[tuple[Any, ...]], float],
    batch: tuple[Any, ...],
    parameters: list[Tensor],
    optimiser: torch.optim.Optimizer,
    clip: float,
    fabric: Fabric,
) -> tuple[float | None, Exception | None]:
    """One step, and its ELBO; None where it could not be taken, and what the model raised."""
    optimiser.zero_grad()
    elbo, raised = math.nan, None
    try:
        elbo = -backward(batch)
    except ChangedModelError:
        raise
    except ERRORS as error:
        raised = error
    if fabric.world_size > 1:
        elbo, raised = _average(parameters, elbo, raised, fabric)
    if raised is not None:
        return None, raised
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not (math.isfinite(elbo) and math.isfinite(norm.item())):
        return None, None
    optimiser.step()
    return elbo, None


@torch.no_grad()
def _average(
    parameters: list[Tensor], elbo: float, raised: Exception | None, fabric: Fabric
) -> tuple[float, Exception | None]:
    """Gradients and ELBO averaged over all processes, in one message; all fail if one does."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    ends = grads[0].new_tensor([elbo, float(raised is not None)])
    mean = fabric.all_reduce(torch.cat([*(g.reshape(-1) for g in grads), ends]), reduce_op="mean")
    *parts, ends = mean.split([*(g.numel() for g in grads), 2])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter)
    if ends[1] > 0 and raised is None:
        raised = RuntimeError("the model raised in another process")
    return ends[0].item(), raised


@torch.no_grad()
def _check_bounded(guide: Callable[..., Any], elbo: float, fabric: Fabric) -> None:
    """Raise where a flow guide has run away from its start: the posterior has no end there."""
    flow = getattr(guide, "flow", None)
    whiten = getattr(guide, "whiten", None)
    if flow is None or whiten is None:
        return
    latent = flow.sample((256,))
    spread = whiten.inverse_and_log_det(latent)[0].std(dim=0)
    spread = fabric.all_reduce(spread, reduce_op="mean")
    bad = (spread > _RUNAWAY) | (spread < 1 / _RUNAWAY)
    if not bad.any():
        return
    names = guide.sites_of(bad)
    raise ValueError(
        f"model: the ELBO ({elbo:.4g} nats) grows without bound along {', '.join(map(repr, names))}"
        ", where the guide has grown or shrunk by a factor of 10,000 from its start: the posterior "
        "is improper there. Give these sites a proper prior, or check the likelihood"
    )


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
