"""Autoguides: a flow over all of a model's continuous latent variables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.nn import pyro_method
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.distribution import Flow, FlowDistribution
from pyroflows.flows import iaf
from pyroflows.transforms import ActNorm, Chain


class AutoFlow(AutoContinuous):
    """A guide whose posterior is a flow over the model's unconstrained latent variables.

    All latent sites, each mapped to R^n by ``biject_to(support)``, are stacked into one vector; the
    flow is a density over it. It starts near a point, at a small scale: a learned location and
    scale outside the flow make that start, and training moves them. Parameters exist from
    ``setup`` on (the first call makes it otherwise): ``state_dict``s load and optimisers see them
    before the first step. Under a name that Pyro's parameter store already holds, the guide
    continues from the store's values.

    Works with ``SVI``, ``Trace_ELBO()(model, guide)``, ``Predictive`` and ``NeuTraReparam``.

    Args:
        model: a Pyro model whose latent variables are continuous and of fixed shape.
        builder: ``builder(features)`` returns the flow; ``pf.iaf`` by default, since a guide must
            sample fast.
        init_loc_fn: where each site starts, as in Pyro's autoguides.
        init_scale: the start's standard deviation in unconstrained space.
        **builder_args: passed on to the builder.

    Raises:
        ValueError: the model has no continuous latent variable, or ``init_scale`` is not positive.

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

    def __init__(
        self,
        model: Callable[..., Any],
        builder: Callable[..., Flow] = iaf,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        **builder_args: Any,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale: expected a positive number, got {init_scale}")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.builder = builder
        self.builder_args = builder_args
        self.init_scale = init_scale

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Run the model once to learn its sites, and build the flow; returns the guide.

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
        except RuntimeError as error:
            if "no latent variables" not in str(error):
                raise
            raise ValueError(
                "model: expected continuous latent sites, found none; a guide has nothing to do"
            ) from error
        start = self._init_loc()
        # The sites are part of the name under which Pyro's store keeps the weights: the guide of
        # another model in the same process does not meet them.
        sites = list(self._unconstrained_shapes)
        self._pyro_name += f"({', '.join(sites[:4])}{', ...' if len(sites) > 4 else ''})"
        inner = self.builder(self.latent_dim, **self.builder_args)
        outer = ActNorm(self.latent_dim)
        with torch.no_grad():
            outer.loc.copy_(start)
            outer.log_scale.fill_(torch.tensor(self.init_scale).log())
            outer.initialized.fill_(True)
        flow = Flow(Chain([inner.transform, outer]), inner.base, shape=self.latent_dim)
        flow.config = inner.config
        self.flow = flow.to(start)

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The flow's distribution over the stacked unconstrained sites."""
        return self.flow()

    @pyro_method
    def get_base_dist(self) -> torch.distributions.Distribution:
        """The flow's base distribution: what NeuTra samples in."""
        return self.flow.base()

    @pyro_method
    def get_transform(self, *args: Any, **kwargs: Any) -> Chain:
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
        pieces = zip(self._unconstrained_shapes.items(), latent.split(sizes, dim=-1), strict=True)
        return {
            name: biject_to(self.prototype_trace.nodes[name]["fn"].support)(
                piece.reshape(len(latent), *shape)
            )
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
        draws = self.sample_posterior(10_000, *args, **kwargs)
        return {
            name: value.quantile(torch.as_tensor(quantiles).to(value), dim=0)
            for name, value in draws.items()
        }

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
