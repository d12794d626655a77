"""An autoguide for latent variables that every data row has its own of: q(z_i | x_i) as a flow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import init_to_median
from pyro.infer.autoguide.guides import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import pyro_method
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor, nn
from torch.distributions import biject_to, constraints

from pyroflows.distribution import Flow
from pyroflows.flows import iaf
from pyroflows.infer.guides import AutoFlow
from pyroflows.store import InStep
from pyroflows.transforms import ActNorm, Chain, ContextAffine


class AutoAmortizedFlow(AutoGuide):
    r"""A guide whose posterior over each row's latent variables is a flow that a network sets.

    The model has one plate with latent sites in it, the local ones; all others are global:

    .. math:: q(g, z_1, \dots, z_n) = q(g) \prod_i q(z_i \mid c_i), \quad c = \text{encoder}(x).

    :math:`q(z_i \mid c_i)` is a flow over the item's local sites, stacked and mapped to R^n by
    ``biject_to(support)``; a location and a log-scale that are linear in the context close it, so
    that without a flow it is the Gaussian of Kingma & Welling 2014, arXiv:1312.6114. It starts as
    a Gaussian of unit scale, the same for all items. :math:`q(g)` is an ``AutoFlow``.

    Every call looks up the plate's size and subsample in the model, which runs up to the plate and
    no further; so batches may differ in size, and the guide's terms are scaled as the model's. The
    encoder's rows belong to the items of the plate: as many as the (sub)sample has, or, if the
    model subsamples by itself (``subsample_size=``), one for each item of the full plate, of which
    the guide takes those at the plate's indices.

    Works with ``SVI``, ``Trace_ELBO()(model, guide)``, ``pf.fit_guide`` and vectorised particles,
    for which the encoder runs once. Parameters exist from ``setup`` on.

    Args:
        model: a Pyro model with continuous latent sites.
        encoder: a module; ``encoder(*args)`` of the model's arguments is ``(items, context)``.
        builder: ``builder(features, context=...)`` returns the flow; None for no flow, that is, the
            diagonal Gaussian. It also makes the flow over the global sites.
        init_loc_fn: where each site starts, as in Pyro's autoguides.
        init_scale: the standard deviation of the global sites' start, in unconstrained space.
        **builder_args: passed on to the builder.

    Raises:
        ValueError: ``encoder`` is not a module. In ``setup`` or the first call: no latent site in a
            plate, latent sites in two plates, a discrete one, or rows that do not fit the plate.

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

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        builder: Callable[..., Flow] | None = iaf,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 1.0,
        **builder_args: Any,
    ) -> None:
        if not isinstance(encoder, nn.Module):
            raise ValueError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
        super().__init__(model)
        self.encoder = InStep(encoder)
        self.builder = builder or _no_flow
        self.builder_args = builder_args
        self.init_loc_fn = init_loc_fn
        self.init_scale = init_scale
        self.plates: dict[str, pyro.plate] = {}  # those of the global guide: none

    def setup(self, *args: Any, **kwargs: Any) -> AutoAmortizedFlow:
        """Run model and encoder once to learn sites and shapes, build the flows; returns the guide.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    @torch.no_grad()
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        started = InitMessenger(self.init_loc_fn)(self.model)
        started = poutine.block(started, self._prototype_hide_fn)
        with poutine.block():
            trace = poutine.trace(started).get_trace(*args, **kwargs)
        latents = dict(trace.iter_stochastic_nodes())
        self._plate_name, self._plate_dim = _plate_with_latents(latents)
        local = {name: site for name, site in latents.items() if site["cond_indep_stack"]}
        # The model is only ever run up to its plate, with these: nothing is drawn on the way.
        self._global_values = {n: s["value"] for n, s in latents.items() if n not in local}
        self._supports = {n: _of_any_item(n, s, self._plate_dim) for n, s in local.items()}
        free = {n: biject_to(s["fn"].support).inv(s["value"]) for n, s in local.items()}
        self._shapes = {n: z.shape[len(local[n]["fn"].batch_shape) :] for n, z in free.items()}
        items = {n: z.reshape(-1, self._shapes[n].numel()) for n, z in free.items()}
        start = torch.cat([rows.mean(dim=0) for rows in items.values()])
        rows = self.encoder(*args, **kwargs)
        _check_rows(rows, self._plate_of_the_model(*args, **kwargs))
        self._build(start, rows)
        if self._global_values:
            # It sees the global sites' prior alone: their density given some locals is not theirs.
            others = poutine.block(self.model, expose=list(self._global_values))
            how = {"init": "init", "init_loc_fn": self.init_loc_fn, "init_scale": self.init_scale}
            guide = AutoFlow(others, self.builder, **how, **self.builder_args)
            self.add_module("global_guide", guide)
            guide.setup(*args, **kwargs)
        self.prototype_trace = trace

    def _build(self, start: Tensor, rows: Tensor) -> None:
        """The local sites' flow, around ``start`` (their stacked size), for contexts like rows."""
        features, context = len(start), rows.shape[1]
        # The sites are part of the name under which Pyro's store keeps the weights.
        sites = [*self._global_values, *self._shapes]
        self._pyro_name += f"({', '.join(sites[:4])}{', ...' if len(sites) > 4 else ''})"
        inner = self.builder(features, context=context, **self.builder_args)
        outer = ContextAffine(features, context)
        with torch.no_grad():
            outer.linear.bias[:features].copy_(start)
        chain = Chain([inner.transform, outer])
        flow = Flow(chain, inner.base, shape=features, context=context)
        flow.config = inner.config
        self.flow = flow.to(rows)

    def _plate_of_the_model(self, *args: Any, **kwargs: Any) -> _Plate:
        """What plate the model makes of these arguments."""
        if self._model is None:
            raise RuntimeError(
                "a guide that was pickled has lost its model and only gives sample_posterior: "
                "make a new one, and load this one's state_dict after setup"
            )
        conditioned = poutine.condition(self.model, data=self._global_values)
        finder = _PlateFinder(self._plate_name)
        with torch.no_grad(), poutine.block():
            try:
                with finder:
                    conditioned(*args, **kwargs)
            except _Found as found:
                return found.plate
        raise ValueError(
            f"model: expected a pyro.plate({self._plate_name!r}, size) made where the model runs, "
            "got one made outside of it or without a size"
        )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The guide, called with the model's arguments; returns each latent site's draw."""
        self.setup(*args, **kwargs)
        result = dict(self.global_guide(*args, **kwargs)) if self._global_values else {}
        asked = self._plate_of_the_model(*args, **kwargs)
        rows = self.encoder(*args, **kwargs)
        _check_rows(rows, asked)
        with pyro.plate(self._plate_name, dim=self._plate_dim, **asked._asdict()) as indices:
            if len(rows) != len(indices):
                rows = rows[indices]
            # The plate may stand further left than the last dimension.
            rows = rows.reshape(len(rows), *[1] * (-self._plate_dim - 1), -1)
            latent = pyro.sample(
                f"_{self._pyro_name}_latent", self.flow(rows), infer={"is_auxiliary": True}
            )
            for name, free in self._split(latent).items():
                to_support = biject_to(self._supports[name])
                value = to_support(free)
                log_det = to_support.log_abs_det_jacobian(free, value)
                log_det = sum_rightmost(log_det, log_det.dim() - latent.dim() + 1)
                event_dim = value.dim() - latent.dim() + 1
                delta = dist.Delta(value, log_density=-log_det, event_dim=event_dim)
                result[name] = pyro.sample(name, delta)
        return result

    def _split(self, latent: Tensor) -> dict[str, Tensor]:
        """Stacked local sites ``(*batch, features)``, each in its unconstrained shape."""
        pieces = latent.split([shape.numel() for shape in self._shapes.values()], dim=-1)
        return {
            name: piece.reshape(latent.shape[:-1] + shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    @pyro_method
    @torch.no_grad()
    def sample_posterior(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``n`` draws of every latent site, on its own (constrained) scale.

        Args:
            n: number of draws.
            *args: the model's arguments, which the encoder reads.
            **kwargs: its keyword arguments.

        Returns:
            For each global site a tensor ``(n, *site shape)``, for each local one
            ``(n, items, *event shape)`` with an item for each of the encoder's rows.
        """
        self.setup(*args, **kwargs)
        draws = self.global_guide.sample_posterior(n) if self._global_values else {}
        latent = self.flow.sample((n,), self.encoder(*args, **kwargs))
        local = self._split(latent).items()
        return {**draws, **{k: biject_to(self._supports[k])(free) for k, free in local}}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every latent site, from 1,000 draws."""
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every latent site, from 1,000 draws.

        Args:
            quantiles: levels in [0, 1].
            *args: the model's arguments.
            **kwargs: its keyword arguments.

        Returns:
            For each global site ``(levels, *site shape)``, for each local one
            ``(levels, items, *event shape)``.
        """
        draws = self.sample_posterior(1000, *args, **kwargs)
        return {
            name: value.quantile(torch.as_tensor(quantiles).to(value), dim=0)
            for name, value in draws.items()
        }

    __deepcopy__ = AutoFlow.__deepcopy__
    __getstate__ = AutoFlow.__getstate__


def _no_flow(features: int, context: int = 0) -> Flow:
    """A Gaussian for global sites; the identity for local ones, which the context closes."""
    parts = [] if context else [ActNorm(features)]
    return Flow(Chain(parts), shape=features, context=context)


class _Plate(NamedTuple):
    """What ``pyro.plate`` was asked for: ``subsample`` may be indices or the batch itself."""

    size: int
    subsample_size: int | None
    subsample: Tensor | Sequence | None
    device: torch.device

    @property
    def items(self) -> int:
        """How many items the (sub)sample has."""
        if self.subsample is not None:
            return len(self.subsample)
        return self.size if self.subsample_size is None else min(self.subsample_size, self.size)


class _Found(Exception):
    def __init__(self, plate: _Plate) -> None:
        super().__init__("the model has reached its plate")
        self.plate = plate


class _PlateFinder(Messenger):
    """Stops a model where it makes the plate of that name, before anything is drawn for it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == self.name and site_is_subsample(msg):
            asked = msg["fn"]
            raise _Found(_Plate(asked.size, asked.subsample_size, msg["value"], asked.device))


def _plate_with_latents(latents: dict[str, dict]) -> tuple[str, int]:
    """Name and dimension of the one plate that has latent sites in it."""
    found: dict[str, tuple[str, int]] = {}
    for name, site in latents.items():
        if site["fn"].has_enumerate_support or site["fn"].support.is_discrete:
            raise ValueError(
                f"model: expected continuous latent sites, got {name!r}, a discrete "
                f"{type(site['fn']).__name__}; sum it out, or hide it with poutine.block and "
                "enumerate it"
            )
        frames = site["cond_indep_stack"]
        if len(frames) > 1 or any(not frame.vectorized for frame in frames):
            kinds = [f.name if f.vectorized else f"{f.name} (sequential)" for f in frames]
            raise ValueError(
                f"model: expected latent site {name!r} in one vectorised plate at most, got "
                f"plates {', '.join(kinds)}; inside the outer plate, make it one event with "
                ".to_event(1)"
            )
        for frame in frames:
            found[name] = frame.name, frame.dim
    if not found:
        raise ValueError(
            "model: expected latent sites inside a plate, found none; for global latent variables "
            "alone use pf.AutoFlow"
        )
    (first, plate), *others = found.items()
    for name, other in others:
        if other != plate:
            raise ValueError(
                f"model: expected one plate with latent sites, got {first!r} in plate "
                f"{plate[0]!r} and {name!r} in plate {other[0]!r}; where one of them has a fixed "
                "size, give its site .to_event(1) in place of the plate"
            )
    return plate


def _of_any_item(name: str, site: dict, plate_dim: int) -> constraints.Constraint:
    """The site's support without the plate's size: its bounds once, not once an item."""

    def narrowed(support: constraints.Constraint, axis: int) -> constraints.Constraint:
        support = copy.copy(support)
        if isinstance(support, constraints.independent):
            inner = axis - support.reinterpreted_batch_ndims
            support.base_constraint = narrowed(support.base_constraint, inner)
            return support
        for key, bound in vars(support).items():
            if isinstance(bound, Tensor) and bound.dim() >= -axis:
                once = bound.narrow(axis, 0, 1)
                if not (bound == once).all():
                    raise ValueError(
                        f"model: expected latent site {name!r} to have the same support for every "
                        f"item of the plate, got {key} from {bound.min():g} to {bound.max():g}"
                    )
                setattr(support, key, once)
        return support

    fn = site["fn"]
    if len(fn.batch_shape) != -plate_dim or fn.batch_shape[1:] != Size([1] * (-plate_dim - 1)):
        raise ValueError(
            f"model: expected latent site {name!r} to have no batch dimension but the plate's, "
            f"got batch shape {tuple(fn.batch_shape)}; declare the others with .to_event()"
        )
    return narrowed(fn.support, plate_dim)


def _check_rows(rows: Any, plate: _Plate) -> None:
    """The encoder's output has a row for each item of the plate, or of its subsample."""
    if not isinstance(rows, Tensor) or rows.dim() != 2:
        came = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"encoder: expected a tensor (items, context), got {came}")
    indexed = plate.subsample is None or (
        isinstance(plate.subsample, Tensor)
        and plate.subsample.dim() == 1
        and not plate.subsample.is_floating_point()
    )
    if len(rows) != plate.items and not (indexed and len(rows) == plate.size):
        full = f", or {plate.size} for the full plate" if indexed else ""
        raise ValueError(
            f"encoder: expected {plate.items} rows, one for each item of the plate{full}, "
            f"got {len(rows)}"
        )
