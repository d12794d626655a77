"""Importance weights of a guide and what their tail says about it (Pareto-smoothed, PSIS).

Vehtari et al. 2024, arXiv:1507.02646; the use for variational inference is Yao et al. 2018,
arXiv:1802.02538.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyroflows._checks import check_whole
from pyroflows._pyro.threads import runs_models
from pyroflows.infer.guides import AutoFlow
from pyroflows.programs.log_density import LogDensity, warn_alone
from pyroflows.programs.sites import split
from pyroflows.programs.subsamples import runs_of_all_rows
from pyroflows.programs.vectorize import (
    can_run_together,
    per_particle,
    plate_nesting,
    run_alone,
    run_together,
    sample_sites,
)
from pyroflows.structured.integrated import integrated_draws, worth
from pyroflows.structured.structure import Structure, structure_of
from pyroflows.transforms import WhitenRows

_CHUNK = 10_000
_LEAST_TAIL = 5
_TIED = -1.0  # k-hat of a tail of equal weights: it ends, as a uniform one does
_ALIKE = 0.01  # a tail's relative spread up to which its weights are even: rounding has no shape


class Moved(NamedTuple):
    """What weights within rows do to a site, on its unconstrained scale.

    Attributes:
        picked: a point of each row by weight, ``(draws, *unconstrained shape)``.
        by_weight: the mean over its points by weight.
        plain: the mean over them as the guide draws them.
    """

    picked: Tensor
    by_weight: Tensor
    plain: Tensor


class WeightedDraws(NamedTuple):
    """Draws of a guide with their densities.

    Attributes:
        draws: every latent site's values, ``(draws, *site shape)``.
        log_p: the joint log-density of model and data in nats, ``(draws,)``.
        log_q: the guide's log-density in nats, ``(draws,)``.
        rows: how many rows were integrated by importance weights of their own, so that both
            densities are those of all other numbers, on the unconstrained scale; 0 for none.
        moved: what these weights do to each site, where there are any.

    Example:
        >>> import torch
        >>> log_p, log_q = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
        >>> found = WeightedDraws({"z": torch.zeros(3)}, log_p, log_q)
        >>> found.log_weight
        tensor([1., 2., 3.])
    """

    draws: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    rows: int = 0
    moved: dict[str, Moved] | None = None

    @property
    def log_weight(self) -> Tensor:
        """``log p - log q`` in nats, not normalised."""
        return self.log_p - self.log_q


@runs_models
@torch.no_grad()
def importance_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 10_000,
    vectorize: bool = True,
    **kwargs: Any,
) -> WeightedDraws:
    """Draws of a guide, and the weights that correct them for the posterior.

    One run of the model for 10,000 draws at once: of an ``AutoFlow`` under ``torch.func.vmap`` (in
    parts of four million numbers, data included), of another guide in a plate outside all others;
    draw by draw for models that cannot (with a warning). Up to five runs before them find out which
    it is.

    Log-densities and log-weights are in nats. Of an angle, ``log_q`` of an ``AutoFlow`` is the
    density of the turn that was drawn over that turn's share of the angle: the weights are exact on
    the line, and so on the circle.

    Args:
        model: a Pyro model.
        guide: any Pyro guide.
        *args: their arguments.
        num_samples: how many draws.
        vectorize: False to run draw by draw.
        **kwargs: their keyword arguments.

    Raises:
        ValueError: ``num_samples`` is no whole number from 1 on.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0.0, 2.0))
        >>> found = pf.importance_weights(model, guide, num_samples=500)
        >>> found.draws["z"].shape, found.log_weight.shape
        (torch.Size([500]), torch.Size([500]))
    """
    check_whole(1, num_samples=num_samples)
    if hasattr(guide, "setup"):
        guide.setup(*args, **kwargs)
    if isinstance(guide, AutoFlow):
        return _weights_of_vectors(model, guide, args, kwargs, num_samples, vectorize)
    with poutine.block():
        depth = plate_nesting(model, guide, args, kwargs)
        alone = _prototype(guide, args, kwargs)
        together = vectorize and can_run_together(model, guide, args, kwargs, 2, depth)
        most = _CHUNK if together else 1
        parts: list[WeightedDraws] = []
        for start in range(0, num_samples, most):
            count = min(most, num_samples - start)
            if together:
                ran, drawn = run_together(model, guide, args, kwargs, count, depth)
                log_p, log_q = (per_particle(t, count, depth) for t in (ran, drawn))
            else:  # outside of any plate, where the model has no dimension of draws
                ran, drawn = run_alone(model, guide, args, kwargs)
                log_p, log_q = (torch.as_tensor(t.log_prob_sum()).reshape(1) for t in (ran, drawn))
            parts.append(WeightedDraws(_values(ran, drawn, alone, count), log_p, log_q))
    return _joined(parts)


def _weights_of_vectors(
    model: Callable[..., Any],
    guide: AutoFlow,
    args: tuple,
    kwargs: dict,
    num_samples: int,
    vectorize: bool,
) -> WeightedDraws:
    """The same of a guide over one vector, by the model's log-density."""
    log_density = guide.log_density(args, kwargs, model, None if vectorize else "alone")
    if guide.structured and vectorize:
        integrated = _weights_of_globals(guide, log_density, num_samples)
        if integrated is not None:
            return integrated
    parts: list[WeightedDraws] = []
    for start in range(0, num_samples, _CHUNK):
        latent, log_q = guide.scored_draws(min(_CHUNK, num_samples - start))
        if log_density.batching is None:
            problem = log_density.settle(latent[0])
            if problem is not None:
                warn_alone(problem, stacklevel=6)
        ran = runs_of_all_rows(log_density, latent)
        log_det = sum(x.reshape(len(latent), -1).sum(1) for x in ran.log_dets.values())
        parts.append(WeightedDraws(ran.values, ran.log_p - log_det, log_q - log_det))
    return _joined(parts)


def structure_as_of(guide: AutoFlow, log_density: LogDensity) -> Structure | None:
    """The structure of a model, if it is the one that a guide was set up for.

    Args:
        guide: a structured one.
        log_density: of the model.
    """
    start = guide.flows[0].sample((1,))[0]
    if log_density.settle(start) is not None:
        return None
    structure = structure_of(log_density, start)
    order = cast(WhitenRows, guide.whiten).order
    return structure if structure is not None and torch.equal(structure.order, order) else None


def _weights_of_globals(
    guide: AutoFlow, log_density: LogDensity, num_samples: int
) -> WeightedDraws | None:
    """The same of a structured guide, its rows integrated; None where the model has others."""
    structure = structure_as_of(guide, log_density)
    if structure is None:
        return None
    count = worth(log_density, num_samples)
    found = integrated_draws(log_density, guide.flows[0], structure, count)
    sites = log_density.sites
    parts = [split(sites, part) for part in (found.picked, found.by_weight, found.plain)]
    return WeightedDraws(
        guide.constrained(found.picked, log_density.args, log_density.kwargs),
        found.log_p,
        found.log_q,
        structure.rows,
        {site.name: Moved(*(part[site.name] for part in parts)) for site in sites},
    )


def _joined(parts: list[WeightedDraws]) -> WeightedDraws:
    return WeightedDraws(
        {name: torch.cat([part.draws[name] for part in parts]) for name in parts[0].draws},
        torch.cat([part.log_p for part in parts]),
        torch.cat([part.log_q for part in parts]),
    )


def _prototype(guide: Callable[..., Any], args: tuple, kwargs: dict) -> dict[str, torch.Size]:
    """The shape of each site in a run of the guide outside of any plate."""
    sites = sample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    return {name: site["value"].shape for name, site in sites.items()}


def _values(
    ran: Trace, drawn: Trace, shapes: dict[str, torch.Size], count: int
) -> dict[str, Tensor]:
    """The model's latent sites, ``(count, *site shape)``."""
    found = {}
    for name, site in sample_sites(drawn).items():
        if name in ran.nodes and name in shapes:
            value, shape = site["value"], shapes[name]
            depth = value.dim() - 1 - len(shape)
            if depth < 0:  # one that does not depend on the particle
                value = value.expand(count, *shape)
            found[name] = value.expand(count, *value.shape[1:]).reshape(count, *shape)
    return found


def psis(log_weight: Tensor) -> tuple[Tensor, float]:
    """Pareto-smoothed importance weights and the shape k-hat of their tail.

    The largest ``min(S / 5, 3 sqrt(S))`` weights are replaced by quantiles of the generalised
    Pareto distribution fitted to them (Vehtari et al. 2024, algorithm 1).

    Args:
        log_weight: ``(S,)``, in nats, not normalised.

    Returns:
        Log-weights whose exponentials sum to one, and k-hat: minus infinity where all weights are
        equal, -1 where those of the tail are within one per cent of each other, infinity where the
        tail cannot be fitted (fewer than five make it, for one), where a weight is NaN or infinite,
        and where all are zero, which leaves equal ones.

    Example:
        >>> import torch
        >>> smoothed, k = psis(torch.zeros(100))
        >>> k, round(smoothed.exp().sum().item(), 6)
        (-inf, 1.0)
    """
    log_weight = log_weight.detach().double()
    count = len(log_weight)
    if torch.isnan(log_weight).any() or (log_weight == math.inf).any():
        return _normalised(log_weight), math.inf
    if log_weight.max() == -math.inf:
        return torch.full_like(log_weight, -math.log(count)), math.inf
    shifted = log_weight - log_weight.max()
    if -shifted.min() < 1e-8:
        return torch.full_like(shifted, -math.log(count)), -math.inf
    tail = math.ceil(min(count / 5, 3 * count**0.5))
    if tail < _LEAST_TAIL:
        return _normalised(shifted), math.inf
    order = shifted.argsort()
    cutoff = max(shifted[order[-tail - 1]].item(), math.log(torch.finfo(torch.float64).tiny))
    index = order[-tail:]
    excess = shifted[index].exp() - math.exp(cutoff)
    if excess[-1] - excess[0] <= _ALIKE * math.exp(cutoff):
        return _normalised(shifted), _TIED
    shape, scale = _fit_pareto(excess)
    if not math.isfinite(shape):
        return _normalised(shifted), math.inf
    levels = (torch.arange(tail, dtype=torch.float64, device=excess.device) + 0.5) / tail
    quantiles = scale * torch.expm1(-shape * torch.log1p(-levels)) / shape
    shifted[index] = (quantiles + math.exp(cutoff)).log().clamp(max=0.0)
    return _normalised(shifted), shape


def _normalised(log_weight: Tensor) -> Tensor:
    """Log-weights whose exponentials sum to one."""
    return log_weight - log_weight.logsumexp(0)


def _fit_pareto(excess: Tensor) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution (Zhang & Stephens 2009).

    ``excess`` is sorted. The shape is drawn towards 1/2 by a prior worth ten observations.
    """
    count = len(excess)
    grid = 30 + int(count**0.5)
    quartile = excess[int(count / 4 + 0.5) - 1]
    points = 1 - (grid / (torch.arange(1, grid + 1).to(excess) - 0.5)).sqrt()
    points = points / (3 * quartile) + 1 / excess[-1]
    shapes = torch.log1p(-points[:, None] * excess).mean(dim=1)
    profile = count * ((-points / shapes).log() - shapes - 1)
    weights = profile.softmax(0)
    point = (points * weights).sum()
    shape = torch.log1p(-point * excess).mean()
    scale = -(shape / point).item()
    return (shape.item() * count + 5) / (count + 10), scale


def khat(log_weight: Tensor) -> float:
    """The tail shape of importance weights: below ``khat_threshold(S)`` they can be trusted.

    Args:
        log_weight: ``(S,)``, in nats, not normalised.

    Example:
        >>> import torch
        >>> khat(torch.zeros(100))
        -inf
    """
    return psis(log_weight)[1]


def khat_threshold(count: int) -> float:
    """Largest k-hat at which ``count`` draws suffice: ``min(1 - 1 / log10(S), 0.7)``.

    Vehtari et al. 2024, arXiv:1507.02646, section 3.2.4.

    Args:
        count: number S of draws.

    Example:
        >>> round(khat_threshold(100), 2), khat_threshold(10_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(count), 0.7) if count > 10 else -math.inf


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """``log mean w``: the importance-weighted estimate of the log evidence, in nats.

    Args:
        log_weight: ``(draws,)``, in nats, not normalised.

    Example:
        >>> import torch
        >>> log_mean_exp(torch.tensor([1.0, 3.0]).log())
        tensor(0.6931)
    """
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def effective_size(log_weight: Tensor) -> float:
    """``(sum w)^2 / sum w^2``: how many equally weighted draws these are worth (Kish 1965).

    Args:
        log_weight: ``(draws,)``, up to a constant.

    Example:
        >>> import torch
        >>> round(effective_size(torch.zeros(10)), 6)
        10.0
    """
    log_weight = log_weight.detach().double()
    return (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp().item()
