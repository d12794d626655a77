"""Autoregressive maps, and their exact inverse with an exact gradient.

Forward is one pass of the network. The inverse walks the features in order; a network that owns a
``solve`` (``pyroflows.nets.MADE``) does this at the price of about two passes, any other callable
is evaluated once a feature.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.elementwise import Family


class _Implicit(torch.autograd.Function):
    """``x`` as a function of the residual ``y - f(x)``, which is zero: dx/dresidual = J^-1.

    Adding the residual's graph to the solved ``x`` gives the gradient of the implicit function
    with respect to y, the context and the weights, without unrolling the solver.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        residual: Tensor,
        x: Tensor,
        transposed_solve: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.transposed_solve = transposed_solve
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.transposed_solve(x, grad), None, None


class Autoregressive(FlowTransform):
    r""":math:`y_i = g(x_i; \theta_i(x_{<i}, c))`: forward an IAF layer, its ``.inv`` a MAF layer.

    Forward costs one network call. The inverse solves for the features in order: exact, and about
    two calls' arithmetic with a net that has ``solve``, ``features`` calls with any other. Its
    gradient comes from the implicit function theorem and is exact to first order.

    Kingma et al. 2016, arXiv:1606.04934, eq. 10; Papamakarios et al. 2017, arXiv:1705.07057, eq. 3.

    Args:
        net: ``net(x, context)`` gives ``(*batch, features, family.params)`` where the i-th row
            depends on ``x_<i`` alone.
        family: what is done to each feature.

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
        self.net = net
        self.family = family

    @property
    def volume_preserving(self) -> bool:
        """Whether the family is."""
        return self.family.volume_preserving

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.family.forward(x, self.net(x, context))

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
        x, log_det = self._solve(y, context)
        if not torch.is_grad_enabled() or not self._is_differentiable(y, context):
            return x, log_det
        residual = y - self._forward(x, context)[0]
        x = _Implicit.apply(residual, x, lambda x, g: self._transposed_solve(x, g, context))
        return x, -self.forward_and_log_det(x, context)[1]

    def _is_differentiable(self, y: Tensor, context: Tensor | None) -> bool:
        if not isinstance(self.net, nn.Module):
            return True  # what a plain function depends on cannot be seen
        sources = (y, context, *self.net.parameters())
        return any(s is not None and s.requires_grad for s in sources)

    @torch.no_grad()
    def _solve(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x`` and ``log|det dx/dy|``, without a graph."""
        flat = y.reshape(-1, y.shape[-1])
        rows = None if context is None else context.reshape(-1, context.shape[-1])
        if hasattr(self.net, "solve"):
            x, theta = self.net.solve(
                lambda i, t: self.family.inverse(flat[:, i], t)[0], flat, rows
            )
        else:
            x = flat.clone()
            for i in range(y.shape[-1]):
                x[:, i] = self.family.inverse(flat, self.net(x, rows))[0][:, i]
            theta = self.net(x, rows)
        log_det = self.family.inverse(flat, theta)[1].sum(dim=-1)
        return x.reshape(y.shape), log_det.reshape(y.shape[:-1])

    def _transposed_solve(self, x: Tensor, grad: Tensor, context: Tensor | None) -> Tensor:
        """``v`` with ``J^T v = grad`` for the Jacobian J of forward at x.

        J is a diagonal plus a strictly lower triangle, so Jacobi sweeps are exact after
        ``features`` of them and stop as soon as nothing changes any more.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y, log_derivative = self._forward(x, context)
        diagonal = log_derivative.detach().exp()
        v = grad / diagonal
        for _ in range(x.shape[-1]):
            (product,) = torch.autograd.grad(y, x, v, retain_graph=True)
            change = (grad - product) / diagonal
            v = v + change
            if not (change.abs() > torch.finfo(v.dtype).eps * v.abs()).any():
                break
        return v

    def extra_repr(self) -> str:
        """Family and net."""
        return f"{self.family}, {self.net}"
