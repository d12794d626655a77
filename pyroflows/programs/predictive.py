"""A model run under many draws of its latent sites: its densities, its predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor
from torch import Size, Tensor

from pyroflows.programs.vectorize import (
    first_problem,
    is_subsampled,
    mixed_up,
    scored_sites,
    warn_of,
)

_ELEMENTS = 2**24  # at most, over all sites, in one run of the model


class Run(NamedTuple):
    """What one or many runs of the model gave, draws first."""

    values: dict[str, Tensor]  # (S, *site shape): what the run itself computed or drew
    log_likelihood: dict[str, Tensor]  # (S, *batch), observed sites
    log_joint: Tensor  # (S,)


class _Anew(Messenger):
    """Makes the model draw its observed sites anew."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg.update(is_observed=False, value=None, done=False)


class ModelRuns:
    """A model with its arguments, run under many draws of its latent sites.

    A run at the first draw shows the sites and their shapes.
    """

    def __init__(
        self, model: Callable[..., Any], draws: dict[str, Tensor], args: tuple, kwargs: dict
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.vectorized: bool | None = None
        shapes = {tuple(value.shape[:2]) for value in draws.values()}
        if len(shapes) > 1 or any(len(shape) < 2 for shape in shapes):
            raise ValueError(
                "posterior: expected draws of shape (chains, draws, *site shape), with as many "
                f"chains and draws at every site, got leading shapes {sorted(shapes)}"
            )
        first = {name: value[0, 0] for name, value in draws.items()}
        self.sites = self._trace(poutine.condition(model, data=first))
        self.latent = [name for name in self.sites if name in draws]
        missing = [k for k, v in self.sites.items() if not v["is_observed"] and k not in draws]
        if missing or not self.latent:
            raise ValueError(
                f"posterior: expected draws of every latent site, got those of {sorted(draws)}; "
                f"missing are {missing or 'all'}"
            )
        self.observed: list[str] = []
        self.deterministic: list[str] = []
        self.nesting = 0
        for name, site in self.sites.items():
            frames = site["cond_indep_stack"]
            for frame in frames:
                if is_subsampled(frame):
                    raise ValueError(
                        f"model: plate {frame.name!r} takes {frame.size} of {frame.full_size} "
                        "rows; ArviZ needs all. Pass all rows and no subsample_size"
                    )
            reach = [-frame.dim for frame in frames if frame.vectorized]
            self.nesting = max(self.nesting, len(site["fn"].batch_shape), *reach)
            if name in draws:
                if site["value"].shape != site["fn"].shape():
                    raise ValueError(
                        f"posterior: expected draws of {name!r} of shape (chains, draws, "
                        f"*{tuple(site['fn'].shape())}), got {tuple(draws[name].shape)}"
                    )
            elif site["infer"].get("_deterministic"):
                self.deterministic.append(name)
            elif not site_is_factor(site):
                self.observed.append(name)

    def _trace(self, model: Callable[..., Any]) -> dict[str, Any]:
        return scored_sites(poutine.trace(model).get_trace(*self.args, **self.kwargs))

    def run(self, draws: dict[str, Tensor], size: int, anew: bool = False) -> Run:
        """Run the model at draws ``(size, *site shape)`` of its latent sites, or draw these too.

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
        return Run(
            _joined([part.values for part in parts]),
            _joined([part.log_likelihood for part in parts]),
            torch.cat([part.log_joint for part in parts]),
        )

    def _run_part(self, draws: dict[str, Tensor], size: int, anew: bool) -> Run:
        return self._collect(self._traced(draws, size, anew), size, anew)

    def _traced(self, draws: dict[str, Tensor], size: int, anew: bool) -> dict[str, Any]:
        """The sites of one run: with all draws, or outside of any plate with the one there is."""
        model = _Anew(self.observed)(self.model) if anew else self.model
        if not self.vectorized:
            values = {name: value[0] for name, value in draws.items()}
            return self._trace(poutine.condition(model, data=values))
        values = {}
        for name, value in draws.items():
            gap = self.nesting - len(self.sites[name]["fn"].batch_shape)
            values[name] = value.reshape(size, *[1] * gap, *value.shape[1:])
        with pyro.plate("_draws", size, dim=-1 - self.nesting):
            return self._trace(poutine.condition(model, data=values))

    def _collect(self, sites: dict[str, Any], size: int, anew: bool) -> Run:
        values = {
            name: _rows(name, sites[name]["value"], size, self.sites[name]["value"].shape)
            for name in (self.sites if anew else self.deterministic)
        }
        likelihood, joint = {}, torch.zeros(())
        for name, site in sites.items():
            if name in self.deterministic:
                continue
            shape = self.sites[name]["log_prob"].shape
            joint = joint + _rows(name, site["log_prob"], size, shape).reshape(size, -1).sum(1)
            if name in self.observed:
                log_prob = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
                likelihood[name] = _rows(name, log_prob, size, shape)
        return Run(values, likelihood, joint)

    def _can_vectorize(self, draws: dict[str, Tensor]) -> bool:
        """Try two draws at once and each alone; warn where that differs."""
        both = {name: value[[0, -1]] for name, value in draws.items()}
        self.vectorized = False
        alone = [self._traced({k: v[i:] for k, v in both.items()}, 1, False) for i in range(2)]
        self.vectorized = True

        def check() -> str | None:
            together = self._traced(both, 2, False)
            return mixed_up(together, alone, self.nesting) or self._changed(together, alone)

        problem = first_problem(check)
        if problem is not None:
            warn_of(problem, "many draws")
        return problem is None

    def _changed(self, together: dict[str, Any], alone: list[dict[str, Any]]) -> str | None:
        """Which values of two draws are others in one run than in runs by themselves."""
        both = self._collect(together, 2, False)
        runs = [self._collect(sites, 1, False) for sites in alone]
        for kind in ("log_likelihood", "values"):
            for name, value in getattr(both, kind).items():
                apart = torch.cat([getattr(run, kind)[name] for run in runs])
                if not torch.allclose(value, apart, rtol=1e-3, atol=1e-3, equal_nan=True):
                    return f"{name} of a draw differs between a run of one draw and a run of many"
        return None

    def dims(self) -> dict[str, list[str]]:
        """Names of every site's dimensions: its plates', else ArviZ's default."""
        named = {}
        for name in (*self.latent, *self.deterministic, *self.observed):
            site = self.sites[name]
            names = [f"{name}_dim_{i}" for i in range(site["value"].dim())]
            batch = len(site["fn"].batch_shape)
            for frame in site["cond_indep_stack"]:
                if frame.vectorized and -frame.dim <= batch:
                    names[batch + frame.dim] = frame.name
            named[name] = names
        return named


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of several runs under each name, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _rows(name: str, value: Tensor, size: int, shape: Size) -> Tensor:
    """``(size, *shape)`` from a value with singleton plate dimensions, or without draws."""
    if value.shape == shape:  # the same for every draw
        return value.expand(size, *shape)
    if value.shape[:1] != (size,) or value.numel() != size * shape.numel():
        raise ValueError(
            f"site {name!r} has shape {tuple(value.shape)} in {size} runs, {tuple(shape)} in one"
        )
    return value.reshape(size, *shape)
