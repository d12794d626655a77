"""Posteriors for ArviZ, of either generation. The only file that touches it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Size, Tensor

from pyroflows.infer.diagnostics import importance_weights, psis
from pyroflows.infer.neutra import NeuTra

_PROPOSALS = 10  # per draw kept, when draws are resampled by weight
_ELEMENTS = 2**24  # at most, over all sites, in one run of the model


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
    """What ArviZ wants to know of a posterior: draws, likelihood, predictions, data.

    Groups, each only where it has something to hold:

    - ``posterior``: the latent sites and the model's ``pyro.deterministic`` ones.
    - ``sample_stats``: ``lp``, the model's log joint density in nats; of a guide also ``log_q``,
      its own, and ``log_weight = lp - log_q``, with the attribute ``pareto_k`` (Pareto-smoothed
      importance sampling, Vehtari et al. 2024, arXiv:1507.02646: below 0.7 the guide can be
      corrected by its weights); of NUTS ``diverging``.
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
        resample: of a guide, draw ten times as many and keep ``num_samples`` of them, drawn with
            replacement by their smoothed importance weights.
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
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    with torch.no_grad(), poutine.block():
        draws, stats, attributes = _draws_of(model, posterior, num_samples, resample, args, kwargs)
        runs = _Runs(model, args, kwargs)
        draws = runs.checked(draws)
        shape = next(iter(draws.values())).shape[:2]
        flat = {name: value.flatten(0, 1) for name, value in draws.items()}
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
        return posterior.draws, {"diverging": posterior.diverging.flatten()}, {}
    if hasattr(posterior, "get_samples"):
        draws = posterior.get_samples(group_by_chain=True)
        chains, size = next(iter(draws.values())).shape[:2]
        diverging = torch.zeros(chains, size, dtype=torch.bool)
        for chain, steps in enumerate(posterior.diagnostics().get("divergences", {}).values()):
            diverging[chain, steps] = True
        return draws, {"diverging": diverging.flatten()}, {}
    if not callable(posterior):
        raise ValueError(
            "posterior: expected a guide, a pf.NeuTra, a Pyro MCMC or a dict of draws, got "
            f"{type(posterior).__name__}"
        )
    size = num_samples * _PROPOSALS if resample else num_samples
    weighted = importance_weights(model, posterior, *args, num_samples=size, **kwargs)
    smoothed, khat = psis(weighted.log_weight)
    kept = torch.arange(num_samples, device=smoothed.device)
    if resample:
        if khat > 0.7:
            warnings.warn(
                f"the guide's importance weights have k = {khat:.2f} > 0.7: resampling by them "
                "does not correct it. Train it longer, or run pf.NeuTra",
                stacklevel=3,
            )
        kept = torch.multinomial(smoothed.exp(), num_samples, replacement=True)
    draws = {name: value[kept][None] for name, value in weighted.draws.items()}
    stats = {"log_q": weighted.log_q[kept], "log_weight": weighted.log_weight[kept]}
    return draws, stats, {"pareto_k": float(khat), "resampled": int(resample)}


class _Run(NamedTuple):
    """What one or many runs of the model gave, draws first."""

    values: dict[str, Tensor]  # (S, *site shape): what the run itself computed or drew
    log_likelihood: dict[str, Tensor]  # (S, *batch), observed sites
    log_joint: Tensor  # (S,)


class _Runs:
    """A model with its arguments, run under many draws of its latent sites.

    The first run, of the prior, shows the sites and their shapes without draws.
    """

    def __init__(self, model: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.vectorized: bool | None = None
        self.latent: list[str] = []
        self.observed: list[str] = []
        self.deterministic: list[str] = []
        self.sites = self._trace(model)
        self.nesting = 0
        for name, site in self.sites.items():
            frames = site["cond_indep_stack"]
            for frame in frames:
                if frame.full_size and frame.size < frame.full_size:
                    raise ValueError(
                        f"model: plate {frame.name!r} takes {frame.size} of {frame.full_size} "
                        "rows; ArviZ needs all. Pass all rows and no subsample_size"
                    )
            reach = [-frame.dim for frame in frames if frame.vectorized]
            self.nesting = max(self.nesting, len(site["fn"].batch_shape), *reach)
            if site["infer"].get("_deterministic"):
                self.deterministic.append(name)
            elif not site["is_observed"]:
                self.latent.append(name)
            elif not site_is_factor(site):
                self.observed.append(name)

    def _trace(self, model: Callable[..., Any]) -> dict[str, dict]:
        trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        trace.compute_log_prob()
        return {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)
        }

    def checked(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """The draws of the model's latent sites, all there and of the right shape."""
        missing = [name for name in self.latent if name not in draws]
        if missing or not self.latent:
            raise ValueError(
                f"posterior: expected draws of the model's latent sites {self.latent}, got those "
                f"of {sorted(draws)}"
            )
        sample = draws[self.latent[0]].shape[:2]
        for name in self.latent:
            wanted = (*sample, *self.sites[name]["value"].shape)
            if len(sample) < 2 or draws[name].shape != wanted:
                raise ValueError(
                    f"posterior: expected draws of {name!r} of shape (chains, draws, *site shape) "
                    f"= {wanted}, got {tuple(draws[name].shape)}"
                )
        return {name: draws[name] for name in self.latent}

    def run(self, draws: dict[str, Tensor], size: int, anew: bool = False) -> _Run:
        """Run the model at given draws ``(size, *site shape)``, or drawing its sites itself.

        Args:
            draws: of the latent sites, or none to draw them from the prior.
            size: how many runs.
            anew: draw the observed sites too.
        """
        if self.vectorized is None:
            self.vectorized = self._can_vectorize(draws)
        each = sum(2 * site["value"].numel() for site in self.sites.values())
        step = max(_ELEMENTS // each, 1) if self.vectorized else 1
        parts = [
            self._run_part({k: v[at : at + step] for k, v in draws.items()}, rows, anew)
            for at, rows in ((at, min(step, size - at)) for at in range(0, size, step))
        ]
        return _Run(
            *({k: torch.cat([p[i][k] for p in parts]) for k in parts[0][i]} for i in (0, 1)),
            torch.cat([part.log_joint for part in parts]),
        )

    def _run_part(self, draws: dict[str, Tensor], size: int, anew: bool) -> _Run:
        model = poutine.uncondition(self.model) if anew else self.model
        if not self.vectorized:
            values = {name: value[0] for name, value in draws.items()}
            sites = self._trace(poutine.condition(model, data=values))
        else:
            values = {}
            for name, value in draws.items():
                gap = self.nesting - len(self.sites[name]["fn"].batch_shape)
                values[name] = value.reshape(size, *[1] * gap, *value.shape[1:])
            with pyro.plate("_draws", size, dim=-1 - self.nesting):
                sites = self._trace(poutine.condition(model, data=values))
        return self._collect(sites, size, anew)

    def _collect(self, sites: dict[str, dict], size: int, anew: bool) -> _Run:
        values = {
            name: _rows(name, sites[name]["value"], size, self.sites[name]["value"].shape)
            for name in (self.sites if anew else self.deterministic)
        }
        likelihood, joint = {}, 0.0
        for name, site in sites.items():
            shape = self.sites[name]["log_prob"].shape
            joint = joint + _rows(name, site["log_prob"], size, shape).reshape(size, -1).sum(1)
            if name in self.observed:
                log_prob = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
                likelihood[name] = _rows(name, log_prob, size, shape)
        return _Run(values, likelihood, joint)

    def _can_vectorize(self, draws: dict[str, Tensor]) -> bool:
        """Try two draws at once and each alone; warn where that differs."""
        both = {name: value[[0, -1]] for name, value in draws.items()}
        self.vectorized = False
        alone = self.run(both, 2).log_joint
        self.vectorized = True
        try:
            together = self._run_part(both, 2, False).log_joint
        except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            if torch.allclose(together, alone, rtol=1e-3, atol=1e-3, equal_nan=True):
                return True
            problem = "its log-density of a draw is another alone than among others"
        warnings.warn(
            f"the model cannot run many draws at once ({problem}); they run one by one, which is "
            "slower. Index from the right and sum over event dimensions only",
            stacklevel=4,
        )
        return False

    def dims(self) -> dict[str, list[str]]:
        """Names of every site's dimensions: its plates', else ArviZ's default."""
        named = {}
        for name, site in self.sites.items():
            names = [f"{name}_dim_{i}" for i in range(site["value"].dim())]
            batch = len(site["fn"].batch_shape)
            for frame in site["cond_indep_stack"]:
                if frame.vectorized and -frame.dim <= batch:
                    names[batch + frame.dim] = frame.name
            named[name] = names
        return named


def _rows(name: str, value: Tensor, size: int, shape: Size) -> Tensor:
    """``(size, *shape)`` from a value with singleton plate dimensions, or without draws."""
    if value.shape == shape:  # the same for every draw
        return value.expand(size, *shape)
    if value.shape[:1] != (size,) or value.numel() != size * shape.numel():
        raise ValueError(
            f"site {name!r} has shape {tuple(value.shape)} in {size} runs, {tuple(shape)} in one"
        )
    return value.reshape(size, *shape)


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
    data = arviz.from_dict(**arrays, dims=dims, coords=coords)
    data["sample_stats"].attrs.update(attributes)
    return data
