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
from pyroflows.transforms.base import Conditioned, FlowTransform

_ROWS = 2000  # of a draw that go through the transform at once: their hidden units fit a cache


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
        else:
            pieces = [transform.forward_and_log_det(part) for part in self._pieces(z)]
            x, log_det = pieces[0]
            if len(pieces) > 1:
                x, log_det = (torch.cat(found) for found in zip(*pieces, strict=True))
            state = None
        log_prob = self._base_log_prob(z) - log_det
        if self._owner is not None and self._memo_pays():
            # An alias: the log-density's graph may hold x and must not keep its own key alive.
            x = x.view_as(x)
            self._memo.put(x, (log_prob, state), self._owner, *self._given())
        return x, log_prob

    def _memo_pays(self) -> bool:
        """Whether scoring a draw would cost a solve, or a second graph through the networks."""
        return torch.is_grad_enabled() or self.transforms[0].fast in ("sample", "neither")

    def _pieces(self, z: Tensor) -> Sequence[Tensor]:
        """Many rows in pieces where one pass is bound by memory: on a CPU, without a graph."""
        sampled = z.dim() > len(self.batch_shape) + len(self.base_dist.event_shape)
        if not sampled or len(z) <= _ROWS or z.device.type != "cpu" or torch.is_grad_enabled():
            return [z]
        # A sequential solve is bound by the number of its calls, so it takes all rows at once.
        solves = self.transforms[0].fast == "log_prob"
        return [z] if solves or torch.compiler.is_compiling() else z.split(_ROWS)

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
