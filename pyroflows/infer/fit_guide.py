"""Train a guide: many particles at once, a step and an end that come by themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyroflows.checkpoint import Checkpoints, Passes, open_checkpoints
from pyroflows.compiling import compiled_transforms, prepare_compiler
from pyroflows.history import History
from pyroflows.infer.objectives import PathELBO
from pyroflows.infer.particles import (
    ERRORS,
    ChangedModelError,
    can_run_together,
    plate_nesting,
)
from pyroflows.processes import draw_apart, make_same, open_fabric
from pyroflows.weights import Average

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_WINDOW = 100
_DROPS = 3
_STRAYS = 10  # failures in a row, before anything worked, that are no stray particles
_ROLLBACKS = 3
_RUNAWAY = 1e4  # spread, in units of the start's, of a posterior that has no end


def fit_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    objective: str | ELBO = "auto",
    particles: int = 128,
    lr: float = 1e-2,
    max_steps: int = 4000,
    clip: float = 10.0,
    average: float = 0.99,
    vectorize: bool = True,
    batches: Iterable[tuple[Any, ...]] | None = None,
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
    **kwargs: Any,
) -> History:
    """Maximise the ELBO over a guide's parameters (and the model's, if it has any), in place.

    Adam with clipped gradients. Every 100 steps the median ELBO is compared with that of the 100
    before; where it gained less than two standard errors, or 0.01 nats, the step shrinks to 0.3 of
    its size, and after the third time training stops. The parameters end as an exponential average
    of the last steps. Steps whose loss or gradient is not finite, or for which the model raises (a
    covariance that is not positive definite at a stray particle), are skipped and counted; where
    most of 100 are, training goes back to the best parameters with 0.3 of the step size, at most
    three times. The trained tensors are those in Pyro's parameter store.

    Args:
        model: a Pyro model.
        guide: any Pyro guide, ``pf.AutoFlow`` first of all.
        *args: the model's and guide's arguments.
        objective: ``"path"`` (``pf.infer.PathELBO``), ``"elbo"`` (``Trace_ELBO``), any Pyro ELBO of
            your own making (which then decides about particles), or ``"auto"``: the path gradient
            where the guide allows it.
        particles: draws per step, over all devices.
        lr: first step size.
        max_steps: an upper limit.
        clip: largest gradient norm.
        average: decay of the parameters' average; 0 for none.
        vectorize: compute all particles at once, in a plate outside all others. Before the first
            step two particles are also run one by one; where that fails or gives another
            log-density, all are run so, with a warning.
        batches: the arguments of each step instead of ``args``, gone through again and again: an
            iterable of tuples, for example a ``DataLoader``. Each process goes through them by
            itself, with random numbers of its own.
        checkpoint: a folder to keep checkpoints in, as in ``pf.fit``.
        every: windows (of 100 steps) from one checkpoint to the next.
        resume: go on from the last checkpoint there, if there is one.
        progress: show a progress bar with the ELBO and its standard error.
        compile: run the flows of guide and model under ``torch.compile``; Pyro's own part of the
            step stays as it is.
        accelerator: as in Lightning Fabric; by default where the arguments or the guide are.
        devices: as in Fabric. Each process draws its share of the particles; gradients are averaged
            over all, and steps that fail in one are skipped in all.
        strategy: as in Fabric: ``"auto"`` or ``"ddp"``.
        precision: ``"bf16-mixed"`` as in Fabric; by default the guide's own.
        num_nodes: as in Fabric.
        **kwargs: keyword arguments of model and guide.

    Returns:
        The ELBO in nats over the steps (a median per 100), with ``.plot()``.

    Raises:
        ValueError: an argument out of range, nothing to train, latent sites that come and go, a
            checkpoint of another training, or a posterior without end: one that is improper, whose
            ELBO grows without bound.
        FloatingPointError: none of the first 100 steps was finite, or most of 100 were not, also
            after three returns; the guide then has the best parameters found.
        OSError: a checkpoint could not be written; the checkpoints before are whole.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> guide = pf.AutoFlow(model, layers=1, hidden=(8,))
        >>> history = pf.fit_guide(model, guide, max_steps=300, progress=False)
        >>> abs(guide.median()["z"].item() - 3.0) < 0.2
        True
    """
    if particles < 1 or max_steps < 1 or lr <= 0 or clip <= 0 or not 0 <= average < 1:
        raise ValueError(
            "particles, max_steps, lr, clip: expected positive numbers, average one in [0, 1), got "
            f"{particles}, {max_steps}, {lr}, {clip}, {average}"
        )
    begin = time.perf_counter()
    if precision not in (None, "bf16-mixed"):
        raise ValueError(f"precision: expected None or 'bf16-mixed', got {precision!r}")
    fabric = open_fabric(
        _some_tensor(args, kwargs, guide, model),
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision,
        num_nodes=num_nodes,
    )
    if accelerator is not None or fabric.world_size > 1:
        args, kwargs = fabric.to_device((args, kwargs))
        for module in (model, guide):
            if isinstance(module, torch.nn.Module):
                module.to(fabric.device)
    draw_apart(fabric)
    passes = Passes(itertools.repeat(args) if batches is None else batches, fabric.device)
    steps = _again(passes)
    first = next(steps)
    if hasattr(guide, "setup"):
        guide.setup(*first, **kwargs)
    share = -(-particles // fabric.world_size)
    elbo = _elbo(objective, model, guide, first, kwargs, share, vectorize)

    def backward(now: tuple[Any, ...]) -> float:
        if fabric.world_size > 1:
            now = fabric.to_device(now)
        with fabric.autocast() if precision else contextlib.nullcontext():
            if not hasattr(elbo, "differentiable_loss"):  # as Pyro's RenyiELBO
                return elbo.loss_and_grads(model, guide, *now, **kwargs)
            loss = elbo.differentiable_loss(model, guide, *now, **kwargs)
        loss.backward()
        return loss.item()

    parameters = _parameters(model, guide, first, kwargs)
    if not parameters:
        raise ValueError("guide: neither it nor the model has parameters to train")
    buffers = list(guide.buffers()) if isinstance(guide, torch.nn.Module) else []
    make_same(fabric, [*parameters, *buffers])
    shapes = {str(i): f"{tuple(p.shape)} {p.dtype}" for i, p in enumerate(parameters)}
    keep = open_checkpoints(checkpoint, every, resume, {"fit_guide": "ELBO", **shapes}, fabric)
    stack = contextlib.ExitStack()
    if compile:
        prepare_compiler(next(iter(parameters)).device)
        flows = [m for m in (model, guide) if isinstance(m, torch.nn.Module)]
        stack.enter_context(compiled_transforms(flows))
    ascent = _Ascent(
        backward, passes, parameters, buffers, guide, lr, clip, average, max_steps, fabric, keep
    )
    if ascent.step:
        steps = _again(passes)
    else:
        steps = itertools.chain([first], steps)
    bar = _progress(max_steps, ascent.step, progress and fabric.is_global_zero)
    before = ascent.history.seconds
    try:
        with stack:
            ascent.run(steps, bar)
    finally:
        bar.close()
        ascent.history.seconds = before + time.perf_counter() - begin
    return ascent.history


class _Ascent:
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
        self.mean = Average(parameters, average)
        self.best = _Best(parameters)
        self.history = History(unit="nats of the ELBO")
        self.step = 0
        self.before: tuple[float, float] | None = None
        self.drops = 0
        if keep is not None and keep.found is not None:
            self._load(keep.found["shared"], keep.own)

    def run(self, steps: Iterator[tuple[Any, ...]], bar: Any) -> None:
        """Windows of steps until the ELBO is flat or the steps are done."""
        try:
            while self.drops < _DROPS and self.step < self.max_steps:
                window, error = self._window(steps, bar)
                if self._is_failing(window):
                    self._roll_back(window, error)
                else:
                    self._look(window, bar)
                if self.keep is not None:
                    self._save()
            if self.drops == _DROPS:
                self.history.stopped = f"the ELBO is flat after {self.step} steps"
            else:
                self.history.stopped = f"all {self.max_steps} steps done"
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
            if not bar.disable:
                bar.write(f"fit_guide: interrupted, with the parameters of {self.history}")
        finally:
            self.optimiser.zero_grad()
        if self.history.steps:
            self.mean.put()
        self.history.best = max(len(self.history.steps) - 1, 0)

    def _window(
        self, steps: Iterator[tuple[Any, ...]], bar: Any
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
            bar.update()
            if elbo is not None:
                self.mean.update()
                window.append(elbo)
                continue
            self.history.skipped += 1
            last = error
            failing = self.history.skipped > _STRAYS and not (window or self.history.steps)
            if error is not None and failing:
                raise error
        return window, last

    def _is_failing(self, window: list[float]) -> bool:
        few = 2 * len(window) < min(_WINDOW, self.step)
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
        self.mean.restart()
        self.before = None

    def _look(self, window: list[float], bar: Any) -> None:
        """Record a window's ELBO; a smaller step where it is flat."""
        now = _middle_and_error(window)
        group = self.optimiser.param_groups[0]
        self.best.take(now[0])
        self.history.record(self.step, now[0], None, group["lr"])
        bar.set_postfix(elbo=f"{now[0]:.2f} +- {now[1]:.2f}", refresh=False)
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
            "average": self.mean.state_dict(),
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
        self.mean.load_state_dict(shared["average"])
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


def _some_tensor(args: tuple, kwargs: dict, *programs: Any) -> Tensor:
    """A tensor to tell where the work is: an argument, or a parameter; else one on the CPU."""
    modules = (m for m in programs if isinstance(m, torch.nn.Module))
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    held = (p for module in modules for p in module.parameters())
    return next(itertools.chain(given, held), torch.empty(()))


def _again(batches: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """The batches without end, each as the arguments of one step."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        if empty:
            raise ValueError("batches: expected at least one each time they are gone through")


def _elbo(
    objective: str | ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    particles: int,
    vectorize: bool,
) -> ELBO:
    """The objective, vectorised over particles where the model allows it."""
    if isinstance(objective, ELBO):
        return objective
    kinds = {"auto": PathELBO, "path": PathELBO, "elbo": Trace_ELBO}
    if objective not in kinds:
        raise ValueError(
            f"objective: expected one of {sorted(kinds)} or an ELBO, got {objective!r}"
        )
    depth = plate_nesting(model, guide, args, kwargs)
    together = (
        vectorize
        and particles > 1
        and can_run_together(model, guide, args, kwargs, particles, depth)
    )
    settings = {
        "num_particles": particles,
        "vectorize_particles": together,
        "max_plate_nesting": depth,
    }
    if objective == "auto":
        try:
            with torch.no_grad(), poutine.block():
                PathELBO(max_plate_nesting=depth).differentiable_loss(model, guide, *args, **kwargs)
        except NotImplementedError:
            objective = "elbo"
        except ERRORS:
            pass  # a stray particle
    return kinds[objective](**settings)


@torch.no_grad()
def _parameters(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: dict
) -> list[Tensor]:
    """The leaf tensors that Pyro's statements read: what must be optimised."""
    with poutine.trace(param_only=True) as capture:
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        poutine.replay(model, trace=drawn)(*args, **kwargs)
    found = [
        site["value"].unconstrained() if hasattr(site["value"], "unconstrained") else site["value"]
        for site in capture.trace.nodes.values()
        if site["type"] == "param"
    ]
    return list(dict.fromkeys(p for p in found if p.requires_grad))


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


def _progress(steps: int, done: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    disable = None if show else True
    return tqdm(total=steps, initial=done, desc="fit_guide", unit="step", disable=disable)
