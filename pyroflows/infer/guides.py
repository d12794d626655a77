"""Autoguides: a flow over all of a model's continuous latent variables."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.nn import pyro_method
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyroflows._checks import check_positive
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.flow_distribution import FlowDistribution
from pyroflows.flows import iaf
from pyroflows.infer.log_joint import LogJoint
from pyroflows.infer.start import gaussian_start
from pyroflows.infer.vectorize import ChangedModelError, is_subsampled, nesting
from pyroflows.transforms import ActNorm, Chain, FlowTransform, Whiten

STARTS = ("newton", "init")


def _middle(site: dict) -> Tensor:
    """The prior's median, or zero in unconstrained space where it cannot be sampled."""
    fn = site["fn"]
    try:
        return init_to_median(site)
    except NotImplementedError:
        to_support = biject_to(fn.support)
        return to_support(torch.zeros(to_support.inverse_shape(fn.shape())))


def bracketed(sites: Iterable[str]) -> str:
    """The sites as a part of the name under which Pyro's store keeps a guide's weights.

    So the guide of another model in the same process does not meet them.

    Args:
        sites: the names of the guide's latent sites.
    """
    sites = list(sites)
    return f"({', '.join(sites[:4])}{', ...' if len(sites) > 4 else ''})"


def quantiles_of(draws: dict[str, Tensor], levels: Sequence[float] | Tensor) -> dict[str, Tensor]:
    """Quantiles ``(levels, *shape)`` of each site's draws ``(n, *shape)``."""
    return {
        name: value.quantile(torch.as_tensor(levels).to(value), dim=0)
        for name, value in draws.items()
    }


def check_builder(builder: Any) -> None:
    """See that it can make a flow: a flow itself is what it would have made."""
    if builder is not None and (isinstance(builder, Flow) or not callable(builder)):
        came = "a Flow" if isinstance(builder, Flow) else repr(builder)
        raise ValueError(
            f"builder: expected a function that makes a flow of so many features, such as pf.iaf, "
            f"got {came}"
        )


def _whiten(flow: Flow) -> Whiten:
    """The outermost layer of a guide's flow."""
    return cast(Whiten, cast(Chain, flow.transform)[-1])


class AutoFlow(AutoContinuous):
    """A guide whose posterior is a flow over the model's unconstrained latent variables.

    All latent sites, each mapped to R^n by ``biject_to(support)``, are stacked into one vector; the
    flow is a density over it. Its outermost layer is a fixed affine map that ``setup`` finds: the
    best Gaussian on a few Newton ascents of the posterior (after Pathfinder, Zhang et al. 2022), so
    that the flow in front of it starts near the posterior, at scale one, whatever the units.

    Parameters exist from ``setup`` on (the first call makes it otherwise): ``state_dict``s load and
    optimisers see them before the first step. Under a name that Pyro's parameter store already
    holds, the guide continues from the store's values. Flat priors (``ImproperUniform``) work.

    Works with ``SVI``, ``Trace_ELBO()(model, guide)``, ``Predictive`` and ``NeuTraReparam``.

    Attributes:
        flow: the ``Flow`` over the stacked unconstrained sites, from ``setup`` on.
        plate_nesting: how many dimensions to the left the model's plates reach.
        dtype: the flow's, the widest among the model's sites.

    Args:
        model: a Pyro model whose latent variables are continuous and of fixed shape.
        builder: ``builder(features)`` returns the flow; by default ``pf.iaf``, small, since a
            guide must sample fast and score its own draws.
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
    plate_nesting: int
    dtype: torch.dtype

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
        super().__init__(model, init_loc_fn=init_loc_fn or _middle)
        self.builder = builder
        self.builder_args = builder_args
        self.hidden = hidden
        self.init = init
        self.init_scale = init_scale

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Run the model to learn its sites, build the flow and find its start; returns the guide.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            self._create_plates(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
            self._check_sites()
            self._look_at(*args, **kwargs)
            inner = self._build()
            start = self._init_loc().to(self.dtype)
            flow = self.around(inner, start)
            narrow = self.init_scale * torch.eye(self.latent_dim).to(start)
            log_p = self.log_joint(args, kwargs)
            _whiten(flow).set(*gaussian_start(log_p, start, narrow, self.init == "newton"))
        except Exception as error:
            self.prototype_trace = None  # not set up: the next call tries again
            if isinstance(error, RuntimeError) and "no latent variables" in str(error):
                raise ValueError(
                    "model: expected continuous latent sites, found none; a guide has nothing to do"
                ) from error
            raise
        self._pyro_name += bracketed(self._unconstrained_shapes)
        self.flow = flow

    def around(self, inner: Flow, like: Tensor) -> Flow:
        """The guide's flow: the builder's, and outside it a trained and a fixed affine map.

        Args:
            inner: from the builder.
            like: says dtype and device.
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

    def _check_sites(self) -> None:
        for name, site in self.latent_sites().items():
            if site["fn"].has_enumerate_support or site["fn"].support.is_discrete:
                raise ValueError(
                    f"model: latent site {name!r} is discrete; sum it out, or name it in hide="
                )
            for frame in site["cond_indep_stack"]:
                if is_subsampled(frame):
                    raise ValueError(
                        f"model: latent site {name!r} is inside the plate {frame.name!r}, of which "
                        f"{frame.size} of {frame.full_size} rows are seen at a time; use "
                        "pf.AutoAmortizedFlow, which has an encoder for such sites"
                    )

    def latent_sites(self) -> dict[str, Any]:
        """The sites that the guide draws, by name, as in a trace of the model.

        Raises:
            ValueError: it was not set up yet.
        """
        if self.prototype_trace is None:
            raise ValueError(
                "guide: it has no parameters yet; call guide.setup(*args) with the model's "
                "arguments"
            )
        return dict(self.prototype_trace.iter_stochastic_nodes())

    def check_model(self, trace: Trace) -> None:
        """See that a run of the model has the latent sites that the guide was set up for.

        Args:
            trace: of the model.

        Raises:
            ChangedModelError: a site has appeared or is gone.
        """
        found = {
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        }
        changed = found.symmetric_difference(self._unconstrained_shapes).difference(self.hidden)
        if changed:
            names = ", ".join(map(repr, sorted(changed)))
            raise ChangedModelError(
                f"model: latent site {names} comes and goes from call to call; a guide needs the "
                "same sites in every call. Sum the choice out, or always sample every site"
            )

    def _look_at(self, *args: Any, **kwargs: Any) -> None:
        """Learn what the prototype, which holds no observed sites, does not show."""
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        self.check_model(trace)
        self.plate_nesting = nesting(trace)
        values = [site["value"] for site in trace.nodes.values() if site["type"] == "sample"]
        kinds = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
        self.dtype = functools.reduce(torch.promote_types, kinds)  # the widest among all sites

    def log_joint(
        self, args: tuple, kwargs: dict, model: Callable[..., Any] | None = None
    ) -> LogJoint:
        """The model's log-density over the guide's stacked unconstrained sites.

        Args:
            args: the model's arguments.
            kwargs: its keyword arguments.
            model: another with the same latent sites; by default the guide's own.
        """
        model = self.model if model is None else model
        return LogJoint(model, self._unpack_latent, self.plate_nesting, args, kwargs)

    @property
    def whiten(self) -> Whiten:
        """The flow's outermost layer, the Gaussian it started from."""
        return _whiten(self.flow)

    def sites_of(self, chosen: Tensor) -> list[str]:
        """The sites to which chosen components, ``(latent_dim,)`` of booleans, belong.

        Args:
            chosen: which components.
        """
        sizes = [shape.numel() for shape in self._unconstrained_shapes.values()]
        pieces = zip(self._unconstrained_shapes, chosen.split(sizes), strict=True)
        return [name for name, piece in pieces if piece.any()]

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The flow's distribution over the stacked unconstrained sites."""
        return self.flow()

    @pyro_method
    def get_base_dist(self) -> torch.distributions.Distribution:
        """The flow's base distribution: what NeuTra samples in."""
        return self.flow.base()

    @pyro_method
    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """From the base to the stacked unconstrained sites."""
        return self.flow.transform

    @pyro_method
    @torch.no_grad()
    def sample_posterior(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``n`` draws of every latent site, on its own (constrained) scale.

        Args:
            n: number of draws.
            *args: the model's arguments; needed only before ``setup``.
            **kwargs: its keyword arguments.

        Returns:
            For each site a tensor ``(n, *site shape)``.
        """
        self.setup(*args, **kwargs)
        return self._constrained(self.flow.sample((n,)))

    def _constrained(self, latent: Tensor) -> dict[str, Tensor]:
        """Split ``(n, latent_dim)`` into sites and map each onto its support."""
        sizes = [shape.numel() for shape in self._unconstrained_shapes.values()]
        sites = self.latent_sites()
        pieces = zip(self._unconstrained_shapes.items(), latent.split(sizes, dim=-1), strict=True)
        return {
            name: biject_to(sites[name]["fn"].support)(piece.reshape(len(latent), *shape))
            for (name, shape), piece in pieces
        }

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every latent site, from 10,000 draws."""
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every latent site, from 10,000 draws.

        Args:
            quantiles: levels in [0, 1].
            *args: the model's arguments; needed only before ``setup``.
            **kwargs: its keyword arguments.

        Returns:
            For each site a tensor ``(levels, *site shape)``.
        """
        return quantiles_of(self.sample_posterior(10_000, *args, **kwargs), quantiles)

    def __deepcopy__(self, memo: dict) -> AutoFlow:
        # Weights and Pyro's context are copied; the model and what was learnt of it are shared.
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__, master=None)
        for name in ("_parameters", "_buffers", "_modules", "_pyro_context"):
            twin.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        return twin

    def __getstate__(self) -> dict:
        # Pyro's version forgets the model on the living guide too; the copy alone goes without it.
        state = dict(self.__dict__)
        state["_model"] = None
        state["master"] = None
        return state
