"""Train a guide: many particles at once, a step and an end that come by themselves."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyroflows.compiling import compiled_transforms, prepare_compiler
from pyroflows.history import History
from pyroflows.infer.objectives import PathELBO
from pyroflows.infer.particles import (
    ERRORS,
    ChangedModelError,
    can_run_together,
    plate_nesting,
)
from pyroflows.training import Average

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
    progress: bool = True,
    compile: bool = False,
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
        particles: draws per step.
        lr: first step size.
        max_steps: an upper limit.
        clip: largest gradient norm.
        average: decay of the parameters' average; 0 for none.
        vectorize: compute all particles at once, in a plate outside all others. Before the first
            step two particles are also run one by one; where that fails or gives another
            log-density, all are run so, with a warning.
        batches: the arguments of each step instead of ``args``, gone through again and again: an
            iterable of tuples, for example a ``DataLoader``.
        progress: show a progress bar with the ELBO and its standard error.
        compile: run the flows of guide and model under ``torch.compile``; Pyro's own part of the
            step stays as it is.
        **kwargs: keyword arguments of model and guide.

    Returns:
        The ELBO in nats over the steps (a median per 100), with ``.plot()``.

    Raises:
        ValueError: an argument out of range, nothing to train, latent sites that come and go, or a
            posterior without end: one that is improper, whose ELBO grows without bound.
        FloatingPointError: none of the first 100 steps was finite, or most of 100 were not, also
            after three returns; the guide then has the best parameters found.

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
    steps = itertools.repeat(args) if batches is None else _again(batches)
    first = next(steps)
    if hasattr(guide, "setup"):
        guide.setup(*first, **kwargs)
    elbo = _elbo(objective, model, guide, first, kwargs, particles, vectorize)

    def backward(now: tuple[Any, ...]) -> float:
        if not hasattr(elbo, "differentiable_loss"):  # as Pyro's RenyiELBO
            return elbo.loss_and_grads(model, guide, *now, **kwargs)
        loss = elbo.differentiable_loss(model, guide, *now, **kwargs)
        loss.backward()
        return loss.item()

    parameters = _parameters(model, guide, first, kwargs)
    if not parameters:
        raise ValueError("guide: neither it nor the model has parameters to train")
    stack = contextlib.ExitStack()
    if compile:
        prepare_compiler(next(iter(parameters)).device)
        flows = [m for m in (model, guide) if isinstance(m, torch.nn.Module)]
        stack.enter_context(compiled_transforms(flows))
    bar = _progress(max_steps, progress)
    try:
        with stack:
            history = _ascend(
                backward, itertools.chain([first], steps), parameters, bar, guide, lr, clip, average
            )
    finally:
        bar.close()
    history.seconds = time.perf_counter() - begin
    return history


def _ascend(
    backward: Callable[[tuple[Any, ...]], float],
    batches: Iterator[tuple[Any, ...]],
    parameters: list[Tensor],
    bar: Any,
    guide: Callable[..., Any],
    lr: float,
    clip: float,
    average: float,
) -> History:
    """The loop itself."""
    optimiser = torch.optim.Adam(parameters, lr=lr)
    mean = Average(parameters, average)
    best = _Best(parameters)
    history = History(unit="nats of the ELBO")
    history.stopped = f"all {len(bar)} steps done"
    window: list[float] = []
    before: tuple[float, float] | None = None
    drops = 0
    try:
        for step in bar:
            elbo, error = _step(backward, next(batches), parameters, optimiser, clip)
            if elbo is None:
                history.skipped += 1
                failing = history.skipped > _STRAYS and not (window or history.steps)
                if error is not None and failing:
                    raise error
            else:
                mean.update()
                window.append(elbo)
            if (step + 1) % _WINDOW and step + 1 < len(bar):
                continue
            if 2 * len(window) < min(_WINDOW, step + 1) and (history.steps or not window):
                best.restore()
                if not history.steps or history.rollbacks == _ROLLBACKS:
                    raise FloatingPointError(
                        f"{len(window) or 'no'} finite ELBOs in steps {step // _WINDOW * _WINDOW} "
                        f"to {step}: the model's log-density is NaN or infinite where the guide "
                        f"draws, or it raises ({error or 'it does not'}). Try another "
                        "init_loc_fn=, a smaller lr=, or float64"
                    )
                history.rollbacks += 1
                optimiser = torch.optim.Adam(parameters, lr=0.3 * optimiser.param_groups[0]["lr"])
                mean.restart()
                window, before = [], None
                continue
            now = _middle_and_error(window)
            best.take(now[0])
            history.record(step + 1, now[0], None, optimiser.param_groups[0]["lr"])
            bar.set_postfix(elbo=f"{now[0]:.2f} +- {now[1]:.2f}", refresh=False)
            _check_bounded(guide, now[0])
            flat = before is not None and _is_flat(before, now)
            before, window = now, []
            if flat:
                drops += 1
                if drops == _DROPS:
                    history.stopped = f"the ELBO is flat after {step + 1} steps"
                    break
                for group in optimiser.param_groups:
                    group["lr"] *= 0.3
                before = None
    except KeyboardInterrupt:
        history.stopped = "interrupted"
    finally:
        optimiser.zero_grad()
    if history.steps:
        mean.put()
    history.best = max(len(history.steps) - 1, 0)
    return history


class _Best:
    """The parameters at the end of the best window so far."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._elbo = -math.inf
        self._values: list[Tensor] = []

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
) -> tuple[float | None, Exception | None]:
    """One step, and its ELBO; None where it could not be taken, and what the model raised."""
    optimiser.zero_grad()
    try:
        elbo = -backward(batch)
    except ChangedModelError:
        raise
    except ERRORS as error:
        return None, error
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not (math.isfinite(elbo) and math.isfinite(norm.item())):
        return None, None
    optimiser.step()
    return elbo, None


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
def _check_bounded(guide: Callable[..., Any], elbo: float) -> None:
    """Raise where a flow guide has run away from its start: the posterior has no end there."""
    flow = getattr(guide, "flow", None)
    whiten = getattr(guide, "whiten", None)
    if flow is None or whiten is None:
        return
    latent = flow.sample((256,))
    spread = whiten.inverse_and_log_det(latent)[0].std(dim=0)
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


def _progress(steps: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(range(steps), desc="fit_guide", unit="step", disable=None if show else True)
