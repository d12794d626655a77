"""Gradients of what was solved for, by the implicit function theorem; Jacobians are triangular."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of x: f(x), its log-determinant and the diagonal of its Jacobian.
Forward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def with_implicit_gradient(y: Tensor, x: Tensor, forward: Forward) -> tuple[Tensor, Tensor]:
    """``x`` and ``log|det dx/dy|`` with the graph of ``y = f(x)``, exact to first order.

    Args:
        y: ``(*batch, *event)``.
        x: the solution, without a graph.
        forward: gives ``f(x)``, ``log|det dy/dx|`` and the Jacobian's diagonal, shaped as x. The
            Jacobian is that diagonal plus a strict triangle.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        fx, log_det, diagonal = forward(x)
    return _Implicit.apply(y, fx, log_det, x, diagonal.detach())


class _Implicit(torch.autograd.Function):
    """Puts the graph of ``y - f(x) = 0`` behind an ``x`` that was solved for without one.

    Takes y, and f(x) with its log-determinant as evaluated at the solution; gives x and
    ``-log_det``. Backward solves ``J^T v = dx`` once (the implicit function theorem); ``v`` is then
    y's gradient and ``-v`` that of f(x), from where autograd reaches the weights and the context.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, fx: Tensor, log_det: Tensor, x: Tensor, diagonal: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.solved = fx, log_det, x, diagonal
        return x.detach().clone(), -log_det

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        fx, log_det, x, diagonal = ctx.solved
        if log_det.requires_grad:  # x moves the log-determinant too
            grad_x = grad_x + _pulled_back(log_det, x, -grad_log_det)
        v = _solve_transposed(fx, x, grad_x, diagonal)
        return v, -v, -grad_log_det, None, None


def _solve_transposed(fx: Tensor, x: Tensor, grad: Tensor, diagonal: Tensor) -> Tensor:
    """``v`` with ``J^T v = grad`` for the Jacobian J of ``f`` at x.

    Jacobi's iteration: for a triangle exact after as many passes as an event has numbers, and
    finished as soon as nothing changes.
    """
    v = grad / diagonal
    for _ in range(x[0].numel() if len(x) else 0):
        change = (grad - _pulled_back(fx, x, v)) / diagonal
        v = v + change
        if not (change.abs() > torch.finfo(v.dtype).eps * v.abs()).any():
            break
    return v


def _pulled_back(output: Tensor, x: Tensor, sent: Tensor) -> Tensor:
    """The adjoint of x for that of an output; the graph is still needed afterwards."""
    (found,) = torch.autograd.grad(
        output, x, sent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return found
