"""A flow is a module whose call is a distribution: ``Flow``, and what its call returns.

``FlowDistribution`` is torch's ``TransformedDistribution`` with a fused sample-and-score and the
one memory from a draw to its log-density. ``Flow`` owns parameters and builds distributions from
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyroflows._checks import context_shape
from pyroflows._pyro.memo import Memo
from pyroflows._pyro.store import Synced
from pyroflows.base_distribution import Base
from pyroflows.transforms.base import DIRECTIONS, Conditioned, FlowTransform

_ROWS = 2000  # of a draw that go through the transform at once: their hidden units fit a cache


def _size(shape: int | Sequence[int]) -> Size:
    """A number of draws, or a shape of draws."""
    return Size([shape] if isinstance(shape, int) else shape)


class FlowDistribution(dist.TransformedDistribution):
    """What calling a ``Flow`` returns: a Pyro distribution on the flow's parameters as they are.

    Scoring its own draw reuses the log-density computed while drawing, as long as nothing changed
    in between; the result then has the gradient of the draw's parameters but is not a function of
    the draw in the graph. ``Flow.detached()`` gives a view that never does so.

    Log-densities are in nats, of shape ``(*sample, *batch)``.

    Args:
        base: base distribution; its batch shape is the distribution's.
        transform: the flow's transform, conditioned if it is conditional.
        event_shape: shape of one data point.
        owner: the module whose parameters decide; None to score own draws like any other value.
        validate_args: as everywhere in torch.

    Example:
        >>> import torch, pyroflows as pf
        >>> q = pf.iaf(2, layers=1, hidden=(8,))()
        >>> x, log_q = q.rsample_and_log_prob((5,))
        >>> x.shape, log_q.shape, torch.equal(q.log_prob(x), log_q)
        (torch.Size([5, 2]), torch.Size([5]), True)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        base: Distribution,
        transform: FlowTransform,
        event_shape: Size,
        owner: nn.Module | None = None,
        validate_args: bool | None = None,
    ) -> None:
        # torch's constructor composes and probes all shapes; the flow knows them.
        self.base_dist = base
        self.transforms = [transform]
        self._owner = owner
        self._memo = Memo()
        Distribution.__init__(self, base.batch_shape, event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """The same flow with a larger batch, sharing the memory of draws."""
        batch_shape = Size(batch_shape)
        new = FlowDistribution(
            self.base_dist.expand(batch_shape),
            self.transforms[0],
            self.event_shape,
            self._owner,
            validate_args=False,
        )
        new._memo = self._memo
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """What a data point may be."""
        return self.transforms[0].codomain

    @property
    def has_rsample(self) -> bool:
        """Whether draws are differentiable: the base decides."""
        return self.base_dist.has_rsample

    def rsample_and_log_prob(self, sample_shape: int | Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Differentiable draws ``(*sample, *batch, *event)`` and their log-densities in nats."""
        z = self.base_dist.rsample(_size(sample_shape))
        return self._push(z)

    def rsample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Differentiable draws ``(*sample, *batch, *event)``."""
        return self.rsample_and_log_prob(sample_shape)[0]

    @torch.no_grad()
    def sample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Draws ``(*sample, *batch, *event)`` without a graph."""
        return self._push(self.base_dist.sample(_size(sample_shape)))[0]

    def _push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        transform = self.transforms[0]
        # Only path_log_prob reads where a draw came from, and in grad mode alone.
        if self._owner is not None and torch.is_grad_enabled():
            x, log_det, at = transform.forward_at(z)
        else:
            pieces = [transform.forward_and_log_det(part) for part in self._pieces(z)]
            x, log_det = pieces[0]
            if len(pieces) > 1:
                x, log_det = (torch.cat(found) for found in zip(*pieces, strict=True))
            at = None
        log_prob = self._base_log_prob(z) - log_det
        if self._owner is None:
            return x, log_prob
        # An alias: the log-density's graph may hold x and must not keep its own key alive.
        x = x.view_as(x)
        self._memo.put(x, (log_prob, at), self._owner, *self._given())
        return x, log_prob

    def _pieces(self, z: Tensor) -> Sequence[Tensor]:
        """Many rows in pieces where one pass is bound by memory: on a CPU, without a graph."""
        sampled = z.dim() > len(self.batch_shape) + len(self.base_dist.event_shape)
        if not sampled or len(z) <= _ROWS or z.device.type != "cpu" or torch.is_grad_enabled():
            return [z]
        # A walk is bound by its calls: the fewer the better.
        walks = self.transforms[0].fast == "log_prob"
        return [z] if walks or torch.compiler.is_compiling() else z.split(_ROWS)

    def _base_log_prob(self, z: Tensor) -> Tensor:
        if z.numel():
            return self.base_dist.log_prob(z)
        # torch's Independent cannot sum over an empty tensor.
        return z.new_zeros(z.shape[: z.dim() - len(self.base_dist.event_shape)])

    def _given(self) -> tuple[Tensor, ...]:
        """What the density depends on besides the owner's parameters."""
        transform = self.transforms[0]
        return (transform.context,) if isinstance(transform, Conditioned) else ()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, of shape ``(*sample, *batch)``."""
        # torch's vector constraints cannot check an empty tensor.
        if self._validate_args and not (isinstance(value, Tensor) and not value.numel()):
            self._validate_sample(value)
        event_dim = len(self.event_shape)
        batch = value.shape[: value.dim() - event_dim]
        if self.batch_shape:
            batch = torch.broadcast_shapes(batch, self.batch_shape)
        if self._owner is not None:
            remembered = self._memo.get(value, self._owner, *self._given())
            if remembered is not None:
                return remembered[0].expand(batch)  # an expanded copy may score a smaller draw
        value = value.expand(batch + self.event_shape)
        z, log_det = self.transforms[0].inverse_and_log_det(value)
        return self._base_log_prob(z) + log_det

    def path_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` in nats as a function of the value alone, of shape ``batch``.

        The parameters and the context are held fixed, so the gradient is that along the path of a
        draw: what lower-variance estimators of an ELBO's gradient need (Roeder et al. 2017,
        arXiv:1703.09194). An own draw costs no inversion, also for an IAF.
        """
        if self._owner is None or not torch.is_grad_enabled():
            return self.log_prob(value)
        remembered = self._memo.get(value, self._owner, *self._given())
        context = [c.detach() for c in self._given()]
        fixed = self._owner.detached()(*context, validate_args=False)
        if remembered is None:
            return fixed.expand(self.batch_shape).log_prob(value)
        z, log_det = fixed.transforms[0].inverse_at(value, remembered[1])
        return fixed.base_dist.log_prob(z) + log_det

    def clear_cache(self) -> None:
        """Forget the draws; what layers keep of their weights is not touched."""
        self._memo.clear()

    def __repr__(self) -> str:
        return (
            f"FlowDistribution(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)})"
        )


class Flow(Synced):
    """A module whose call is a distribution: ``flow()`` or ``flow(context)``.

    The call is cheap and mutates nothing. Everything Pyro does with a distribution works with it;
    as a module it trains under ``SVI`` and ``ELBOModule``, as attribute of a ``PyroModule``, under
    ``pyro.module`` or on its own.

    Write to its parameters under ``torch.no_grad()`` (optimisers, ``copy_``, ``load_state_dict``),
    not to their ``.data``: what is kept for own draws, and in eval mode of masked weights, may not
    notice the latter.

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
        self._reuses_draws = True
        self._check_shape()

    @torch.no_grad()
    def _check_shape(self) -> None:
        """Try one row in the fast direction, where that needs no knowledge of the support."""
        transform, context = self.transform, None
        if self.context_shape:
            context = torch.zeros(1, *self.context_shape)
        shape = transform.inverse_shape(self.event_shape)
        step = transform.forward_and_log_det
        if transform.fast == "log_prob":
            if shape != self.event_shape or transform.codomain is not constraints.real_vector:
                return
            step = transform.inverse_and_log_det
        tensors = (*self.parameters(), *self.buffers())
        like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
        context = None if context is None else context.to(like)
        try:
            got = step(like.new_zeros(1, *shape), context)[0].shape[1:]
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            got = error
        if got != self.event_shape:
            raise ValueError(
                f"shape: the transform does not take events of shape {tuple(self.event_shape)} "
                f"with context {tuple(self.context_shape)} ({got})"
            )

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
        base, transform = self.base(), self.transform
        if context is not None or self.context_shape:
            batch = self._context_batch(context)
            base = base.expand(batch) if batch != base.batch_shape else base
            transform = Conditioned(transform, context, len(self.context_shape))
        owner = self if self._reuses_draws else None
        return FlowDistribution(base, transform, self.event_shape, owner, validate_args)

    def _context_batch(self, context: Any) -> Size:
        wanted = tuple(self.context_shape)
        if wanted and isinstance(context, Tensor):
            cut = context.dim() - len(wanted)
            if cut >= 0 and tuple(context.shape[cut:]) == wanted:
                return context.shape[:cut]
        came = "None" if context is None else type(context).__name__
        if isinstance(context, Tensor):
            came = f"a tensor of shape {tuple(context.shape)}"
        if wanted:
            shape = f"(*batch, {', '.join(map(str, wanted))})"
            raise ValueError(f"context: this flow needs one of shape {shape}, got {came}")
        raise ValueError(
            f"context: this flow takes none, got {came}; build it with context=..., and ask for "
            "draws by sample(shape)"
        )

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of ``(*batch, *shape)`` in nats."""
        return self(context).log_prob(x)

    def sample(self, shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Draws ``(*shape, *context batch, *event)`` without a graph."""
        return self(context).sample(_size(shape))

    def rsample(self, shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Differentiable draws ``(*shape, *context batch, *event)``."""
        return self(context).rsample(_size(shape))

    def rsample_and_log_prob(
        self, shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Differentiable draws and their log-densities in nats, in one go."""
        return self(context).rsample_and_log_prob(_size(shape))

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set its data-dependent layers; ``pf.initialize``, which checks the data, calls this."""
        self.transform.initialize(x, context)

    def detached(self) -> Flow:
        """A view with the same values, detached parameters and no memory of draws.

        Its ``log_prob(x)`` is a function of ``x`` alone, also for its own draws: what path-gradient
        estimators and samplers need. It follows later in-place changes of the parameters.
        """
        view = _detached(self)
        view._reuses_draws = False
        return view

    def __repr__(self) -> str:
        context = f", context={tuple(self.context_shape)}" if self.context_shape else ""
        inner = "\n".join("  " + line for line in repr(self.transform).splitlines())
        return (
            f"Flow(shape={tuple(self.event_shape)}{context}, fast={self.fast!r}, base={self.base}\n"
            f"{inner}\n)"
        )


def _detached(module: nn.Module) -> Any:
    """A copy of the module tree that shares all tensors, parameters detached."""
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    if isinstance(module, FlowTransform):
        view.__dict__.update(_inv=None, _memo=Memo(size=1))
    # What a compiler put in a method's place is bound to the module, with its parameters.
    for derived in ("_cached", "_members", *DIRECTIONS):
        view.__dict__.pop(derived, None)
    parameters = module._parameters.items()
    view._parameters = {k: None if p is None else p.detach() for k, p in parameters}
    view._buffers = dict(module._buffers)
    view._modules = {k: None if m is None else _detached(m) for k, m in module._modules.items()}
    return view
