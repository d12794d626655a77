"""An autoguide for models with latent variables for each data row: q(z_i | x_i) as a flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import init_to_median
from pyro.nn import pyro_method
from torch import Tensor, nn
from torch.distributions import biject_to

from pyroflows._pyro.guides import Guide
from pyroflows._pyro.store import InStep
from pyroflows._pyro.threads import runs_models
from pyroflows.distributions.flow import Flow
from pyroflows.flows import builder, iaf
from pyroflows.infer.guides import AutoFlow
from pyroflows.programs.plates import (
    Plate,
    check_rows,
    local_sites,
    plate_of,
    plate_of_rows,
    plate_with_latents,
)
from pyroflows.programs.sites import (
    AmortizedSetup,
    bracketed,
    check_builder,
    constrained,
    no_model,
    prior_of,
    split,
)
from pyroflows.transforms import ActNorm, Chain, ContextAffine


class AutoAmortizedFlow(Guide):
    r"""A guide whose posterior over each row's latent variables is a flow that a network sets.

    The model has one plate with latent sites in it, the local ones; all others are global:

    .. math:: q(g, z_1, \dots, z_n) = q(g) \prod_i q(z_i \mid c_i), \quad c = \text{encoder}(x).

    :math:`q(z_i \mid c_i)` is a flow over the item's local sites, stacked and mapped to R^n by
    ``biject_to(support)``. Its last layer has a location and a log-scale that are linear in the
    context, so that without a flow it is the Gaussian of Kingma & Welling 2014, arXiv:1312.6114. It
    starts as a Gaussian of unit scale, the same for all items. :math:`q(g)` is an ``AutoFlow``.

    Every call runs the model up to its plate, to read the plate's size and subsample; so batches
    may differ in size, and the guide's terms are scaled as the model's. The encoder gives a row for
    each item of the (sub)sample. Where the model draws it (``subsample_size=``), it may also give
    one for each item of the full plate, of which the guide takes those at the plate's indices.

    Works with ``SVI``, ``Trace_ELBO()(model, guide)``, ``pf.fit_guide`` and vectorised particles,
    for which the encoder runs once. Parameters exist from ``setup`` on.

    ``pf.save`` writes the encoder's weights too; ``pf.load`` needs an encoder to put them in.
    Loaded without its model, the guide still draws and gives densities. Its plate then has the size
    that ``setup`` saw, and a batch is a part of it; where the model's plate was not subsampled, or
    the encoder had rows for all of it, the plate is as long as the encoder's rows.

    Args:
        model: a Pyro model with continuous latent sites.
        encoder: a module; ``encoder(*args)`` of the model's arguments is ``(items, context)``.
        builder: ``builder(features, context=...)`` returns the flow; None for no flow, that is, the
            diagonal Gaussian. It also makes the flow over the global sites.
        init_loc_fn: where each site starts, as in Pyro's autoguides.
        init_scale: the standard deviation of the global sites' start, in unconstrained space.
        name: in Pyro's parameter store, as of ``AutoFlow``.
        **builder_args: passed on to the builder.

    Raises:
        ValueError: ``encoder`` is not a module, or ``builder`` no function. In ``setup`` or the
            first call: no latent site in a plate, latent sites in two plates, a discrete one, or
            rows that do not fit the plate.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyroflows as pf
        >>> def model(x):
        ...     with pyro.plate("data", 1000, subsample=x):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[:, 0])
        >>> guide = pf.AutoAmortizedFlow(model, torch.nn.Linear(1, 4), layers=2, hidden=(8,))
        >>> guide.setup(torch.randn(20, 1)).sample_posterior(5, torch.randn(7, 1))["z"].shape
        torch.Size([5, 7, 2])
    """

    quantile_draws = 1000

    flow: Flow
    global_guide: AutoFlow | None

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        builder: Callable[..., Flow] | None = iaf,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 1.0,
        name: str | None = None,
        **builder_args: Any,
    ) -> None:
        if not isinstance(encoder, nn.Module):
            raise ValueError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
        check_builder(builder)
        super().__init__(model, name=name)
        self.encoder = InStep(encoder)
        self.builder = builder or no_flow
        self.builder_args = builder_args
        self.init_loc_fn = init_loc_fn
        self.init_scale = init_scale
        self.learned: AmortizedSetup | None = None
        self.global_values: dict[str, Tensor] = {}
        self.add_module("global_guide", None)

    @runs_models
    def setup(self, *args: Any, **kwargs: Any) -> AutoAmortizedFlow:
        """Run model and encoder once to learn sites and shapes, build the flows; returns the guide.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.
        """
        if self.learned is None:
            self.learn(*args, **kwargs)
        return self

    @torch.no_grad()
    def learn(self, *args: Any, **kwargs: Any) -> None:
        """What ``setup`` and the first call do.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.
        """
        trace = self.latent_trace(self.init_loc_fn, args, kwargs)
        latents: dict[str, Any] = dict(trace.iter_stochastic_nodes())
        plate_name, plate_dim = plate_with_latents(latents)
        local = {name: node for name, node in latents.items() if node["cond_indep_stack"]}
        # From now on the model runs with these, up to its plate, and draws nothing before it.
        values = {n: node["value"] for n, node in latents.items() if n not in local}
        sites, start = local_sites(local, plate_dim)
        rows = self.encoder(*args, **kwargs)
        self.global_values = values
        plate = self._plate_of_the_model(plate_name, args, kwargs)
        check_rows(rows, plate)
        # For a guide that is loaded without its model: are an encoder's rows a part of the plate?
        is_part = plate.takes_a_part and len(rows) == plate.items
        learned = AmortizedSetup(sites, plate_name, plate_dim, int(plate.size) if is_part else None)
        inner = self.builder(len(start), context=rows.shape[1], **self.builder_args)
        self.flow = self.around(inner, start, rows)
        if values:
            self._set_up_globals(args, kwargs)
        self.name_by(bracketed([*values, *local]))
        self.prototype_trace = trace
        self.learned = learned

    def _set_up_globals(self, args: tuple, kwargs: dict) -> None:
        """Make the guide over the global sites."""
        guide = AutoFlow(
            prior_of(self.model, self.global_values),
            self.builder,
            init="init",
            init_loc_fn=self.init_loc_fn,
            init_scale=self.init_scale,
            **self.builder_args,
        )
        # Not by assignment, which Pyro reads as a part of a list of guides.
        self.add_module("global_guide", guide)
        guide.setup(*args, **kwargs)

    def restore(
        self, learned: AmortizedSetup, global_values: dict[str, Tensor], inner: Flow, rows: Tensor
    ) -> None:
        """Set up from what another guide learned, without a run of the model.

        Args:
            learned: by the other guide.
            global_values: of the global sites, inside their supports.
            inner: a new flow from its builder.
            rows: like the encoder's.
        """
        self.learned, self.global_values = learned, global_values
        start = torch.zeros(sum(site.free_shape.numel() for site in learned.sites))
        self.flow = self.around(inner, start, rows)

    @staticmethod
    def around(inner: Flow, start: Tensor, rows: Tensor) -> Flow:
        """The flow over an item's local sites: the builder's, and outside it the context's affine.

        Args:
            inner: from the builder.
            start: the location that the affine map begins with, ``(stacked size,)``.
            rows: ``(items, context)``, as the encoder's, of the flow's dtype and device.
        """
        features, context = len(start), rows.shape[1]
        affine = ContextAffine(features, context).to(rows)
        with torch.no_grad():
            affine.linear.bias[:features].copy_(start)
        parts = [p.to(rows) for p in (inner.transform, affine)]
        flow = Flow(Chain(parts), inner.base, shape=features, context=context)
        flow.config = inner.config
        return flow.to(rows)

    def _plate_of_the_model(self, name: str, args: tuple, kwargs: dict) -> Plate:
        """The plate that the model makes for these arguments."""
        conditioned = poutine.condition(self.model, data=self.global_values)
        return plate_of(conditioned, name, args, kwargs)

    def _plate(
        self, learned: AmortizedSetup, rows: Tensor, args: tuple, kwargs: dict
    ) -> pyro.plate:
        """The plate for the encoder's rows: the model's, or one like it where there is none."""
        name, dim = learned.plate_name, learned.plate_dim
        if self.model is no_model:
            check_rows(rows, None)
            return plate_of_rows(name, dim, learned.full_size, rows)
        plate = self._plate_of_the_model(name, args, kwargs)
        check_rows(rows, plate)
        return pyro.plate(name, dim=dim, **plate._asdict())

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The guide, called with the model's arguments; returns each latent site's draw."""
        if not self.has_model:
            raise RuntimeError(
                "a guide that was pickled has lost its model and only gives sample_posterior: "
                "make a new one, and load this one's state_dict after setup"
            )
        self.setup(*args, **kwargs)
        learned = self.learned
        assert learned is not None
        result = {} if self.global_guide is None else dict(self.global_guide(*args, **kwargs))
        rows = self.encoder(*args, **kwargs)
        with self._plate(learned, rows, args, kwargs) as indices:
            assert indices is not None
            if len(rows) != len(indices):
                rows = rows[indices]
            # The plate may stand further left than the last dimension.
            rows = rows.reshape(len(rows), *[1] * (-learned.plate_dim - 1), -1)
            latent = pyro.sample(
                f"_{self.pyro_name}_latent", self.flow(rows), infer={"is_auxiliary": True}
            )
            free = split(learned.sites, latent)
            for site in learned.sites:
                to_support = biject_to(site.support)
                value = to_support(free[site.name])
                log_det = to_support.log_abs_det_jacobian(free[site.name], value)
                log_det = sum_rightmost(log_det, log_det.dim() - latent.dim() + 1)
                event_dim = value.dim() - latent.dim() + 1
                delta = dist.Delta(value, log_density=-log_det, event_dim=event_dim)
                result[site.name] = pyro.sample(site.name, delta)
        return result

    @runs_models
    @pyro_method
    @torch.no_grad()
    def sample_posterior(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``n`` draws of every latent site, inside its support.

        Args:
            n: number of draws.
            *args: the model's arguments, which the encoder reads.
            **kwargs: its keyword arguments.

        Returns:
            For each global site a tensor ``(n, *site shape)``, for each local one
            ``(n, items, *event shape)`` with an item for each of the encoder's rows.
        """
        self.setup(*args, **kwargs)
        assert self.learned is not None
        draws = {} if self.global_guide is None else self.global_guide.sample_posterior(n)
        latent = self.flow.sample((n,), self.encoder(*args, **kwargs))
        return {**draws, **constrained(self.learned.sites, latent)}


@builder
def no_flow(features: int, context: int = 0) -> Flow:
    """A Gaussian for global sites; the identity for local ones, which the context scales and moves.

    Args:
        features: stacked size of the sites.
        context: 0 for global sites.
    """
    parts = [] if context else [ActNorm(features)]
    return Flow(Chain(parts), shape=features, context=context)
