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
    """Puts the graph of ``y - f(x) = 0`` behind an ``x`` that was solved for without one.

    Takes y, and f(x) with its log-determinant as evaluated at the solution; gives x and
    ``-log_det``. Backward solves ``J^T v = dx`` once (the implicit function theorem); ``v`` is then
    y's gradient and ``-v`` that of f(x), from where autograd reaches the weights and the context.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        y: Tensor,
        fx: Tensor,
        log_det: Tensor,
        x: Tensor,
        transposed_solve: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        ctx.transposed_solve = transposed_solve
        return x.detach().clone(), -log_det

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_x: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        v = ctx.transposed_solve(grad_x, -grad_log_det)
        return v, -v, -grad_log_det, None, None


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
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            theta = self.net(at, context)
            fx, log_derivative = self.family.forward(at, theta)
            log_det = log_derivative.sum(dim=-1)

        def transposed_solve(grad_x: Tensor, grad_log_det: Tensor) -> Tensor:
            if log_det.requires_grad:  # x moves the log-determinant too
                grad_x = (
                    grad_x + torch.autograd.grad(log_det, at, grad_log_det, retain_graph=True)[0]
                )
            return self._transposed_solve(at.detach(), theta.detach(), grad_x, context)

        return _Implicit.apply(y, fx, log_det, x, transposed_solve)

    def _is_differentiable(self, y: Tensor, context: Tensor | None) -> bool:
        # What a plain function depends on shows in its result alone.
        is_module = isinstance(self.net, nn.Module)
        hidden = self.net.parameters() if is_module else [self.net(y.detach(), context)]
        return any(s is not None and s.requires_grad for s in (y, context, *hidden))

    @torch.no_grad()
    def _solve(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x`` and ``log|det dx/dy|``, without a graph."""
        flat = y.reshape(-1, y.shape[-1])
        rows = None if context is None else context.reshape(-1, context.shape[-1])
        if hasattr(self.net, "solve"):
            columns = flat.mT.contiguous()
            log_det = flat.new_zeros(len(flat))

            def step(i: int, theta: Tensor) -> Tensor:
                x, log_derivative = self.family.inverse(columns[i], theta)
                log_det.add_(log_derivative)
                return x

            x, _ = self.net.solve(step, flat, rows)
        else:
            x = flat.clone()
            for i in range(y.shape[-1]):
                x[:, i] = self.family.inverse(flat, self.net(x, rows))[0][:, i]
            log_det = self.family.inverse(flat, self.net(x, rows))[1].sum(dim=-1)
        return x.reshape(y.shape), log_det.reshape(y.shape[:-1])

    def _transposed_solve(
        self, x: Tensor, theta: Tensor, grad: Tensor, context: Tensor | None
    ) -> Tensor:
        """``v`` with ``J^T v = grad`` for the Jacobian J of forward at x."""
        with torch.enable_grad():
            leaf = theta.requires_grad_()
            y, log_derivative = self.family.forward(x, leaf)
            (pull,) = torch.autograd.grad(y.sum(), leaf)
        slope = log_derivative.detach().exp()
        if not hasattr(self.net, "transposed_solve"):
            return self._sweep(x, grad, slope, context)
        rows = None if context is None else context.detach().reshape(-1, context.shape[-1])
        flat = (t.reshape(-1, t.shape[-1]) for t in (grad, slope))
        v = self.net.transposed_solve(
            x.reshape(-1, x.shape[-1]), rows, *flat, pull.reshape(-1, *pull.shape[-2:])
        )
        return v.reshape(x.shape)

    def _sweep(self, x: Tensor, grad: Tensor, slope: Tensor, context: Tensor | None) -> Tensor:
        """The same for any net: J is a diagonal plus a strictly lower triangle.

        So Jacobi sweeps are exact after ``features`` of them, and may stop once nothing changes.
        """
        with torch.enable_grad():
            x = x.requires_grad_()
            y = self._forward(x, context)[0]
        v = grad / slope
        for _ in range(x.shape[-1]):
            (product,) = torch.autograd.grad(y, x, v, retain_graph=True)
            change = (grad - product) / slope
            v = v + change
            if not (change.abs() > torch.finfo(v.dtype).eps * v.abs()).any():
                break
        return v

    def extra_repr(self) -> str:
        """Family and net."""
        return f"{self.family}, {self.net}"
