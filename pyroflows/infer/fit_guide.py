"""Train a guide: many particles at once, a step and an end that come by themselves."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyroflows.compiling import compiled_transforms, prepare_compiler
from pyroflows.history import History

_WINDOW = 100
_DROPS = 3


def fit_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    particles: int = 64,
    lr: float = 5e-3,
    max_steps: int = 3000,
    clip: float = 10.0,
    vectorize: bool = True,
    progress: bool = True,
    compile: bool = False,
    **kwargs: Any,
) -> History:
    """Maximise the ELBO over a guide's parameters (and the model's, if it has any), in place.

    Adam with clipped gradients. Every 100 steps the median ELBO is compared with that of the 100
    before; where it gained less than two standard errors, or 0.01 nats, the step shrinks to 0.3 of
    its size, and after the third time training stops. Steps whose loss or gradient is not finite
    are skipped and counted. The trained tensors are those in Pyro's parameter store.

    Args:
        model: a Pyro model.
        guide: any Pyro guide, ``pf.AutoFlow`` first of all.
        *args: the model's and guide's arguments.
        particles: draws per step.
        lr: first step size.
        max_steps: an upper limit.
        clip: largest gradient norm.
        vectorize: compute all particles at once, in a plate outside all others. Before the first
            step two particles are also run one by one; where that fails or gives another
            log-density, all are run so, with a warning.
        progress: show a progress bar with the ELBO and its standard error.
        compile: run the flows of guide and model under ``torch.compile``; Pyro's own part of the
            step stays as it is.
        **kwargs: keyword arguments of model and guide.

    Returns:
        The ELBO in nats over the steps (a median per 100), with ``.plot()``.

    Raises:
        ValueError: an argument out of range, or nothing to train.
        FloatingPointError: a whole window of steps was not finite.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> guide = pf.AutoFlow(model, layers=1, hidden=(8,))
        >>> history = pf.fit_guide(model, guide, max_steps=500, progress=False)
        >>> abs(guide.median()["z"].item() - 3.0) < 0.2
        True
    """
    if particles < 1 or max_steps < 1 or lr <= 0 or clip <= 0:
        raise ValueError(
            "particles, max_steps, lr, clip: expected positive numbers, got "
            f"{particles}, {max_steps}, {lr}, {clip}"
        )
    start = time.perf_counter()
    if hasattr(guide, "setup"):
        guide.setup(*args, **kwargs)
    loss = _loss_function(model, guide, args, kwargs, particles, vectorize)
    _, parameters = _captured(loss)
    if not parameters:
        raise ValueError("guide: neither it nor the model has parameters to train")
    optimiser = torch.optim.Adam(parameters, lr=lr)
    history = History(unit="nats of the ELBO")
    bar = _progress(max_steps, progress)
    window: list[float] = []
    before: tuple[float, float] | None = None
    drops = 0
    history.stopped = f"all {max_steps} steps done"
    stack = contextlib.ExitStack()
    try:
        if compile:
            prepare_compiler(next(iter(parameters)).device)
            flows = [m for m in (model, guide) if isinstance(m, torch.nn.Module)]
            stack.enter_context(compiled_transforms(flows))
        for step in bar:
            value, found = _captured(loss)
            for extra in found - parameters:
                parameters.add(extra)
                optimiser.add_param_group({"params": [extra]})
            optimiser.zero_grad()
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
            elbo = -value.item()
            if math.isfinite(elbo) and math.isfinite(norm.item()):
                optimiser.step()
                window.append(elbo)
            else:
                history.skipped += 1
            if (step + 1) % _WINDOW and step + 1 < max_steps:
                continue
            if not window:
                first = step // _WINDOW * _WINDOW
                raise FloatingPointError(
                    f"no finite ELBO in steps {first} to {step}: the model's "
                    "log-density is NaN or infinite where the guide draws. Try a smaller "
                    "init_scale=, another init_loc_fn=, or float64"
                )
            now = _middle_and_error(window)
            history.record(step + 1, now[0], None, optimiser.param_groups[0]["lr"])
            bar.set_postfix(elbo=f"{now[0]:.2f} +- {now[1]:.2f}", refresh=False)
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
        stack.close()
        bar.close()
        history.best = max(len(history.steps) - 1, 0)
        history.seconds = time.perf_counter() - start
        optimiser.zero_grad()
    return history


def _loss_function(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    particles: int,
    vectorize: bool,
) -> Callable[[], Tensor]:
    """The negative ELBO, vectorised over particles where the model allows it."""
    nesting = _plate_nesting(model, guide, args, kwargs)

    def with_elbo(vectorized: bool) -> Callable[[], Tensor]:
        elbo = Trace_ELBO(
            num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=nesting
        )
        return lambda: elbo.differentiable_loss(model, guide, *args, **kwargs)

    if not vectorize or particles == 1:
        return with_elbo(False)
    together = with_elbo(True)
    try:
        with torch.no_grad(), poutine.block():
            together()
            problem = _vectorized_wrongly(model, guide, args, kwargs, nesting)
    except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if problem is None:
        return together
    alone = with_elbo(False)
    with torch.no_grad(), poutine.block():
        alone()  # an error that has nothing to do with vectorising comes out here
    warnings.warn(
        f"the model cannot run {particles} particles at once ({problem}); they run one by one, "
        "which is slower. Index from the right and sum over event dimensions only, so that batch "
        "dimensions broadcast, or pass vectorize=False",
        stacklevel=3,
    )
    return alone


def _vectorized_wrongly(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    nesting: int,
) -> str | None:
    """Compare the joint log-density of two particles, run at once, with each run by itself."""
    with pyro.plate("num_particles_vectorized", 2, dim=-nesting - 1):
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        both = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    if any(_is_random_subsample(site) for site in both.nodes.values()):
        return None  # each run looks at other rows
    both.compute_log_prob()
    at_once = torch.zeros(2)
    for site in both.nodes.values():
        if site["type"] == "sample":
            log_prob = site["log_prob"]
            apart = log_prob.dim() == nesting + 1 and log_prob.shape[0] == 2
            at_once = at_once + (log_prob.reshape(2, -1).sum(1) if apart else log_prob.sum())
    shapes = {
        name: site["value"].shape
        for name, site in poutine.trace(guide).get_trace(*args, **kwargs).nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }
    for particle in range(2):
        values = {
            name: site["value"].expand(2, *site["value"].shape[1:])[particle].reshape(shapes[name])
            for name, site in drawn.nodes.items()
            if name in shapes and name in both.nodes
        }
        conditioned = poutine.condition(model, data=values)
        alone = poutine.trace(conditioned).get_trace(*args, **kwargs).log_prob_sum()
        if not torch.allclose(at_once[particle].to(alone), alone, rtol=1e-3, atol=1e-3):
            return (
                f"its log-density of one draw is {alone:.4f} alone and {at_once[particle]:.4f} "
                "among others"
            )
    return None


def _is_random_subsample(site: dict) -> bool:
    return site["type"] == "sample" and any(
        frame.full_size is not None and frame.full_size > frame.size
        for frame in site["cond_indep_stack"]
    )


@torch.no_grad()
def _plate_nesting(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: dict
) -> int:
    """How many dimensions to the left the plates reach, found by one run."""
    with poutine.block():
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        ran = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    frames = (
        frame
        for trace in (drawn, ran)
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    )
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def _captured(loss: Callable[[], Tensor]) -> tuple[Tensor, set[Tensor]]:
    """The loss, and the leaf tensors that Pyro's statements read: what must be optimised."""
    with poutine.trace(param_only=True) as capture:
        value = loss()
    found = {
        site["value"].unconstrained() if hasattr(site["value"], "unconstrained") else site["value"]
        for site in capture.trace.nodes.values()
        if site["type"] == "param"
    }
    return value, {p for p in found if p.requires_grad}


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
