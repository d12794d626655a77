"""Autoguides: a flow over all of a model's continuous latent variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from pyro import poutine
from pyro.nn import pyro_method
from pyro.poutine import Trace
from torch import Tensor

from pyroflows._checks import check_positive
from pyroflows._pyro.guides import VectorGuide
from pyroflows._pyro.threads import runs_models
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.flow_distribution import FlowDistribution
from pyroflows.flows import iaf
from pyroflows.infer.log_joint import LogJoint
from pyroflows.infer.sites import (
    Setup,
    bracketed,
    check_builder,
    check_latent,
    check_same_sites,
    constrained,
    not_set_up,
    split,
    widest_dtype,
)
from pyroflows.infer.start import gaussian_start, middle
from pyroflows.infer.vectorize import nesting
from pyroflows.transforms import ActNorm, Chain, FlowTransform, Whiten

STARTS = ("newton", "init")


def _whiten(flow: Flow) -> Whiten:
    """The outermost layer of a guide's flow."""
    return cast(Whiten, cast(Chain, flow.transform)[-1])


class AutoFlow(VectorGuide):
    """A guide whose posterior is a flow over the model's unconstrained latent variables.

    All latent sites, each mapped to R^n by ``biject_to(support)``, are stacked into one vector; the
    flow is a density over it. Its outermost layer is a fixed affine map that ``setup`` finds: the
    best Gaussian on a few Newton ascents of the posterior (after Pathfinder, Zhang et al. 2022), so
    that the flow in front of it starts near the posterior, at scale one, whatever the units.

    ``setup`` runs the model 7 times. Each of up to five Newton ascents adds a run, and three for
    each of up to 60 iterations: 35 in all for one Gaussian site, hundreds for a centred hierarchy.
    A run is of up to 512 points at once; where the model takes one at a time, each is a run.

    Parameters exist from ``setup`` on (the first call makes it otherwise): ``state_dict``s load and
    optimisers see them before the first step. Under a name that Pyro's parameter store already
    holds, the guide continues from the store's values. Flat priors (``ImproperUniform``) work.

    Works with ``SVI``, ``Trace_ELBO()(model, guide)``, ``Predictive`` and ``NeuTraReparam``.

    Attributes:
        flow: the ``Flow`` over the stacked unconstrained sites, from ``setup`` on.
        learned: what ``setup`` learned of the model; None before.

    Args:
        model: a Pyro model whose latent variables are continuous and of fixed shape.
        builder: ``builder(features)`` returns the flow; by default ``pf.iaf``, small, since a
            guide must sample fast and give the density of its draws.
        init: ``"newton"`` for the start described above (up to 400 dimensions; beyond, and where
            the model has no second derivatives, as ``"init"``), ``"init"`` for a narrow Gaussian at
            ``init_loc_fn``.
        hide: names of latent sites that the guide leaves alone.
        init_loc_fn: where each site starts, as in Pyro's autoguides; by default prior medians,
            zero in unconstrained space where a prior cannot be sampled.
        init_scale: the standard deviation of the narrow Gaussian in unconstrained space.
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
    flow: Flow

    def __init__(
        self,
        model: Callable[..., Any],
        builder: Callable[..., Flow] | None = None,
        *,
        init: str = "newton",
        hide: Sequence[str] = (),
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float = 0.1,
        **builder_args: Any,
    ) -> None:
        check_positive(init_scale=init_scale)
        check_builder(builder)
        if not (init_loc_fn is None or callable(init_loc_fn)):
            raise ValueError(f"init_loc_fn: expected a function of a site, got {init_loc_fn!r}")
        if not isinstance(init, str) or init not in STARTS:
            raise ValueError(f"init: expected one of {STARTS}, got {init!r}")
        hidden = [hide] if isinstance(hide, str) else list(hide)
        if hidden:
            model = poutine.block(model, hide=hidden)
        super().__init__(model, init_loc_fn=init_loc_fn or middle)
        self.builder = builder
        self.builder_args = builder_args
        self.hidden = hidden
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
            self.learned = learned = self._learn(*args, **kwargs)
            inner = self._build()
            start = self.start_point().to(learned.dtype)
            flow = self.around(inner, start)
            narrow = self.init_scale * torch.eye(self.latent_dim).to(start)
            log_p = self.log_joint(args, kwargs)
            _whiten(flow).set(*gaussian_start(log_p, start, narrow, self.init == "newton"))
        except Exception:
            self.learned = self.prototype_trace = None  # not set up: the next call tries again
            raise
        self.pyro_name += bracketed(site.name for site in learned.sites)
        self.flow = flow

    def _learn(self, *args: Any, **kwargs: Any) -> Setup:
        """Two runs of the model: one of the latent sites alone, one of all sites."""
        sites = self.read_sites(*args, **kwargs)
        for name, node in self.latent_nodes():
            check_latent(name, node)
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        check_same_sites(trace, (site.name for site in sites), self.hidden)
        return Setup(sites, nesting(trace), widest_dtype(trace))

    def restore(self, learned: Setup, inner: Flow) -> None:
        """Set up from what another guide learned, without a run of the model.

        Args:
            learned: by the other guide.
            inner: a new flow from its builder.
        """
        self.learned = learned
        self.assign_sites(learned.sites, learned.dtype)
        self.flow = self.around(inner, torch.zeros(self.latent_dim, dtype=learned.dtype))

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
        small = {"layers": 4, "hidden": (width, width), "activation": "silu"}
        return iaf(self.latent_dim, **{**small, **self.builder_args})

    def check_model(self, trace: Trace) -> None:
        """See that a run of the model has the latent sites that the guide was set up for.

        Args:
            trace: of the model.

        Raises:
            ChangedModelError: a site has appeared or is gone.
        """
        check_same_sites(trace, (site.name for site in self._known.sites), self.hidden)

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

    def log_joint(
        self, args: tuple, kwargs: dict, model: Callable[..., Any] | None = None
    ) -> LogJoint:
        """The model's log-density over the guide's stacked unconstrained sites.

        Args:
            args: the model's arguments.
            kwargs: its keyword arguments.
            model: another with the same latent sites; by default the guide's.
        """
        model = self.model if model is None else model
        return LogJoint(model, self.unpack, self.plate_nesting, args, kwargs)

    @property
    def whiten(self) -> Whiten:
        """The flow's outermost layer, the Gaussian it started from."""
        return _whiten(self.flow)

    def sites_of(self, chosen: Tensor) -> list[str]:
        """The sites to which chosen components, ``(latent_dim,)`` of booleans, belong.

        Args:
            chosen: which components.
        """
        pieces = split(self._known.sites, chosen)
        return [name for name, piece in pieces.items() if piece.any()]

    def get_posterior(self, *_args: Any, **_kwargs: Any) -> FlowDistribution:
        """The flow's distribution over the stacked unconstrained sites."""
        return self.flow()

    @pyro_method
    def get_base_dist(self) -> torch.distributions.Distribution:
        """The flow's base distribution: what NeuTra samples in."""
        return self.flow.base()

    @pyro_method
    def get_transform(self, *_args: Any, **_kwargs: Any) -> FlowTransform:
        """From the base to the stacked unconstrained sites."""
        return self.flow.transform

    @runs_models
    @pyro_method
    @torch.no_grad()
    def sample_posterior(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``n`` draws of every latent site, inside its support.

        Args:
            n: number of draws.
            *args: the model's arguments; needed only before ``setup``.
            **kwargs: its keyword arguments.

        Returns:
            For each site a tensor ``(n, *site shape)``.
        """
        self.setup(*args, **kwargs)
        return self.constrained(self.flow.sample((n,)))

    def constrained(self, latent: Tensor) -> dict[str, Tensor]:
        """Each site of stacked unconstrained vectors, mapped onto its support.

        Args:
            latent: ``(n, latent_dim)``.
        """
        return constrained(self._known.sites, latent)
