"""Posteriors for ArviZ, of either generation. The only file that touches it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyroflows._checks import check_whole
from pyroflows._pyro.guides import diverged
from pyroflows._pyro.threads import runs_models
from pyroflows.infer.importance import importance_weights, khat_threshold, psis
from pyroflows.infer.neutra import NeuTra
from pyroflows.programs.predictive import ModelRuns

_PROPOSALS = 10  # per draw, when draws are resampled by weight


@runs_models
def to_arviz(
    model: Callable[..., Any],
    posterior: Any,
    *args: Any,
    num_samples: int = 1000,
    resample: bool = False,
    predictive: bool = True,
    prior: bool = False,
    coords: Mapping[str, Sequence] | None = None,
    **kwargs: Any,
) -> Any:
    """A posterior for ArviZ: draws, likelihood, predictions, data.

    Groups, each only where it has something to hold:

    - ``posterior``: the latent sites and the model's ``pyro.deterministic`` ones.
    - ``sample_stats``: ``lp``, the model's log joint density in nats; of a guide also ``log_q``,
      the guide's, and ``log_weight = lp - log_q``, with the attribute ``pareto_k`` (Pareto-smoothed
      importance sampling, Vehtari et al. 2024, arXiv:1507.02646: up to 0.7 the guide can be
      corrected by its weights); of chains ``diverging``; of ``pf.NeuTra`` with ``chains`` also
      ``energy``, ``acceptance_rate``, ``step_size`` and ``n_steps``.
    - ``log_likelihood`` of each observed site, one a row: not summed, and free of ``scale``.
    - ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``.

    Dimensions are called as their plates. All draws run through the model at once, in a plate
    outside all others; where the model cannot do that they run one by one, with a warning.

    Args:
        model: a Pyro model.
        posterior: a guide (``pf.AutoFlow`` or any other), a ``pf.NeuTra`` or Pyro ``MCMC`` that
            has run, or a dict of draws ``{site: (chains, draws, *site shape)}``.
        *args: the model's (and guide's) arguments, with the observed data.
        num_samples: draws from a guide, and from the prior.
        resample: of a guide, draw ten times as many and resample ``num_samples`` of them, with
            replacement, by their smoothed importance weights.
        predictive: draw observed sites anew from the posterior.
        prior: draw latent and observed sites from the prior too.
        coords: labels of the plates' members, ``{plate: labels}``; 0, 1, ... by default.
        **kwargs: the model's keyword arguments.

    Returns:
        ``arviz.InferenceData`` under ArviZ < 1, ``xarray.DataTree`` from 1 on.

    Raises:
        ValueError: draws that do not fit the model's sites, a plate that subsamples, an argument
            out of range, or a ``posterior`` of another kind.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0])
        >>> guide = pf.AutoFlow(model, layers=1, hidden=(8,)).setup(y)
        >>> data = pf.to_arviz(model, guide, y, num_samples=50)
        >>> data["log_likelihood"]["y"].dims
        ('chain', 'draw', 'rows')
    """
    check_whole(1, num_samples=num_samples)
    with torch.no_grad(), poutine.block():
        draws, stats, attributes = _draws_of(model, posterior, num_samples, resample, args, kwargs)
        runs = ModelRuns(model, draws, args, kwargs)
        shape = draws[runs.latent[0]].shape[:2]
        flat = {name: draws[name].flatten(0, 1) for name in runs.latent}
        run = runs.run(flat, shape.numel())
        groups = {
            "posterior": {**flat, **{name: run.values[name] for name in runs.deterministic}},
            "sample_stats": {"lp": run.log_joint, **stats},
            "log_likelihood": run.log_likelihood,
        }
        if predictive and runs.observed:
            again = runs.run(flat, shape.numel(), anew=True)
            groups["posterior_predictive"] = {k: again.values[k] for k in runs.observed}
        groups = {
            group: {name: value.reshape(*shape, *value.shape[1:]) for name, value in sites.items()}
            for group, sites in groups.items()
        }
        if prior:
            values = runs.run({}, num_samples, anew=True).values
            groups["prior"] = {k: values[k][None] for k in (*runs.latent, *runs.deterministic)}
            groups["prior_predictive"] = {k: values[k][None] for k in runs.observed}
        groups["observed_data"] = {k: runs.sites[k]["value"] for k in runs.observed}
    return _in_arviz(groups, runs.dims(), dict(coords or {}), attributes)


def _draws_of(
    model: Callable[..., Any],
    posterior: Any,
    num_samples: int,
    resample: bool,
    args: tuple,
    kwargs: dict,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Draws ``(chains, draws, *shape)``, statistics ``(chains * draws,)``, attributes."""
    if isinstance(posterior, Mapping):
        return {k: torch.as_tensor(v) for k, v in posterior.items()}, {}, {}
    if isinstance(posterior, NeuTra):
        if posterior.draws is None:
            raise ValueError("posterior: this NeuTra has no draws yet; call its run first")
        return posterior.draws, {k: v.flatten() for k, v in posterior.stats.items()}, {}
    if hasattr(posterior, "get_samples"):
        draws = posterior.get_samples(group_by_chain=True)
        chains, size = next(iter(draws.values())).shape[:2]
        diverging = torch.stack([diverged(posterior, chain, size) for chain in range(chains)])
        return draws, {"diverging": diverging.flatten()}, {}
    if not callable(posterior):
        raise ValueError(
            "posterior: expected a guide, a pf.NeuTra, a Pyro MCMC or a dict of draws, got "
            f"{type(posterior).__name__}"
        )
    size = num_samples * _PROPOSALS if resample else num_samples
    weighted = importance_weights(model, posterior, *args, num_samples=size, **kwargs)
    smoothed, khat = psis(weighted.log_weight)
    chosen = torch.arange(num_samples, device=smoothed.device)
    if resample:
        most = khat_threshold(size)
        if not khat <= most:
            warnings.warn(
                f"the guide's importance weights have k = {khat:.2f} > {most:.2f}: resampling by "
                "them does not correct it. Train it longer, or run pf.NeuTra",
                stacklevel=3,
            )
        chosen = torch.multinomial(smoothed.exp(), num_samples, replacement=True)
    draws = {name: value[chosen][None] for name, value in weighted.draws.items()}
    stats = {"log_q": weighted.log_q[chosen], "log_weight": weighted.log_weight[chosen]}
    return draws, stats, {"pareto_k": float(khat), "resampled": int(resample)}


def _in_arviz(
    groups: dict[str, dict[str, Tensor]],
    dims: dict[str, list[str]],
    coords: dict[str, Sequence],
    attributes: dict[str, Any],
) -> Any:
    """The groups in the container of the ArviZ that is installed."""
    import arviz

    arrays = {
        group: {name: value.cpu().numpy() for name, value in sites.items()}
        for group, sites in groups.items()
        if sites
    }
    if int(arviz.__version__.split(".")[0]) >= 1:
        attrs = {"sample_stats": attributes}
        return arviz.from_dict(arrays, dims=dims, coords=coords, attrs=attrs)
    every: dict[str, Any] = {**arrays, "dims": dims, "coords": coords}
    data = arviz.from_dict(**every)
    data["sample_stats"].attrs.update(attributes)
    return data
