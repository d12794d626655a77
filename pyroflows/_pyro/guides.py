"""What this library uses of Pyro's guides, objectives and samplers that has no public name there.

The guides of ``pyroflows.infer`` inherit from ``Guide`` and ``VectorGuide``, and use the public
names of these alone. tests/_pyro/test_canaries.py fails where Pyro changed a private name, and
names it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Size, Tensor
from torch.distributions.constraints import Constraint

from pyroflows._pyro.threads import runs_models


@dataclass(frozen=True)
class FreeSite:
    """A latent site as a piece of a stacked unconstrained vector.

    Attributes:
        name: the site's.
        free_shape: of its unconstrained value.
        support: what its value may be.
    """

    name: str
    free_shape: Size
    support: Constraint


@dataclass(frozen=True)
class LatentSite(FreeSite):
    """A latent site with its place in the model.

    Attributes:
        batch_shape: of its distribution.
        event_shape: of its distribution.
        plates: that it stands in.
    """

    batch_shape: Size
    event_shape: Size
    plates: tuple[CondIndepStackFrame, ...]


class Guide(AutoGuide):
    """Pyro's autoguide by public names. Subclasses write ``learn`` and ``sample_posterior``.

    Attributes:
        quantile_draws: how many draws ``median`` and ``quantiles`` take.
    """

    quantile_draws = 10_000

    def learn(self, *args: Any, **kwargs: Any) -> None:
        """Learn what is needed of the model, and make the guide's parameters.

        Args:
            *args: the model's arguments.
            **kwargs: its keyword arguments.
        """
        raise NotImplementedError

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        """What Pyro calls before a guide is used for the first time."""
        self.learn(*args, **kwargs)

    @property
    def pyro_name(self) -> str:
        """The guide's name in Pyro's parameter store."""
        return self._pyro_name

    @pyro_name.setter
    def pyro_name(self, name: str) -> None:
        self._pyro_name = name

    @property
    def has_model(self) -> bool:
        """Whether it has a model: a guide that was pickled comes back without."""
        return self._model is not None

    def latent_trace(self, init_loc_fn: Callable[..., Any], args: tuple, kwargs: dict) -> Trace:
        """A run of the model with each latent site at its start; observed sites are not in it.

        Args:
            init_loc_fn: where each site starts, as in Pyro's autoguides.
            args: the model's arguments.
            kwargs: its keyword arguments.
        """
        model = poutine.block(InitMessenger(init_loc_fn)(self.model), self._prototype_hide_fn)
        with poutine.block():
            return poutine.trace(model).get_trace(*args, **kwargs)

    @runs_models
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As Pyro's guides, by one thread at a time."""
        return super().__call__(*args, **kwargs)

    def sample_posterior(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``n`` draws ``(n, *site shape)`` of every latent site.

        Args:
            n: number of draws.
            *args: the model's arguments.
            **kwargs: its keyword arguments.
        """
        raise NotImplementedError

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every latent site, from ``quantile_draws`` draws."""
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every latent site, from ``quantile_draws`` draws.

        Args:
            quantiles: levels in [0, 1].
            *args: the model's arguments, as in ``sample_posterior``.
            **kwargs: its keyword arguments.

        Returns:
            For each site a tensor ``(levels, *site shape)``.
        """
        draws = self.sample_posterior(self.quantile_draws, *args, **kwargs)
        return {
            name: value.quantile(torch.as_tensor(quantiles).to(value), dim=0)
            for name, value in draws.items()
        }

    def __deepcopy__(self, memo: dict) -> Guide:
        # Weights and Pyro's context are copied; the model and what was learned of it are shared.
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__, master=None)
        for name in ("_parameters", "_buffers", "_modules", "_pyro_context"):
            twin.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        return twin

    def __getstate__(self) -> dict:
        # Pyro's version takes the model from the living guide too; here only the copy loses it.
        state = dict(self.__dict__)
        state["_model"] = None
        state["master"] = None
        return state


class VectorGuide(Guide, AutoContinuous):
    """Pyro's guide over one vector of all latent sites, by public names."""

    prototype_trace: Trace | None

    def read_sites(self, *args: Any, **kwargs: Any) -> tuple[LatentSite, ...]:
        """Run the model and learn its latent sites.

        Args:
            *args: the model's arguments.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: it has none.
        """
        try:
            AutoContinuous._setup_prototype(self, *args, **kwargs)
        except RuntimeError as error:
            if vars(self).get("latent_dim") != 0:
                raise
            raise ValueError(
                "model: expected continuous latent sites, found none; a guide has nothing to do"
            ) from error
        return tuple(
            LatentSite(
                name,
                self._unconstrained_shapes[name],
                site["fn"].support,
                site["fn"].batch_shape,
                site["fn"].event_shape,
                tuple(site["cond_indep_stack"]),
            )
            for name, site in self.latent_nodes()
        )

    def assign_sites(self, sites: Sequence[LatentSite], dtype: torch.dtype) -> None:
        """Put the sites in place without a run of the model.

        Args:
            sites: all latent ones.
            dtype: of their values.
        """
        trace = Trace()
        for site in sites:
            # A flat density with the site's support and shapes: a guide needs no more.
            fn = dist.ImproperUniform(site.support, site.batch_shape, site.event_shape)
            trace.add_node(
                site.name,
                type="sample",
                name=site.name,
                fn=fn,
                value=torch.zeros(site.batch_shape + site.event_shape, dtype=dtype),
                is_observed=False,
                cond_indep_stack=site.plates,
                infer={},
            )
        self.prototype_trace = trace
        self._prototype_frames = {frame.name: frame for site in sites for frame in site.plates}
        self._unconstrained_shapes = {site.name: site.free_shape for site in sites}
        self._cond_indep_stacks = {site.name: site.plates for site in sites}
        self.latent_dim = sum(site.free_shape.numel() for site in sites)
        self.make_plates()

    def latent_nodes(self) -> Iterator[tuple[str, Any]]:
        """Names and nodes, as in a trace, of the sites that were read or assigned."""
        assert self.prototype_trace is not None
        return self.prototype_trace.iter_stochastic_nodes()

    def make_plates(self, *args: Any, **kwargs: Any) -> None:
        """Make the plates of the guide's sites.

        Args:
            *args: the model's arguments.
            **kwargs: its keyword arguments.
        """
        self._create_plates(*args, **kwargs)

    def start_point(self) -> Tensor:
        """The stacked unconstrained values ``(latent_dim,)`` of the run that read the sites."""
        return self._init_loc()

    def unpack(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Each site's node and its unconstrained value, with room for plates to the left.

        Args:
            latent: ``(*batch, latent_dim)``.
        """
        return self._unpack_latent(latent)


class ParticleELBO(Trace_ELBO):
    """Pyro's ELBO by public names. Subclasses write ``elbo``."""

    def elbo(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        """The ELBO in nats of one run, of which the gradient is taken.

        Args:
            model_trace: of the model.
            guide_trace: of the guide whose draws the model had.
        """
        raise NotImplementedError

    def _get_traces(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> Iterator[tuple[Trace, Trace]]:
        for model_trace, guide_trace in super()._get_traces(model, guide, args, kwargs):
            if hasattr(guide, "check_model"):
                guide.check_model(model_trace)
            yield model_trace, guide_trace

    def _differentiable_loss_particle(
        self, model_trace: Trace, guide_trace: Trace
    ) -> tuple[Tensor, Tensor]:
        elbo = self.elbo(model_trace, guide_trace)
        return -elbo.detach(), -elbo


def diverged(mcmc: MCMC, chain: int, draws: int) -> Tensor:
    """Which draws of a chain end a trajectory that diverged, ``(draws,)``.

    Pyro's ``diagnostics()`` reports it only beside an effective size, which takes four draws.

    Args:
        mcmc: that has run.
        chain: number of the chain.
        draws: how many it has.
    """
    found = torch.zeros(draws, dtype=torch.bool)
    diagnostics: dict = mcmc._diagnostics[chain] or {}  # Pyro makes the list of None, then fills it
    found[diagnostics.get("divergences", [])] = True
    return found
