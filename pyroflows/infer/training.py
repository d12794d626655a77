"""Train a guide: many particles at once, a step and an end that come by themselves."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyroflows._checks import check_positive, check_share, check_whole
from pyroflows._distributed import draw_apart, make_same, open_fabric
from pyroflows.data.position import Passes
from pyroflows.distributions.flow import Flow
from pyroflows.infer.ascent import Ascent
from pyroflows.infer.objectives import PathELBO
from pyroflows.infer.vectorize import ERRORS, can_run_together, plate_nesting
from pyroflows.training.checkpoints import open_checkpoints
from pyroflows.training.compiled import compiled_transforms, prepare_compiler
from pyroflows.training.history import History
from pyroflows.training.progress import Progress


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
        checkpoint: a folder to keep checkpoints in, as in ``pf.fit``. They hold the buffers (a
            running mean, say) of model and guide as far as these are modules themselves.
        every: windows (of 100 steps) from one checkpoint to the next.
        resume: go on from the last checkpoint there, if there is one.
        progress: show the ELBO and its standard error, as in ``pf.fit``.
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
    if isinstance(guide, Flow) or not callable(guide):
        raise ValueError(
            f"guide: expected a Pyro guide, such as pf.AutoFlow(model), got {type(guide).__name__}"
        )
    check_whole(1, particles=particles, max_steps=max_steps)
    check_positive(lr=lr, clip=clip)
    check_share(average=average)
    if batches is not None and not isinstance(batches, Iterable):
        raise ValueError(f"batches: expected an iterable of tuples, got {batches!r}")
    if not (precision is None or isinstance(precision, str) and precision == "bf16-mixed"):
        raise ValueError(f"precision: expected None or 'bf16-mixed', got {precision!r}")
    fabric = open_fabric(
        _some_tensor(args, kwargs, guide, model),
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision,
        num_nodes=num_nodes,
    )
    modules = [m for m in (model, guide) if isinstance(m, torch.nn.Module)]
    if accelerator is not None or fabric.world_size > 1:
        args, kwargs = fabric.to_device((args, kwargs))
        for module in modules:
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
    buffers = list(dict.fromkeys(b for module in modules for b in module.buffers()))
    tensors = [*parameters, *buffers]
    make_same(fabric, tensors)
    shapes = {str(i): f"{tuple(t.shape)} {t.dtype}" for i, t in enumerate(tensors)}
    keep = open_checkpoints(checkpoint, every, resume, {"fit_guide": "ELBO", **shapes}, fabric)
    stack = contextlib.ExitStack()
    if compile:
        prepare_compiler(next(iter(parameters)).device)
        stack.enter_context(compiled_transforms(modules))
    ascent = Ascent(
        backward, passes, parameters, buffers, guide, lr, clip, average, max_steps, fabric, keep
    )
    if ascent.step:
        steps = _again(passes)
    else:
        steps = itertools.chain([first], steps)
    shown = Progress(
        "fit_guide", "step", max_steps, ascent.step, progress and fabric.is_global_zero
    )
    try:
        with stack:
            ascent.run(steps, shown)
    finally:
        shown.close()
    return ascent.history


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
    if not isinstance(objective, str) or objective not in kinds:
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
