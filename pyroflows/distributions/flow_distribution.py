"""What calling a flow returns: torch's ``TransformedDistribution``, which draws and scores at once.

It keeps the one memory from a draw to its log-density.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyroflows._checks import as_size
from pyroflows._pyro.memo import Memo
from pyroflows.distributions.pieces import Piece, in_pieces, part_of, rows_at_once
from pyroflows.transforms.base import Conditioned, FlowTransform
from pyroflows.transforms.limits import refused

Run = Callable[[Tensor, FlowTransform, Distribution], tuple[Tensor, ...]]


class Detachable(Protocol):
    """An owner of draws that has a view whose parameters are detached: a ``Flow``."""

    def detached(self) -> Callable[..., FlowDistribution]:
        """The view."""


class FlowDistribution(dist.TransformedDistribution):
    """What calling a ``Flow`` returns: a Pyro distribution on the flow's parameters as they are.

    Scoring a value that it drew reuses the log-density computed while drawing, if nothing changed
    in between and that saves a solve or a second graph; the result then has the gradient of the
    draw's parameters but is not a function of the draw in the graph. ``Flow.detached()`` gives a
    view that never does so.

    Log-densities are in nats, of shape ``(*sample, *batch)``.

    Args:
        base: base distribution; its batch shape is the distribution's.
        transform: the flow's transform, conditioned if it is conditional.
        event_shape: shape of one data point.
        owner: the module whose parameters decide; None to score its draws like any other value.
        validate_args: as everywhere in torch.
        batch_shape: what the base is expanded to, if not as it is.

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
        batch_shape: Size | None = None,
    ) -> None:
        # torch's constructor composes and probes all shapes; the flow knows them.
        self._row_base = base
        self.base_dist = base if batch_shape is None else base.expand(batch_shape)
        self.transforms = [transform]
        self._owner = owner
        self._memo = Memo()
        batch = self.base_dist.batch_shape
        Distribution.__init__(self, batch, event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """The same flow with a larger batch, sharing the memory of draws."""
        new = FlowDistribution(
            self._row_base,
            self.transforms[0],
            self.event_shape,
            self._owner,
            validate_args=False,
            batch_shape=Size(batch_shape),
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
        z = self.base_dist.rsample(as_size(sample_shape))
        return self._push(z)

    def rsample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Differentiable draws ``(*sample, *batch, *event)``."""
        return self.rsample_and_log_prob(sample_shape)[0]

    @torch.no_grad()
    def sample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Draws ``(*sample, *batch, *event)`` without a graph."""
        return self._push(self.base_dist.sample(as_size(sample_shape)))[0]

    def _push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        transform = self.transforms[0]
        # Only path_log_prob reads where a draw came from, and in grad mode alone.
        if self._owner is not None and torch.is_grad_enabled():
            x, log_det, state = transform.forward_with_state(z)
            log_prob = _score(self._row_base, z) - log_det
        else:
            x, log_prob = self._in_pieces(_pushed, z, len(self.base_dist.event_shape))
            state = None
        if self._owner is not None and self._memo_pays():
            # An alias: the log-density's graph may hold x and must not keep its own key alive.
            x = x.view_as(x)
            self._memo.put(x, (log_prob, state), self._owner, *self._given())
        return x, log_prob

    def _memo_pays(self) -> bool:
        """Whether scoring a draw would cost a solve, or a second graph through the networks."""
        return torch.is_grad_enabled() or self.transforms[0].fast in ("sample", "neither")

    def _in_pieces(self, run: Run, value: Tensor, event_dim: int) -> tuple[Tensor, ...]:
        """``run`` on a value ``(*batch, *event)``, in pieces where there is no graph to keep."""
        transform, base = self.transforms[0], self._row_base
        batch = value.shape[: value.dim() - event_dim]
        most = rows_at_once(self.event_shape, value.device)
        if batch.numel() <= most or not _is_by_row(transform, base):
            return run(value, transform, base)
        return in_pieces(
            lambda piece: run(part_of(value, piece, event_dim), _at(transform, piece), base),
            batch,
            most,
        )

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
        return self._in_pieces(_scored, value, event_dim)[0]

    def path_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` in nats as a function of the value alone, of shape ``batch``.

        The parameters and the context are held fixed, so the gradient is that along the path of a
        draw: what lower-variance estimators of an ELBO's gradient need (Roeder et al. 2017,
        arXiv:1703.09194). A value that was drawn here costs no inversion, also for an IAF.
        """
        if self._owner is None or not torch.is_grad_enabled():
            return self.log_prob(value)
        remembered = self._memo.get(value, self._owner, *self._given())
        context = [c.detach() for c in self._given()]
        view = cast("Detachable", self._owner).detached()
        fixed = view(*context, validate_args=False)
        if remembered is None:
            return fixed.expand(self.batch_shape).log_prob(value)
        z, log_det = fixed.transforms[0].inverse_from_state(value, remembered[1])
        return fixed.base_dist.log_prob(z) + log_det

    def clear_cache(self) -> None:
        """Forget the draws; what layers keep of their weights is not touched."""
        self._memo.clear()

    def __repr__(self) -> str:
        return (
            f"FlowDistribution(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)})"
        )


def _pushed(z: Tensor, transform: FlowTransform, base: Distribution) -> tuple[Tensor, Tensor]:
    x, log_det = transform.forward_and_log_det(z)
    return x, _score(base, z) - log_det


def _scored(x: Tensor, transform: FlowTransform, base: Distribution) -> tuple[Tensor]:
    z, log_det = transform.inverse_and_log_det(transform.within_limits(x))
    return (refused(_score(base, z) + log_det),)


def _score(base: Distribution, z: Tensor) -> Tensor:
    if z.numel():
        return base.log_prob(z)
    # torch's Independent cannot sum over an empty tensor.
    return z.new_zeros(z.shape[: z.dim() - len(base.event_shape)])


def _is_by_row(transform: FlowTransform, base: Distribution) -> bool:
    """Whether nothing that is out of sight of ``_at`` has a batch shape of its own."""
    inner = (t for t in transform.layers() if isinstance(t, Conditioned) and t is not transform)
    return not base.batch_shape and all(t.context.dim() == t.context_dim for t in inner)


def _at(transform: FlowTransform, piece: Piece) -> FlowTransform:
    """The transform for a piece of a batch."""
    if not isinstance(transform, Conditioned):
        return transform
    context = part_of(transform.context, piece, transform.context_dim)
    return Conditioned(transform.transform, context, transform.context_dim)
