"""Train a guide: many particles at once, a step and an end that come by themselves."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor
from torch.utils.data import DataLoader

from pyroflows._checks import check_positive, check_share, check_whole
from pyroflows._distributed import draw_apart, gathered, make_same, open_fabric
from pyroflows._pyro.threads import runs_models_long
from pyroflows.data.fingerprint import facts_of, facts_of_loader
from pyroflows.data.position import Passes, Repeated
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.mixture import MixtureFlow
from pyroflows.infer.elbo_task import ElboTask
from pyroflows.infer.guides import AutoFlow
from pyroflows.infer.modes import weigh
from pyroflows.infer.objectives import DensityELBO, PathELBO, has_paths
from pyroflows.infer.plateau import Plateau, endless, first_steps
from pyroflows.programs.log_density import warn_alone
from pyroflows.programs.vectorize import can_run_together, plate_nesting, run_alone, sample_sites
from pyroflows.training.checkpoints import Checkpoint, open_checkpoints
from pyroflows.training.compiled import compiled_transforms, prepare_compiler
from pyroflows.training.history import History
from pyroflows.training.identity import facts_of_module
from pyroflows.training.loop import Pace, Run
from pyroflows.training.recipe import check_moved

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_ALONE = 8  # particles at most, where the model runs at one at a time
_FEWEST, _MANY = 4, 2**12  # draws a step of a model with many rows, and numbers of all together
GUIDE_RECIPE = {"clip": 10.0, "average": 0.99}


@runs_models_long
def fit_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    objective: str | ELBO = "auto",
    particles: int = 128,
    lr: float = 1e-2,
    max_steps: int = 4000,
    vectorize: bool = True,
    batches: Iterable[tuple[Any, ...]] | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
    compile: bool = False,
    fabric: Fabric | dict[str, Any] | None = None,
    **kwargs: Any,
) -> History:
    """Maximise the ELBO over a guide's parameters (and the model's, if it has any), in place.

    Adam with clipped gradients. Every 100 steps the median ELBO is compared with that of the 100
    before; where it gained less than two standard errors, or 0.01 nats, the step shrinks to 0.3 of
    its size, and after the third time training stops (where steps see a part of the rows: after
    three such windows in a row, and the fifth time). It stops at once where the importance weights
    of 4,000 draws say that an ``AutoFlow`` is within 0.01 nats of the evidence, the most that an
    ELBO can reach. Where it fell far below what it was, training goes back there, with 0.3 of the
    step. What is returned was measured: the start, and after each window the exponential average of
    the parameters, are scored by the same fresh particles (of mini-batches, and the first eight of
    them; of an iterator, the first), and the last is kept that is as good as the best, within two
    standard errors or 0.01 nats (of mini-batches, unless it fell by more than these can for the
    good of all). Steps whose loss
    or gradient is not finite, or for which the model raises (a covariance that is not positive
    definite at a stray particle), are skipped and counted; where most of 100 are, training goes
    back likewise. It does so eight times at most. The trained tensors are those in Pyro's
    parameter store.

    Where an ``AutoFlow`` has a flow for each of several modes, the ELBO is that of
    ``pf.infer.DensityELBO``, and at the end 1000 draws of each flow, weighted, give the flows their
    shares (where steps see a part of the rows, the running means of their ELBOs do).

    Before the first step the guide is set up, if it was not, and the model runs 4 times (6 with a
    guide that is no ``AutoFlow``), to find out what is trained and how; then once a step, and once
    more at the start and for each window to measure it, or as often for each particle where these
    run one by one.

    Args:
        model: a Pyro model.
        guide: any Pyro guide, ``pf.AutoFlow`` first of all.
        *args: the model's and guide's arguments.
        objective: ``"path"`` (``pf.infer.PathELBO``; of an ``AutoFlow`` the same gradient by
            ``pf.infer.DensityELBO``), ``"elbo"`` (``Trace_ELBO``), any Pyro ELBO of
            your own making (which then decides about particles), or ``"auto"``: the path gradient
            where the guide allows it.
        particles: draws per step, over all devices; fewer, from four on, of a guide whose rows are
            independent given the globals, since the rows average.
        lr: first step size.
        max_steps: an upper limit.
        vectorize: compute all particles at once: those of an ``AutoFlow`` under
            ``torch.func.vmap``, of another guide in a plate outside all others. Before the first
            step two particles are also run one by one; where that fails or gives another
            log-density, all are run so, with a warning, and of an ``AutoFlow`` eight at most.
        batches: the arguments of each step instead of ``args``, gone through again and again: an
            iterable of tuples, for example a ``DataLoader``. Each process goes through them by
            itself, with random numbers of its own.
        checkpoint: a folder to keep checkpoints in, one after each window of 100 steps, or a
            ``pf.Checkpoint``, which also goes on from the last. They hold the buffers (a running
            mean, say) of model and guide as far as these are modules themselves.
        progress: show the ELBO and its standard error, as in ``pf.fit``.
        compile: run the flows of guide and model under ``torch.compile``; Pyro's own part of the
            step stays as it is.
        fabric: a ``lightning_fabric.Fabric``, or its arguments by name; by default one process
            where the arguments or the guide are. With several processes each draws its share of the
            particles; gradients are averaged over all, and steps that fail in one are skipped in
            all. Of precisions ``"bf16-mixed"`` may be asked for.
        **kwargs: keyword arguments of model and guide; but for ``clip``, the largest gradient norm
            (10), and ``average``, the decay of the parameters' average (0.99; 0 for none).

    Returns:
        The ELBO in nats over the steps (``train``: a median per 100; ``val``: what was measured),
        with ``.plot()``. Where over one in twenty steps was left out, or windows were taken back, a
        warning says so.

    Raises:
        ValueError: an argument out of range, nothing to train, latent sites that come and go, a
            checkpoint of another training, or a posterior without end: one that is improper, whose
            ELBO grows without bound.
        FloatingPointError: none of the first 100 steps was finite, or most of 100 were not, also
            after eight returns; the guide then has the best parameters found.
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
    check_moved(kwargs)
    recipe = {name: kwargs.pop(name, value) for name, value in GUIDE_RECIPE.items()}
    _check_arguments(guide, batches, particles=particles, max_steps=max_steps, lr=lr, **recipe)
    at = open_fabric(fabric, _some_tensor(args, kwargs, guide, model), ("bf16-mixed",))
    modules = [m for m in (model, guide) if isinstance(m, torch.nn.Module)]
    if fabric is not None or at.world_size > 1:
        args, kwargs = at.to_device((args, kwargs))
        for module in modules:
            module.to(at.device)
    draw_apart(at)
    passes = Passes(Repeated(args) if batches is None else batches, at.device)
    steps = endless(passes)
    first = next(steps)
    _set_up(guide, first, kwargs, at)
    elbo = _elbo(objective, model, guide, first, kwargs, -(-particles // at.world_size), vectorize)
    parameters = _parameters(model, guide, first, kwargs)
    if not parameters:
        raise ValueError("guide: neither it nor the model has parameters to train")
    buffers = list(dict.fromkeys(b for module in modules for b in module.buffers()))
    tensors = [*parameters, *buffers]
    make_same(at, tensors)
    facts = {"lr": lr, "particles": particles, "vectorize": vectorize, **recipe}
    identity = partial(_facts, guide, objective, tensors, args, kwargs, batches, facts)
    firsts = [first] if passes.once else first_steps(passes)
    task = ElboTask(elbo, model, guide, kwargs, parameters, buffers, recipe["clip"], at, firsts)
    slack = None if batches is None else _slack(model, guide, first, kwargs, len(firsts))
    noisy = batches is not None or getattr(elbo, "rows", "all") != "all"
    schedule = Plateau(task, itertools.chain([first], steps), max_steps, slack, noisy)
    pace = Pace(lr, recipe["average"], progress and at.is_global_zero, "fit_guide")
    history = History(unit="nats of the ELBO", counted="step")
    with (
        open_checkpoints(checkpoint, identity, at, tensors) as kept,
        _compiled(modules, parameters[0].device, compile),
    ):
        history = Run(task, schedule, passes, pace, at, kept, history).train()
    if isinstance(guide, AutoFlow) and isinstance(guide.flow, MixtureFlow):
        if not noisy:  # of a part of the rows the running means are better than one of them
            weigh(guide.flow, guide.log_density(args, kwargs, model))
        make_same(at, [guide.flow.log_weights])
    return history


def _set_up(guide: Callable[..., Any], args: tuple, kwargs: dict, at: Fabric) -> None:
    """Set a guide up, and see that all processes have the same one."""
    if hasattr(guide, "setup"):
        guide.setup(*args, **kwargs)
    modes = gathered(at, getattr(guide, "modes", 1))
    if len(set(modes)) > 1:
        raise ValueError(
            f"guide: its processes found {modes} modes in their first batches; call guide.setup "
            "with the same arguments in each before"
        )


def _facts(
    guide: Any,
    objective: str | ELBO,
    tensors: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batches: Any,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """What a guide's training is of; the model is known by its arguments alone."""
    loader = isinstance(batches, DataLoader)
    return {
        "trainer": "fit_guide",
        "guide": facts_of_module(guide) if isinstance(guide, torch.nn.Module) else None,
        "tensors": {str(i): f"{tuple(t.shape)} {t.dtype}" for i, t in enumerate(tensors)},
        "objective": objective if isinstance(objective, str) else type(objective).__name__,
        "args": facts_of(args),
        "kwargs": facts_of(kwargs),
        "batches": facts_of_loader(batches) if loader else facts_of(batches),
        "batch_size": batches.batch_size if loader else None,
        **facts,
    }


def _check_arguments(
    guide: Any, batches: Any, *, particles: int, max_steps: int, lr: float, **recipe: float
) -> None:
    """Raise a ``ValueError`` where one is out of range or of another kind."""
    if isinstance(guide, Flow) or not callable(guide):
        raise ValueError(
            f"guide: expected a Pyro guide, such as pf.AutoFlow(model), got {type(guide).__name__}"
        )
    check_whole(1, particles=particles, max_steps=max_steps)
    check_positive(lr=lr, clip=recipe["clip"])
    check_share(average=recipe["average"])
    if batches is not None and not isinstance(batches, Iterable):
        raise ValueError(f"batches: expected an iterable of tuples, got {batches!r}")


@contextlib.contextmanager
def _compiled(modules: list[torch.nn.Module], device: torch.device, wanted: bool) -> Iterator[None]:
    """The flows among the modules compiled, if that is wanted."""
    if not wanted:
        yield
        return
    prepare_compiler(device)
    with compiled_transforms(modules):
        yield


@torch.no_grad()
def _slack(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: dict, batches: int
) -> float:
    """By how many nats the ELBO of some batches may fall where that of all rows rises.

    Of n rows together, scaled to N, they have their own optimum; to be at that of all rows costs
    them N / n times half a chi square with as many degrees of freedom as there are latent numbers.
    """
    with poutine.block():
        ran, drawn = run_alone(model, guide, args, kwargs)
    sites = [s for s in sample_sites(drawn).values() if not s["infer"].get("is_auxiliary")]
    count = sum(site["value"].numel() for site in sites)
    scales = (torch.as_tensor(site["scale"]).max() for site in sample_sites(ran).values())
    ratio = max(1.0, max(map(float, scales), default=1.0) / batches)
    return ratio * (count / 2 + 3 * (count / 2) ** 0.5)


def _some_tensor(args: tuple, kwargs: dict, *programs: Any) -> Tensor:
    """A tensor to tell where the work is: an argument, or a parameter; else one on the CPU."""
    modules = (m for m in programs if isinstance(m, torch.nn.Module))
    arguments = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    parameters = (p for module in modules for p in module.parameters())
    return next(itertools.chain(arguments, parameters), torch.empty(()))


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
    if isinstance(guide, AutoFlow):
        return _density_elbo(objective, model, guide, args, kwargs, particles, vectorize)
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
    if objective == "auto" and not has_paths(guide, args, kwargs):
        objective = "elbo"
    return kinds[objective](**settings)


def _density_elbo(
    objective: str,
    model: Callable[..., Any],
    guide: AutoFlow,
    args: tuple,
    kwargs: dict,
    particles: int,
    vectorize: bool,
) -> DensityELBO:
    """The objective of a flow guide, with few particles where the model takes one at a time."""
    log_density = guide.log_density(args, kwargs, model, None if vectorize else "alone")
    if vectorize and particles > 1:
        problem = log_density.settle(guide.scored_draws(1)[0][0])
        if problem is not None:
            particles = min(particles, _ALONE)
            warn_alone(problem, f", so there are {particles} of them a step")
    if guide.structured:  # so many rows average out what few draws leave
        few = min(log_density.at_once // _FEWEST, _MANY // guide.latent_dim)
        particles = min(particles, max(_FEWEST, few))
    elbo = DensityELBO(particles, log_density.batching, path=objective != "elbo")
    elbo.numbers = log_density.numbers
    elbo.look_at_rows(log_density, guide.scored_draws(1)[0][0])
    return elbo


@torch.no_grad()
def _parameters(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: dict
) -> list[Tensor]:
    """The leaf tensors that Pyro's statements read: what must be optimised."""
    with poutine.trace(param_only=True) as of_guide:
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    with poutine.trace(param_only=True) as of_model:
        poutine.replay(model, trace=drawn)(*args, **kwargs)
    if hasattr(guide, "note_parameters"):
        guide.note_parameters(of_model.trace)
    sites = [*of_guide.trace.nodes.values(), *of_model.trace.nodes.values()]
    values: list[Any] = [s["value"] for s in sites if s["type"] == "param"]
    found = [v.unconstrained() if hasattr(v, "unconstrained") else v for v in values]
    return list(dict.fromkeys(p for p in found if p.requires_grad))
