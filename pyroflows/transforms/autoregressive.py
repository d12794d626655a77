"""Autoregressive maps, and their exact inverse with an exact gradient.

Forward is one pass of the network. The inverse solves for the features in order: a sequential
solve. A ``pyroflows.nets.sequential.SolvableNet`` (``MADE``, ``CausalConv``) does this at the price
of about two passes, any other callable is evaluated once a feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyroflows.nets.sequential import is_descending, is_solvable
from pyroflows.transforms.base import FlowTransform, Inverse
from pyroflows.transforms.families import Family
from pyroflows.transforms.implicit import with_implicit_gradient
from pyroflows.transforms.sequential import Solution, solve_compiled, solve_with_gradient


class Autoregressive(FlowTransform):
    r""":math:`y_i = g(x_i; \theta_i(x_{<i}, c))`: forward an IAF layer, its ``.inv`` a MAF layer.

    Forward costs one network call. The inverse solves for the features in order: exact, and about
    two calls' arithmetic with a net that is a ``SolvableNet`` (see ``pyroflows.nets.sequential``),
    ``features`` calls with any other. Its gradient comes from the implicit function theorem and is
    exact to first order.

    Kingma et al. 2016, arXiv:1606.04934, eq. 10; Papamakarios et al. 2017, arXiv:1705.07057, eq. 3.

    Args:
        net: ``net(x, context)`` gives ``(*batch, features, family.params)`` where the i-th row
            depends on ``x_<i`` alone.
        family: what is done to each feature.

    Raises:
        ValueError: the net is a ``MADE`` with replaced masks that cannot be solved through.

    Example:
        >>> import torch, pyroflows as pf
        >>> net = lambda x, c: torch.nn.functional.pad(x[..., :-1], (1, 0))[..., None]
        >>> layer = pf.transforms.Autoregressive(net, pf.transforms.Additive())
        >>> layer(torch.tensor([1.0, 2.0, 3.0])), layer.inv(torch.tensor([1.0, 3.0, 5.0]))
        (tensor([1., 3., 5.]), tensor([1., 2., 3.]))
    """

    fast = "sample"

    def __init__(self, net: Callable[[Tensor, Tensor | None], Tensor], family: Family) -> None:
        super().__init__()
        if hasattr(net, "check_masks"):
            net.check_masks()
        self.net = net
        self.family = family

    @property
    def volume_preserving(self) -> bool:
        """Whether the family is."""
        return self.family.volume_preserving

    def mirror(self, wider: float = 1.0, *, inverse: bool = False) -> FlowTransform:
        """A layer over a new net; its forward direction, the fast one, is to learn this map."""
        make = getattr(self.net, "untrained", None)
        net = copy.deepcopy(self.net) if make is None else make(wider if inverse else 1.0)
        return Autoregressive(net, self.family)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.family.forward(x, self.net(x, context).to(x.dtype))

    def dependencies(self) -> Tensor | None:
        """Each feature on itself and on those before it, in the order of a network that has one."""
        features = getattr(self.net, "features", None)
        if features is None:
            return None
        lower = torch.ones(features, features, dtype=torch.bool).tril()
        return lower.mT if is_descending(self.net) else lower

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One network call."""
        y, log_derivative = self._forward(x, context)
        return y, log_derivative.sum(dim=-1)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Exact; see the class for what it costs."""
        if context is not None:
            batch = torch.broadcast_shapes(y.shape[:-1], context.shape[:-1])
            y, context = y.expand(*batch, -1), context.expand(*batch, -1)
        wants_graph = torch.is_grad_enabled() and self._is_differentiable(y, context)
        net = self.net
        if not is_solvable(net):
            x, log_det = self._loop(y, context)
            return self._with_implicit_gradient(y, x, context) if wants_graph else (x, log_det)
        flat = y.reshape(-1, y.shape[-1])
        rows = None if context is None else context.reshape(-1, context.shape[-1])
        if wants_graph:
            x, log_det = solve_with_gradient(net, self.family, flat, rows)
        else:
            x, log_det, _ = solve_compiled(net, self.family, flat, rows)
        return x.reshape(y.shape), log_det.reshape(y.shape[:-1])

    def forward_with_state(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """One network call; the inverse can use its result."""
        theta = self.net(x, context).to(x.dtype)  # under autocast the net rounds, sums must not
        y, log_derivative = self.family.forward(x, theta)
        log_det = log_derivative.sum(dim=-1)
        return y, log_det, (x, log_det, theta)

    def inverse_from_state(
        self, y: Tensor, state: tuple[Tensor, Tensor, Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """No network call and no solve; backward solves once."""
        net = self.net
        if not is_solvable(net):
            return self.inverse_and_log_det(y, context)
        x, log_det, theta = (t.detach() for t in state)
        batch, features = theta.shape[:-2], y.shape[-1]
        rows = (
            None if context is None else context.expand(*batch, -1).reshape(-1, context.shape[-1])
        )
        y, x = (t.expand(*batch, features).reshape(-1, features) for t in (y, x))
        known = Solution(x, -log_det.reshape(-1), theta.reshape(-1, *theta.shape[-2:]))
        x, log_det = solve_with_gradient(net, self.family, y, rows, known)
        return x.reshape(*batch, features), log_det.reshape(batch)

    def _is_differentiable(self, y: Tensor, context: Tensor | None) -> bool:
        if y.requires_grad or (context is not None and context.requires_grad):
            return True
        if isinstance(self.net, nn.Module):
            return any(p.requires_grad for p in self.net.parameters())
        # What a plain function depends on shows in its result alone.
        return self.net(y.detach(), context).requires_grad

    @torch.no_grad()
    def plain_inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The inverse by one network call a feature, without a graph: the textbook's loop.

        It is for networks that cannot solve, and to compare a sequential solve with.
        """
        x = y.clone()
        order = range(y.shape[-1])
        for i in reversed(order) if is_descending(self.net) else order:
            x[..., i] = self.family.inverse(y, self.net(x, context))[0][..., i]
        return x

    @torch.no_grad()
    def _loop(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x`` and ``log|det dx/dy|`` by one network call a feature, without a graph."""
        x = self.plain_inverse(y, context)
        return x, self.family.inverse(y, self.net(x, context))[1].sum(dim=-1)

    def _with_implicit_gradient(
        self, y: Tensor, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The loop's solution with a graph, for any net."""

        def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            fx, log_derivative = self._forward(x, context)
            return fx, log_derivative.sum(dim=-1), log_derivative.exp()

        return with_implicit_gradient(y, x, forward)

    def extra_repr(self) -> str:
        """Family and net."""
        return f"{self.family}, {self.net}"


def autoregressive_in(part: FlowTransform) -> Autoregressive | None:
    """The autoregressive map that a part of a flow is, or is the inverse of; None for another.

    ``part.fast`` tells them apart: ``"sample"`` for an IAF layer, ``"log_prob"`` for a MAF layer.
    """
    inner = part.transform if isinstance(part, Inverse) else part
    return inner if isinstance(inner, Autoregressive) else None
