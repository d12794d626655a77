"""What a guide over one vector does with its flow: draws, densities, values of the sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.distributions.util import sum_rightmost
from pyro.nn import pyro_method
from pyro.poutine import Trace
from torch import Tensor

from pyroflows._pyro.guides import VectorGuide
from pyroflows._pyro.threads import runs_models
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.flow_distribution import FlowDistribution
from pyroflows.distributions.mixture import MixtureDistribution, MixtureFlow
from pyroflows.programs.circles import about_mean, circle_in
from pyroflows.programs.discrete_sites import discrete_probabilities, draw_discrete
from pyroflows.programs.log_density import LogDensity
from pyroflows.programs.sites import Setup, check_same_sites, constrained, not_set_up, split
from pyroflows.programs.supports import bijection
from pyroflows.transforms import Chain, FlowTransform, Whiten, WhitenRows


def whiten_of(flow: Flow) -> Whiten | WhitenRows:
    """The outermost layer of a guide's flow."""
    return cast("Whiten | WhitenRows", cast(Chain, flow.transform)[-1])


def _scored(
    posterior: FlowDistribution | MixtureDistribution, n: int, path: bool
) -> tuple[Tensor, Tensor]:
    latent = posterior.rsample((n,))
    return latent, (posterior.path_log_prob if path else posterior.log_prob)(latent)


class FlowGuide(VectorGuide):
    """A guide that has learned its sites and has a flow over them; subclasses say how.

    Attributes:
        flow: over the stacked unconstrained sites; of several modes a mixture of flows.
        learned: what it learned of the model; None before.
        hidden: names of latent sites that it leaves alone.
    """

    flow: Flow | MixtureFlow
    learned: Setup | None
    hidden: list[str]

    def setup(self, *args: Any, **kwargs: Any) -> FlowGuide:
        """Learn the sites, and make the flow, if that was not done.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.
        """
        raise NotImplementedError

    def check_model(self, trace: Trace) -> None:
        """See that a run of the model has the latent sites that the guide was set up for.

        Args:
            trace: of the model.

        Raises:
            ChangedModelError: a site has appeared or is gone.
        """
        beside = {*self.hidden, *self._known.discrete}
        check_same_sites(trace, (site.name for site in self._known.sites), beside)

    @property
    def _known(self) -> Setup:
        if self.learned is None:
            raise not_set_up()
        return self.learned

    @property
    def plate_nesting(self) -> int:
        """How many dimensions to the left the model's plates reach."""
        return self._known.plate_nesting

    @property
    def dtype(self) -> torch.dtype:
        """The flow's dtype, the widest among the model's sites."""
        return self._known.dtype

    def log_density(
        self,
        args: tuple,
        kwargs: dict,
        model: Callable[..., Any] | None = None,
        batching: str | None = None,
        numbers: int | None = None,
    ) -> LogDensity:
        """The model's log-density over the guide's stacked unconstrained sites.

        Args:
            args: the model's arguments.
            kwargs: its keyword arguments.
            model: another with the same latent sites; by default the guide's.
            batching: how it runs at several vectors, as in ``LogDensity``.
            numbers: how many a run's sites have, likewise.
        """
        known, model = self._known, self.model if model is None else model
        return LogDensity(
            model,
            known.sites,
            args,
            kwargs,
            hidden=self.hidden,
            discrete=known.discrete,
            nesting=known.plate_nesting,
            batching=batching,
            numbers=numbers,
        )

    def emit(self, latent: Tensor, args: tuple, kwargs: dict) -> dict[str, tuple[Tensor, Tensor]]:
        """Each site's value, and the log-determinant of the map onto its support there.

        Costs a run of the model for each draw where supports move, none otherwise.

        Args:
            latent: a draw, ``(*batch, latent_dim)``, its batch with room for the model's plates.
            args: the model's arguments.
            kwargs: its keyword arguments.
        """
        if self._known.moving:
            return self._emit_as_run(latent, args, kwargs)
        found = {}
        supports = {site.name: site.support for site in self._known.sites}
        for node, free in self.unpack(latent):
            to_support = bijection(supports[node["name"]])
            value = to_support(free)
            log_det = to_support.log_abs_det_jacobian(free, value)
            extra = log_det.dim() - value.dim() + node["fn"].event_dim
            found[node["name"]] = value, sum_rightmost(log_det, extra)
        return found

    def _emit_as_run(
        self, latent: Tensor, args: tuple, kwargs: dict
    ) -> dict[str, tuple[Tensor, Tensor]]:
        batch = latent.shape[:-1]
        ran = self.log_density(args, kwargs).run(latent.reshape(-1, self.latent_dim))
        found = {}
        for site in self._known.sites:
            value, log_det = ran.values[site.name], ran.log_dets[site.name]
            left = batch[: max(len(batch) - len(site.batch_shape), 0)]
            found[site.name] = (
                value.reshape(left + value.shape[1:]),
                log_det.reshape(left + log_det.shape[1:]),
            )
        return found

    @property
    def structured(self) -> bool:
        """Whether it has rows that are independent given the globals."""
        return bool(self._known.groups)

    @property
    def angles(self) -> tuple[str, ...]:
        """Names of the sites that are angles, whose means are of directions."""
        return tuple(site.name for site in self._known.sites if circle_in(site.support))

    def in_order(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """Draws as numbers of which some are larger than others, as quantiles take.

        An angle is measured on from its mean direction, to either side, so it may leave [-pi, pi).

        Args:
            draws: of every latent site.
        """
        return {k: about_mean(v) if k in self.angles else v for k, v in draws.items()}

    @property
    def flows(self) -> list[Flow]:
        """The flow of each mode; one where there is one."""
        return [self.flow] if isinstance(self.flow, Flow) else self.flow.components

    @property
    def modes(self) -> int:
        """How many modes of the posterior have a flow."""
        return len(self.flows)

    @property
    def whiten(self) -> Whiten | WhitenRows:
        """The outermost layer of the (first) flow, the Gaussian it started from."""
        return whiten_of(self.flows[0])

    def spread(self, n: int) -> Tensor:
        """How far n draws of each flow spread, in standard deviations of its start.

        Args:
            n: how many.

        Returns:
            About their own mean, and about the start's, ``(2, modes, latent_dim)``.
        """
        draws = [whiten_of(flow).inverse_and_log_det(flow.sample((n,)))[0] for flow in self.flows]
        whitened = torch.stack(draws)
        return torch.stack([whitened.std(dim=1), whitened.square().mean(dim=1).sqrt()])

    def sites_of(self, chosen: Tensor) -> list[str]:
        """The sites to which chosen components, ``(latent_dim,)`` of booleans, belong.

        Args:
            chosen: which components.
        """
        pieces = split(self._known.sites, chosen)
        return [name for name, piece in pieces.items() if piece.any()]

    def get_posterior(self, *_args: Any, **_kwargs: Any) -> FlowDistribution | MixtureDistribution:
        """The flow's distribution over the stacked unconstrained sites."""
        return self.flow()

    @pyro_method
    def get_base_dist(self) -> torch.distributions.Distribution:
        """The flow's base distribution: what NeuTra samples in."""
        return self._only_flow().base()

    @pyro_method
    def get_transform(self, *_args: Any, **_kwargs: Any) -> FlowTransform:
        """From the base to the stacked unconstrained sites.

        Raises:
            ValueError: of several modes; of angles, for which Pyro takes the real line.
        """
        if self.angles:
            raise ValueError(
                f"guide: {', '.join(map(repr, self.angles))} is an angle, which Pyro's "
                "NeuTraReparam would take for a real number, of a density without an end; use "
                "pf.NeuTra, or ProjectedNormal with ProjectedNormalReparam in the model"
            )
        return self._only_flow().transform

    def _only_flow(self) -> Flow:
        if isinstance(self.flow, Flow):
            return self.flow
        raise ValueError(
            f"guide: it is a mixture of {self.modes} flows, one for each mode, which no single "
            "transform makes; use pf.NeuTra, which samples in each, or "
            'AutoFlow(init="init"), which has one flow'
        )

    @pyro_method
    def scored_draws(self, n: int, path: bool = False) -> tuple[Tensor, Tensor]:
        """Reparameterised draws ``(n, latent_dim)`` and their log-density in nats ``(n,)``.

        Args:
            n: how many.
            path: whether the density is differentiated along the draws alone, its parameters fixed.
        """
        return _scored(self.flow(), n, path)

    @pyro_method
    def scored_by_mode(self, n: int, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws of each flow ``(modes, n, latent_dim)``, with its own density ``(modes, n)``.

        Args:
            n: how many of each.
            path: as in ``scored_draws``.
        """
        latent, log_q = zip(*(_scored(flow(), n, path) for flow in self.flows), strict=True)
        return torch.stack(latent), torch.stack(log_q)

    @runs_models
    @pyro_method
    @torch.no_grad()
    def sample_posterior(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``n`` draws of every latent site, inside its support.

        Args:
            n: number of draws.
            *args: the model's arguments; needed only before ``setup``, and where the support of a
                site depends on another site.
            **kwargs: its keyword arguments.

        Returns:
            For each site a tensor ``(n, *site shape)``.
        """
        self.setup(*args, **kwargs)
        return self.constrained(self.flow.sample((n,)), args, kwargs)

    @runs_models
    @pyro_method
    @torch.no_grad()
    def sample_discrete(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``n`` joint draws of all latent sites, those too that were summed out.

        These by Pyro's ``infer_discrete``, given the continuous ones: some runs of the model for
        each draw.

        Args:
            n: number of draws.
            *args: the model's arguments.
            **kwargs: its keyword arguments.

        Returns:
            For each site a tensor ``(n, *site shape)``.
        """
        self.setup(*args, **kwargs)
        latent, log_density = self.flow.sample((n,)), self.log_density(args, kwargs)
        return {**log_density.run(latent).values, **draw_discrete(log_density, latent)}

    @runs_models
    @pyro_method
    @torch.no_grad()
    def discrete_probabilities(
        self, *args: Any, draws: int = 100, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The posterior probability of each value of each discrete site.

        Averaged over draws of the continuous sites, a run of the model for each.

        Args:
            *args: the model's arguments.
            draws: how many.
            **kwargs: the model's keyword arguments.

        Returns:
            For each site ``(*site shape, values)``, in the order of its ``enumerate_support``.
        """
        self.setup(*args, **kwargs)
        latent, log_density = self.flow.sample((draws,)), self.log_density(args, kwargs)
        found = discrete_probabilities(log_density, latent)
        return {name: value.mean(0) for name, value in found.items()}

    def constrained(
        self, latent: Tensor, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Each site of stacked unconstrained vectors, mapped onto its support.

        Args:
            latent: ``(n, latent_dim)``.
            args: the model's arguments, where the support of a site depends on another site.
            kwargs: its keyword arguments.
        """
        if self._known.moving:
            return self.log_density(args, kwargs or {}).run(latent).values
        return constrained(self._known.sites, latent)
