"""Autoguides: a flow over all of a model's continuous latent variables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyroflows._checks import check_positive, check_whole
from pyroflows._pyro.threads import runs_models
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.mixture import MixtureFlow
from pyroflows.flows import iaf
from pyroflows.infer.flow_guide import FlowGuide, whiten_of
from pyroflows.infer.modes import MOST_FULL, MOST_MODES, gaussian_starts
from pyroflows.infer.start import Gaussians, drawn_from, middle, same_draws
from pyroflows.programs.circles import circle_in, circle_of, is_angle, turned
from pyroflows.programs.log_density import LogDensity
from pyroflows.programs.sites import (
    Setup,
    bracketed,
    check_builder,
    check_latent,
    check_same_sites,
    is_moving,
    widest_dtype,
)
from pyroflows.programs.supports import bijection_of_site, support_of_site
from pyroflows.programs.vectorize import nesting, sample_sites
from pyroflows.structured.apart import apart_start
from pyroflows.structured.flow import around_rows, rows_flow, start_rows
from pyroflows.structured.start import arrow_start
from pyroflows.structured.structure import structure_of
from pyroflows.transforms import ActNorm, Chain, Whiten
from pyroflows.transforms.rows import Arrow

STARTS = ("newton", "init")
LARGE = 64  # latent numbers, beyond which a model's rows are looked for
_OF_ROWS = frozenset(("layers", "hidden"))  # builder's arguments that a flow of rows has too
_LIGHT = 400  # beyond which a flow of all has no matrices
_OFF = 0.1  # by which a second run of the model is off, to see what moves


class AutoFlow(FlowGuide):
    """A guide whose posterior is a flow over the model's unconstrained latent variables.

    All latent sites, each mapped to R^n by ``biject_to(support)``, are stacked into one vector; the
    flow is a density over it. Its outermost layer is a fixed affine map that ``setup`` finds: the
    best Gaussian on a few Newton ascents of the posterior (after Pathfinder, Zhang et al. 2022), so
    that the flow in front of it starts near the posterior, at scale one, whatever the units.

    Up to 50 dimensions several ascents start far apart, from draws of the prior too. Where they end
    in modes with a dip of the density between them, each mode within 7 nats of the best has a flow
    of its own (24 at most), and the guide is their mixture: ``guide.modes`` tells how many. Flows
    train each by its own ELBO; ``fit_guide`` gives them their shares by importance weights at the
    end. A mode that no ascent finds is missed; ``pf.report`` looks again, from other points.

    ``setup`` runs the model six times, and twice for each of up to 60 iterations of a Newton ascent
    and of up to 23 others (11 in over 10 dimensions, 4 in over 20, none in over 50), which go on
    side by side until they come to where the first one ended: 12 runs at most for one Gaussian
    site, several times as many where there are several modes. A run is of up to some thousand
    points at once by ``torch.func.vmap``, or of as many as make four million numbers with the data;
    where the model takes one at a time, each is a run, and there are eight ascents at most. Models
    are written for one draw: nothing need be said of dimensions to the left.

    Above 64 latent numbers the model's rows are looked for: numbers that stand in no factor of the
    joint density together with another row's, given all that is global (400 numbers at most, rows
    of up to 64 numbers each). Derivatives of the factors show them, whatever the plates are. The
    globals then have a flow, and each group of rows one that it shares, conditional on the globals,
    with a location and scale for each row (after Webb et al. 2018, arXiv:1712.00287). They start at
    the mode of the globals with the rows integrated by Laplace's approximation (as INLA; Rue et al.
    2009), memory grows linearly, and ``report`` integrates the rows one by one. ``learned.groups``
    tells how many rows of how many numbers. Where all is tied up, a full Gaussian is found up to
    4,096 numbers; beyond, each number starts on its own, and ``report`` says what that is worth.
    A builder of one's own, or arguments other than ``layers`` and ``hidden``, are a flow of all.

    Discrete sites of finite support are summed out, by Pyro's enumeration; ``sample_discrete`` and
    ``discrete_probabilities`` give them back. Where a site's support
    depends on another site (``Uniform(0, a)``), the guide runs the model to place its draws.

    Angles (``VonMises``; Pyro calls their support real) are unwound: a free number is an angle
    measured on and on, each of those 2 pi apart has a share of the density, and draws wind up into
    [-pi, pi), by the posterior exactly where the flow is exact. ``setup`` puts the seam where the
    posterior is rarest, and looks for modes a second time where that moved; with ``init="init"`` it
    is opposite to the start. The flow's density is of the unwound number, so that an ELBO bounds
    the evidence from a little farther below, and importance weights are exact.

    Parameters exist from ``setup`` on (the first call makes it otherwise): ``state_dict``s load and
    optimisers see them before the first step. In Pyro's parameter store each guide has a name of
    its own, copies too: ``AutoFlow(z)``, ``AutoFlow(z)#2``, ... as they are set up; it continues
    from what was loaded into the store under that. Flat priors (``ImproperUniform``) work.

    Works with ``SVI``, ``Trace_ELBO()(model, guide)``, ``Predictive`` and ``NeuTraReparam``.

    Attributes:
        flow: the ``Flow`` over the stacked unconstrained sites, from ``setup`` on; of several modes
            a ``MixtureFlow``, whose ``flows`` are around one each.
        learned: what ``setup`` learned of the model; None before.

    Args:
        model: a Pyro model whose latent variables are continuous and of fixed shape.
        builder: ``builder(features)`` returns the flow; by default ``pf.iaf``, small, since a
            guide must sample fast and give the density of its draws; of splines for one number.
        init: ``"newton"`` for the start described above (where the model has no second derivatives,
            as ``"init"``), ``"init"`` for a narrow Gaussian at ``init_loc_fn``.
        hide: names of latent sites that the guide leaves alone.
        init_loc_fn: where each site starts, as in Pyro's autoguides; by default prior medians,
            zero in unconstrained space where a prior cannot be sampled.
        init_scale: the standard deviation of the narrow Gaussian in unconstrained space.
        name: in Pyro's parameter store: guides that are given the same one share what it holds
            there, and a later one continues from an earlier one's values. By default its own.
        **builder_args: passed on to the builder.

    Raises:
        ValueError: the model has no continuous latent variable, a discrete one, a latent site
            inside a subsampled plate, no finite log-density near the start, or an argument is out
            of range.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> guide = pf.AutoFlow(model, layers=2, hidden=(8,)).setup(torch.ones(5))
        >>> guide.sample_posterior(4, torch.ones(5))["scale"].shape
        torch.Size([4])
    """

    builder: Callable[..., Flow] | None
    flow: Flow | MixtureFlow

    def __init__(
        self,
        model: Callable[..., Any],
        builder: Callable[..., Flow] | None = None,
        *,
        init: str = "newton",
        hide: Sequence[str] = (),
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float = 0.1,
        name: str | None = None,
        **builder_args: Any,
    ) -> None:
        check_positive(init_scale=init_scale)
        check_builder(builder)
        if not (init_loc_fn is None or callable(init_loc_fn)):
            raise ValueError(f"init_loc_fn: expected a function of a site, got {init_loc_fn!r}")
        if not isinstance(init, str) or init not in STARTS:
            raise ValueError(f"init: expected one of {STARTS}, got {init!r}")
        super().__init__(model, name=name)
        self.init_loc_fn = init_loc_fn or middle
        self.builder = builder
        self.builder_args = builder_args
        self.hidden = [hide] if isinstance(hide, str) else list(hide)
        self.init = init
        self.init_scale = init_scale
        self.learned: Setup | None = None

    @runs_models
    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Run the model to learn its sites, build the flow and find its start; returns the guide.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.
        """
        if self.learned is None:
            self.learn(*args, **kwargs)
            self.make_plates(*args, **kwargs)
        return self

    def learn(self, *args: Any, **kwargs: Any) -> None:
        """What ``setup`` and the first call do.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.
        """
        try:
            start = self._learn(args, kwargs)
            log_p = self.log_density(args, kwargs)
            flow = self._by_rows(log_p, start) or self._by_modes(log_p, start)
        except Exception:
            self.learned = self.prototype_trace = None  # not set up: the next call tries again
            raise
        self.name_by(bracketed(site.name for site in self._known.sites))
        self.flow = flow

    def _learn(self, args: tuple, kwargs: dict) -> Tensor:
        """Two runs of the model: where its latent sites start, and a little off. Returns the start.

        The second tells whether supports move, and what there is beside the sites.
        """
        trace = self.latent_trace(self.init_loc_fn, args, kwargs, self.hidden)
        nodes: list[tuple[str, Any]] = list(trace.iter_stochastic_nodes())
        free: dict[str, Tensor] = {}
        supports: dict[str, Constraint] = {}
        for name, node in nodes:
            if node["fn"].has_enumerate_support:
                trace.remove_node(name)  # summed out
                continue
            check_latent(name, node)
            value = node["value"].detach()
            around = circle_of(node["fn"], value) if is_angle(node["fn"]) else None
            supports[name] = support_of_site(name, node["fn"], around)
            free[name] = bijection_of_site(name, node["fn"], around).inv(value)
        start = torch.cat([value.reshape(-1) for value in free.values()] or [torch.empty(0)])
        if not len(start):
            raise ValueError(
                "model: expected continuous latent sites, found none; a guide has nothing to do"
            )
        free_shapes = {name: value.shape for name, value in free.items()}
        sites = self.assign_trace(trace, free_shapes, supports)
        with poutine.block():
            other = LogDensity(self.model, sites, args, kwargs).trace(start + _OFF)
        found = sample_sites(other)
        latent = {name: site for name, site in found.items() if not site["is_observed"]}
        discrete = tuple(n for n, site in latent.items() if site["fn"].has_enumerate_support)
        check_same_sites(other, (site.name for site in sites), {*self.hidden, *discrete})
        self.note_parameters(other)
        moving = is_moving(
            sites,
            {s.name: support_of_site(s.name, latent[s.name]["fn"], s.support) for s in sites},
        )
        self.learned = Setup(sites, nesting(other), widest_dtype(other), discrete, moving)
        return start.to(self.dtype)

    def _by_modes(self, log_p: LogDensity, start: Tensor) -> Flow | MixtureFlow:
        """The flow of a model without such a structure, one for each mode."""
        narrow = self.init_scale * torch.eye(self.latent_dim).to(start)
        found = gaussian_starts(log_p, start, narrow, self.init == "newton")
        if self.init == "newton":
            found = self._turn(found, narrow, log_p)
        return self._posterior([self._build() for _ in found.elbo], found)

    def _by_rows(self, log_p: LogDensity, start: Tensor) -> Flow | None:
        """The flow of a large model, of rows given globals; None where a full Gaussian will do."""
        own = self.builder is not None or not _OF_ROWS.issuperset(self.builder_args)
        if len(start) <= LARGE or own or self.init != "newton":
            return None
        with same_draws():
            arrow = self._rows_of(log_p, start)
            if arrow is None and len(start) > MOST_FULL:
                arrow = apart_start(log_p, start)
        if arrow is None:
            return None
        self.learned = replace(self._known, groups=arrow.sizes)
        flow = around_rows(rows_flow(len(start), groups=arrow.sizes, **self.builder_args), start)
        start_rows(flow, arrow)
        return flow

    def _rows_of(self, log_p: LogDensity, start: Tensor) -> Arrow | None:
        """Gaussians of globals and of rows that are independent given them, if there are such."""
        known = self._known
        if known.moving or known.discrete or self.hidden or log_p.subsampled(start):
            return None
        structure = structure_of(log_p, start)
        return None if structure is None else arrow_start(log_p, structure, start)

    def _turn(self, found: Gaussians, narrow: Tensor, log_p: LogDensity) -> Gaussians:
        """The starts with the seam of each angle where the posterior is rarest.

        Where that is another place than opposite to the site's start, the search is made again: a
        mode on a seam is two.
        """
        if not any(circle_in(site.support) for site in self._known.sites):
            return found
        sites, shift = turned(self._known.sites, drawn_from(found))
        if not shift.any():
            return found
        self.learned = replace(self._known, sites=sites)
        log_p = self.log_density(log_p.args, log_p.kwargs)
        return gaussian_starts(log_p, found.loc[0] - shift, narrow, climb=True)

    def restore(self, learned: Setup, inner: Flow, modes: int = 1) -> None:
        """Set up from what another guide learned, without a run of the model.

        Args:
            learned: by the other guide.
            inner: a new flow from its builder.
            modes: of the other guide.

        Raises:
            ValueError: ``modes`` is no whole number from 1 to 24.
        """
        check_whole(1, modes=modes)
        if modes > MOST_MODES:
            raise ValueError(f"modes: expected at most {MOST_MODES}, got {modes}")
        self.learned = learned
        self.assign_sites(learned.sites, learned.dtype)
        if learned.groups:
            self.flow = around_rows(inner, torch.zeros((), dtype=learned.dtype))
            return
        at = torch.zeros(modes, self.latent_dim, dtype=learned.dtype)
        unit = torch.eye(at.shape[1]).to(at).expand(modes, -1, -1)
        start = Gaussians(at[:, 0], at, unit, at, unit)
        others = [copy.deepcopy(inner) for _ in range(modes - 1)]
        self.flow = self._posterior([inner, *others], start)

    def _posterior(self, inner: list[Flow], start: Gaussians) -> Flow | MixtureFlow:
        """A flow around each Gaussian, or a mixture of several."""
        flows = [self.around(each, loc) for each, loc in zip(inner, start.loc, strict=True)]
        for flow, loc, tril in zip(flows, start.loc, start.tril, strict=True):
            cast(Whiten, whiten_of(flow)).set(loc, tril)
        return flows[0] if len(flows) == 1 else MixtureFlow(flows, start.elbo)

    def around(self, inner: Flow, like: Tensor) -> Flow:
        """The guide's flow: the builder's, and outside it a trained and a fixed affine map.

        Args:
            inner: from the builder.
            like: a tensor of the flow's dtype and device.
        """
        # A trained location and scale too: not every builder's layers can move a whole density.
        affine = ActNorm(self.latent_dim)
        affine.initialized.fill_(True)
        parts = [inner.transform, affine, Whiten(self.latent_dim)]
        flow = Flow(Chain([p.to(like) for p in parts]), inner.base, shape=self.latent_dim)
        flow.config = inner.config
        return flow.to(like)

    def _build(self) -> Flow:
        if self.builder is not None:
            return self.builder(self.latent_dim, **self.builder_args)
        # Small: in front of a whitening map more brought nothing. Smooth: the kinks of rectifiers
        # gave the weights of near-Gaussian posteriors heavy tails (k-hat 1.5 instead of 0.3).
        width = min(max(32, 2 * self.latent_dim), 128)
        small: dict[str, Any] = {"layers": 4, "hidden": (width, width), "activation": "silu"}
        if self.latent_dim > _LIGHT:  # matrices of all numbers would be most of the parameters
            small |= {"layers": 2, "linear": "reverse"}
        if self.latent_dim == 1:  # of one number an affine step makes a Gaussian, and no more
            small["family"] = "spline"
        return iaf(self.latent_dim, **{**small, **self.builder_args})
