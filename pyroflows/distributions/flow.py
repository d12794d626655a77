"""A flow: the module that owns a transform and a base, and whose call is a distribution."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyroflows._checks import as_size, context_shape, shape_text
from pyroflows._pyro.store import Synced
from pyroflows._pyro.views import detached_view
from pyroflows.distributions.base import Base
from pyroflows.distributions.flow_distribution import FlowDistribution
from pyroflows.transforms import Conditioned, FlowTransform
from pyroflows.transforms.chain import parts_of
from pyroflows.transforms.limits import within_limits


class Flow(Synced):
    """A module whose call is a distribution: ``flow()`` or ``flow(context)``.

    The call is cheap and mutates nothing. Everything Pyro does with a distribution works with it;
    as a module it trains under ``SVI`` and ``ELBOModule``, as attribute of a ``PyroModule``, under
    ``pyro.module`` or on its own.

    Write to its parameters under ``torch.no_grad()`` (optimisers, ``copy_``, ``load_state_dict``),
    not to their ``.data``, which torch does not see: log-densities remembered for draws, and in
    eval mode masked weights and matrices, are then out of date until ``flow.eval()`` and ``flow()``
    are called again.

    Args:
        transform: from base to data.
        base: base distribution (standard normal by default), or a module whose call returns one.
        shape: shape of one data point.
        context: number of context features, or the context's shape; 0 for none.

    Raises:
        ValueError: the transform or the base does not fit the shape.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow = pf.Flow(pf.transforms.LULinear(2), shape=2)
        >>> flow.log_prob(torch.zeros(3, 2))
        tensor([-1.8379, -1.8379, -1.8379], grad_fn=...)
        >>> flow().rsample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        transform: FlowTransform,
        base: Distribution | nn.Module | None = None,
        *,
        shape: int | Sequence[int],
        context: int | Sequence[int] = 0,
    ) -> None:
        super().__init__()
        if not isinstance(transform, FlowTransform):
            raise ValueError(f"transform: expected a FlowTransform, got {type(transform).__name__}")
        self.event_shape = Size([shape] if isinstance(shape, int) else shape)
        if transform.codomain.event_dim != len(self.event_shape):
            raise ValueError(
                f"shape: the transform makes events of {transform.codomain.event_dim} dimensions, "
                f"got shape {tuple(self.event_shape)}"
            )
        self.context_shape = Size(context_shape(context))
        self.transform = transform
        self.base = (
            base
            if isinstance(base, nn.Module)
            else Base(base, transform.inverse_shape(self.event_shape))
        )
        # How a builder made it, for pf.student_of and for saving: plain data only.
        self.config: dict[str, Any] | None = None
        self.reuses_draws = True
        self._check_shape()

    @torch.no_grad()
    def _check_shape(self) -> None:
        """Try one row in the fast direction, where that needs no knowledge of the support."""
        transform, context = self.transform, None
        if self.context_shape:
            context = torch.zeros(1, *self.context_shape, dtype=self.dtype, device=self.device)
        shape = transform.inverse_shape(self.event_shape)
        if transform.fast == "log_prob":
            if shape != self.event_shape or transform.codomain is not constraints.real_vector:
                return
            transform = transform.inv
        z = torch.zeros(1, *shape, dtype=self.dtype, device=self.device)
        got: object = None
        raised: Exception | None = None
        try:
            got = transform.forward_and_log_det(z, context)[0].shape[1:]
        except (RuntimeError, IndexError, TypeError) as error:  # what tensors that do not fit raise
            got = raised = error
        if got != self.event_shape:
            # With its cause: the mistake may be in the transform, and its traceback leads there.
            raise ValueError(
                f"shape: the transform does not take events of shape {tuple(self.event_shape)} "
                f"with context {tuple(self.context_shape)} ({got})"
            ) from raised

    @property
    def parts(self) -> list[FlowTransform]:
        """The transforms one after the other, base to data."""
        return parts_of(self.transform)

    @property
    def fast(self) -> str:
        """``"sample"``, ``"log_prob"`` or ``"both"``, whichever costs one pass."""
        return self.transform.fast

    @property
    def support(self) -> constraints.Constraint:
        """What a data point may be."""
        return self.transform.codomain

    def forward(
        self, context: Tensor | None = None, *, validate_args: bool | None = None
    ) -> FlowDistribution:
        """The distribution at the present parameters; its batch shape is the context's.

        Raises:
            ValueError: the context is missing, unwanted, or of the wrong width.
        """
        transform, batch = self.transform, None
        if context is not None or self.context_shape:
            context = self._checked(context)
            batch = context.shape[: context.dim() - len(self.context_shape)]
            transform = Conditioned(transform, context, len(self.context_shape))
        owner = self if self.reuses_draws else None
        return FlowDistribution(
            self.base(), transform, self.event_shape, owner, validate_args, batch
        )

    if TYPE_CHECKING:  # torch declares that a module's call returns anything

        def __call__(
            self, context: Tensor | None = None, *, validate_args: bool | None = None
        ) -> FlowDistribution:
            """The distribution at the present parameters."""

    def _checked(self, context: Any) -> Tensor:
        wanted = tuple(self.context_shape)
        if wanted and isinstance(context, Tensor):
            cut = context.dim() - len(wanted)
            if cut >= 0 and tuple(context.shape[cut:]) == wanted:
                return within_limits(context)
        came = "None" if context is None else type(context).__name__
        if isinstance(context, Tensor):
            came = f"a tensor of shape {tuple(context.shape)}"
        if wanted:
            shape = shape_text("*batch", *wanted)
            raise ValueError(f"context: this flow needs one of shape {shape}, got {came}")
        raise ValueError(
            f"context: this flow takes none, got {came}; build it with context=..., and ask for "
            "draws by sample(shape)"
        )

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of ``(*batch, *shape)`` in nats."""
        return self(context).log_prob(x)

    @torch.no_grad()
    def rounding(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """How far ``log_prob`` of ``(*batch, *shape)`` is off by rounding, in nats, a row.

        It is compared with double precision, at the cost of that. Single precision is good for what
        ``fit`` makes of usual data (1e-5 nats); where a flow presses space together a millionfold
        the digits of ``x`` do not say where in the base it lies, and its score is not to be relied
        on: take ``flow.double()`` and rows in double precision.

        Example:
            >>> import torch, pyroflows as pf
            >>> flow = pf.maf(2)
            >>> bool((flow.rounding(flow.sample((100,))) < 1e-4).all())
            True
        """
        exact = copy.deepcopy(self).double()
        given = None if context is None else context.double()
        found, wanted = self.log_prob(x, context).double(), exact.log_prob(x.double(), given)
        return torch.where(found == wanted, 0.0, (found - wanted).abs())

    def sample(self, shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Draws ``(*shape, *context batch, *event)`` without a graph."""
        return self(context).sample(as_size(shape))

    def rsample(self, shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Differentiable draws ``(*shape, *context batch, *event)``."""
        return self(context).rsample(as_size(shape))

    def rsample_and_log_prob(
        self, shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Differentiable draws and their log-densities in nats, in one go."""
        return self(context).rsample_and_log_prob(as_size(shape))

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set its data-dependent layers; ``pf.initialize``, which checks the data, calls this."""
        self.transform.initialize(x, context)

    def mirror(self, wider: float = 1.0) -> Flow:
        """A new flow that samples in one pass, layer by layer the fast mirror of this one.

        An autoregressive layer, of whatever family, becomes an untrained one over the same order of
        features whose fast direction is sampling; it can be the same map, as what a feature depends
        on is a function of the base's features before it. Everything else is copied.

        Args:
            wider: factor on the hidden widths of the nets of layers that were slow to sample.
        """
        transform = (
            self.transform.mirror(wider).to(self.device, self.dtype).requires_grad_().train()
        )
        base = copy.deepcopy(self.base).train()
        flow = Flow(transform, base, shape=self.event_shape, context=self.context_shape)
        if self.config is not None:
            flow.config = {"mirrored": wider, **copy.deepcopy(self.config)}
        return flow

    def detached(self) -> Flow:
        """A view with the same values, detached parameters and no memory of draws.

        Its ``log_prob(x)`` is a function of ``x`` alone, also for what it drew: what path-gradient
        estimators and samplers need. It follows later in-place changes of the parameters.
        """
        view = detached_view(self)
        view.reuses_draws = False
        for layer in view.transform.layers():
            layer.forget_others()
        return view

    def __repr__(self) -> str:
        context = f", context={tuple(self.context_shape)}" if self.context_shape else ""
        inner = "\n".join("  " + line for line in repr(self.transform).splitlines())
        return (
            f"Flow(shape={tuple(self.event_shape)}{context}, fast={self.fast!r}, base={self.base}\n"
            f"{inner}\n)"
        )
