"""What this library uses of Pyro's guides, objectives and samplers that has no public name there.

The guides of ``pyroflows.infer`` inherit from ``Guide`` and ``VectorGuide``, and use the public
names of these alone. tests/_pyro/test_canaries.py fails where Pyro changed a private name, and
names it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Size, Tensor
from torch.distributions.constraints import Constraint

from pyroflows._pyro.names import Named
from pyroflows._pyro.starts import Started
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


class Guide(Named, AutoGuide):
    """Pyro's autoguide by public names. Subclasses write ``learn`` and ``sample_posterior``.

    Attributes:
        quantile_draws: how many draws ``median`` and ``quantiles`` take.
        model_parameters: names of the ``pyro.param`` statements that runs of the model have met.
    """

    quantile_draws = 10_000
    model_parameters: tuple[str, ...] = ()

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
    def has_model(self) -> bool:
        """Whether it has a model: a guide that was pickled comes back without."""
        return self._model is not None

    def latent_trace(
        self,
        init_loc_fn: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        hide: Sequence[str] = (),
    ) -> Trace:
        """A run of the model with each latent site at its start; observed sites are not in it.

        Args:
            init_loc_fn: where each continuous site starts, as in Pyro's autoguides.
            args: the model's arguments.
            kwargs: its keyword arguments.
            hide: names of latent sites that are left alone.
        """
        read = poutine.trace(poutine.block(self.model, hide=list(hide)), param_only=True)
        model = poutine.block(Started(init_loc_fn)(read), self._prototype_hide_fn)
        with poutine.block():
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        self.note_parameters(read.trace)
        return trace

    def note_parameters(self, trace: Trace) -> None:
        """Note which parameters a run of the model has met, so that they are saved with the guide.

        Args:
            trace: of the model.
        """
        met = [name for name, site in trace.nodes.items() if site["type"] == "param"]
        self.model_parameters = tuple(dict.fromkeys((*self.model_parameters, *met)))

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
            for name, value in self.in_order(draws).items()
        }

    def in_order(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """Draws as numbers of which some are larger than others, as quantiles take.

        Args:
            draws: of every latent site.
        """
        return draws

    def __deepcopy__(self, memo: dict) -> Guide:
        # Weights and Pyro's context are copied; the model and what was learned of it are shared.
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__, master=None)
        for name in ("_parameters", "_buffers", "_modules", "_pyro_context"):
            twin.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        twin.name_copy()
        return twin

    def __getstate__(self) -> dict:
        # Pyro's version takes the model from the living guide too; here only the copy loses it.
        state = dict(self.__dict__)
        state["_model"] = None
        state["master"] = None
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.name_copy()


class VectorGuide(Guide, AutoContinuous):
    """Pyro's guide over one vector of all latent sites, by public names. Subclasses write ``emit``.

    Unlike Pyro's, its model stays as it is: where sites start is asked for once.
    """

    prototype_trace: Trace | None

    def __init__(self, model: Callable[..., Any], *, name: str | None = None) -> None:
        super().__init__(model, name=name)
        self._model = (model,)  # Pyro's would draw its starts anew in every run

    def assign_trace(
        self, trace: Trace, free_shapes: dict[str, Size], supports: dict[str, Constraint]
    ) -> tuple[LatentSite, ...]:
        """Put the sites of a run in place.

        Args:
            trace: with the latent sites alone.
            free_shapes: of their unconstrained values, by name.
            supports: of their values, by name.
        """
        nodes: Iterator[tuple[str, Any]] = trace.iter_stochastic_nodes()
        sites = tuple(
            LatentSite(
                name,
                free_shapes[name],
                supports[name],
                site["fn"].batch_shape,
                site["fn"].event_shape,
                # What a plate does row by row is in the names of its sites.
                tuple(frame for frame in site["cond_indep_stack"] if frame.vectorized),
            )
            for name, site in nodes
        )
        self._assign(trace, sites)
        return sites

    def _assign(self, trace: Trace, sites: Sequence[LatentSite]) -> None:
        self.prototype_trace = trace
        self._prototype_frames = {frame.name: frame for site in sites for frame in site.plates}
        self._unconstrained_shapes = {site.name: site.free_shape for site in sites}
        self._cond_indep_stacks = {site.name: site.plates for site in sites}
        self.latent_dim = sum(site.free_shape.numel() for site in sites)

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
        self._assign(trace, sites)
        self.make_plates()

    def make_plates(self, *args: Any, **kwargs: Any) -> None:
        """Make the plates of the guide's sites.

        Args:
            *args: the model's arguments.
            **kwargs: its keyword arguments.
        """
        self._create_plates(*args, **kwargs)

    def unpack(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Each site's node and its unconstrained value, with room for plates to the left.

        Args:
            latent: ``(*batch, latent_dim)``.
        """
        return self._unpack_latent(latent)

    def emit(self, latent: Tensor, args: tuple, kwargs: dict) -> dict[str, tuple[Tensor, Tensor]]:
        """Each site's value, and the log-determinant of the map onto its support there.

        Args:
            latent: a draw, ``(*batch, latent_dim)``.
            args: the model's arguments.
            kwargs: its keyword arguments.
        """
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The guide, called with the model's arguments; returns each latent site's draw.

        Raises:
            NotImplementedError: under ``torch.jit.trace``, as of Pyro's ``JitTrace_ELBO``.
        """
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "guide: a flow cannot be traced by torch.jit; use Trace_ELBO in place of "
                "JitTrace_ELBO, or pf.fit_guide with compile=True"
            )
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, (value, log_det) in self.emit(latent, args, kwargs).items():
            event_dim = value.dim() - log_det.dim()
            delta = dist.Delta(value, log_density=-log_det, event_dim=event_dim)
            with contextlib.ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                result[name] = pyro.sample(name, delta)
        return result


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
