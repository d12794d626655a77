"""Autoregressive maps, and their exact inverse with an exact gradient.

Forward is one pass of the network. The inverse solves for the features in order: a sequential
solve. A ``pyroflows.nets.sequential.SolvableNet`` (``MADE``, ``CausalConv``) does this at the price
of about two passes, any other callable is evaluated once a feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyroflows.nets.sequential import is_solvable
from pyroflows.transforms.base import FlowTransform, Inverse
from pyroflows.transforms.families import Family
from pyroflows.transforms.implicit import with_implicit_gradient

# A compiler unrolls a solve over its features; over more than these it would take minutes.
MOST_UNROLLED = 16


class _Solved(torch.autograd.Function):
    """The inverse by a net that solves; its gradient by solving back once.

    With ``y_i = g(x_i; theta_i(x_<i))`` and ``L = log dg/dx``, let a be the adjoint of x, and c
    that of ``-sum L``. The implicit function theorem gives y's adjoint ``v = a / g'`` and the
    parameters' ``-c dL/dtheta - v dg/dtheta``, which send on to a of the features before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: Autoregressive,
        y: Tensor,
        context: Tensor | None,
        known: tuple[Tensor, Tensor, Tensor] | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, log_det, theta = layer.solved(y, context) if known is None else known
        ctx.layer = layer
        # The parameters are saved to be watched: backward reads the net's own, which must not have
        # been written to since, and a saved tensor raises where it was.
        ctx.save_for_backward(x, theta, context, *parameters)
        # Tensors of their own: those known stay as they are, and views cannot be changed in place.
        return x.clone(memory_format=torch.contiguous_format), log_det.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, context, *_ = ctx.saved_tensors
        a, inverse_slope, own, pull = _local(ctx.layer, x, theta, grad_x, grad_log_det)
        v, net = torch.empty_like(a), ctx.layer.net

        def step(i: int, sent: Tensor, adjoint: Tensor) -> None:
            torch.mul(a[i].add_(sent), inverse_slope[i], out=v[i])
            torch.addcmul(own[i], pull[i], v[i], value=-1, out=adjoint)

        def block_step(first: int, last: int, sent: Tensor) -> Tensor:
            block = slice(first, last)
            torch.mul(a[block] + sent, inverse_slope[block], out=v[block])
            return torch.addcmul(own[block], pull[block], v[block, None], value=-1)

        with _full_precision(x):
            gradients, grad_context = net.solve_back(step, x, context, block_step)
        return None, (v.flip(0) if _descending(net) else v).mT, grad_context, None, *gradients


# Compilers cannot trace the derivative of what they trace, so there is a break in the graph here.
@torch.compiler.disable
def _with_graph(
    layer: Autoregressive,
    y: Tensor,
    context: Tensor | None,
    known: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    return _Solved.apply(layer, y, context, known, *layer.net.weights())


@torch.compiler.disable
def _eagerly(
    layer: Autoregressive, y: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return layer.solved(y, context)


def _local(
    layer: Autoregressive, x: Tensor, theta: Tensor, grad_x: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, ...]:
    """What each feature's own map contributes to solving back.

    Features come first, in the net's order, rows last. Gives ``a = grad_x - c dL/dx``, ``1 / g'``,
    ``-c dL/dtheta`` and ``dg/dtheta``.
    """
    with torch.enable_grad():
        x, theta = x.detach().requires_grad_(), theta.detach().requires_grad_()
        y, log_derivative = layer.family.forward(x, theta)
        (pull,) = torch.autograd.grad(y.sum(), theta, retain_graph=True)
        a, own = grad_x, torch.zeros_like(theta)
        if log_derivative.requires_grad:
            scored = (log_derivative * -grad_log_det[:, None]).sum()
            by_x, own = torch.autograd.grad(
                scored, (x, theta), allow_unused=True, materialize_grads=True
            )
            a = a + by_x
    inverse_slope = log_derivative.detach().neg().exp()
    parts = a.mT, inverse_slope.mT, own.permute(1, 2, 0), pull.permute(1, 2, 0)
    # Clones: the solve adds to the first, which may be the gradient that came in.
    found = tuple(t.clone(memory_format=torch.contiguous_format) for t in parts)
    return tuple(t.flip(0) for t in found) if _descending(layer.net) else found


def _full_precision(like: Tensor) -> torch.autocast:
    """Without autocast: its rounding would add up from feature to feature."""
    return torch.autocast(like.device.type, enabled=False)


def _descending(net: Any) -> bool:
    """Whether the net takes the last feature first."""
    return getattr(net, "descending", False)


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

    net: Any  # a plain function, or a module that is a SolvableNet

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
        return lower.mT if _descending(self.net) else lower

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
        if not is_solvable(self.net):
            x, log_det = self._loop(y, context)
            return self._with_implicit_gradient(y, x, context) if wants_graph else (x, log_det)
        flat = y.reshape(-1, y.shape[-1])
        rows = None if context is None else context.reshape(-1, context.shape[-1])
        if wants_graph:
            x, log_det = _with_graph(self, flat, rows)
        elif torch.compiler.is_compiling() and y.shape[-1] > MOST_UNROLLED:
            x, log_det, _ = _eagerly(self, flat, rows)
        else:
            x, log_det, _ = self.solved(flat, rows)
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
        if not is_solvable(self.net):
            return self.inverse_and_log_det(y, context)
        x, log_det, theta = (t.detach() for t in state)
        batch, features = theta.shape[:-2], y.shape[-1]
        rows = (
            None if context is None else context.expand(*batch, -1).reshape(-1, context.shape[-1])
        )
        y, x = (t.expand(*batch, features).reshape(-1, features) for t in (y, x))
        known = x, -log_det.reshape(-1), theta.reshape(-1, *theta.shape[-2:])
        x, log_det = _with_graph(self, y, rows, known)
        return x.reshape(*batch, features), log_det.reshape(batch)

    def _is_differentiable(self, y: Tensor, context: Tensor | None) -> bool:
        # What a plain function depends on shows in its result alone.
        if y.requires_grad or (context is not None and context.requires_grad):
            return True
        is_module = isinstance(self.net, nn.Module)
        hidden = self.net.parameters() if is_module else [self.net(y.detach(), context)]
        return any(s.requires_grad for s in hidden)

    @torch.no_grad()
    def solved(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``x``, ``log|det dx/dy|`` and the parameters of ``(rows, features)``, without a graph."""
        columns, last = y.mT.contiguous(), y.shape[-1] - 1
        descending = _descending(self.net)
        in_order = columns.flip(0) if descending else columns
        rows = columns.unbind()
        # By place in the net's order, a block at its first: one feature by feature replaces it.
        derivatives: dict[int, Tensor] = {}

        def step(i: int, theta: Tensor) -> Tensor:
            x, derivatives[last - i if descending else i] = self.family.inverse(rows[i], theta)
            return x

        def block_step(a: int, b: int, theta: Tensor) -> Tensor:
            x, derivatives[a] = self.family.inverse(in_order[a:b], theta)
            return x

        with _full_precision(y):
            x, theta = self.net.solve(step, y, context, block_step)
        blocks = [d if d.dim() == 2 else d[None] for d in derivatives.values()]
        return x, torch.cat(blocks).sum(dim=0), theta

    @torch.no_grad()
    def plain_inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The inverse by one network call a feature, without a graph: the textbook's loop.

        It is for networks that cannot solve, and to compare a sequential solve with.
        """
        x = y.clone()
        order = range(y.shape[-1])
        for i in reversed(order) if _descending(self.net) else order:
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
