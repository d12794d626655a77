"""The inverse of an autoregressive map by a network that is solved through, and its exact gradient.

Everything here takes a network and a family; rows are ``(rows, features)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyroflows.nets.sequential import SolvableNet, is_descending
from pyroflows.transforms.families import Family

# A compiler unrolls a solve over its features; over more than these it would take minutes.
MOST_UNROLLED = 16


class Solution(NamedTuple):
    """What a sequential solve found.

    Attributes:
        x: ``(rows, features)``.
        log_det: ``log|det dx/dy|``, ``(rows,)``.
        theta: the parameters ``(rows, features, params)``.
    """

    x: Tensor
    log_det: Tensor
    theta: Tensor


@torch.no_grad()
def solve(net: SolvableNet, family: Family, y: Tensor, context: Tensor | None) -> Solution:
    """Solve for ``x`` with ``y_i = g(x_i; theta_i(x_<i))``, without a graph."""
    columns, last = y.mT.contiguous(), y.shape[-1] - 1
    descending = is_descending(net)
    in_order = columns.flip(0) if descending else columns
    rows = columns.unbind()
    # By place in the net's order, a block at its first: one feature by feature replaces it.
    derivatives: dict[int, Tensor] = {}

    def step(i: int, theta: Tensor) -> Tensor:
        x, derivatives[last - i if descending else i] = family.inverse(rows[i], theta)
        return x

    def block_step(a: int, b: int, theta: Tensor) -> Tensor:
        x, derivatives[a] = family.inverse(in_order[a:b], theta)
        return x

    with _full_precision(y):
        x, theta = net.solve(step, y, context, block_step)
    blocks = [d if d.dim() == 2 else d[None] for d in derivatives.values()]
    return Solution(x, torch.cat(blocks).sum(dim=0), theta)


def solve_compiled(net: SolvableNet, family: Family, y: Tensor, context: Tensor | None) -> Solution:
    """The same, outside of what a compiler traces where unrolling would take it minutes."""
    if torch.compiler.is_compiling() and y.shape[-1] > MOST_UNROLLED:
        return _solve_eagerly(net, family, y, context)
    return solve(net, family, y, context)


_solve_eagerly = torch.compiler.disable(solve)


# Compilers cannot trace the derivative of what they trace, so there is a break in the graph here.
@torch.compiler.disable
def solve_with_gradient(
    net: SolvableNet,
    family: Family,
    y: Tensor,
    context: Tensor | None,
    known: Solution | None = None,
) -> tuple[Tensor, Tensor]:
    """``x`` and ``log|det dx/dy|`` with a graph; of a solution that is known already, if given."""
    found = solve(net, family, y, context) if known is None else known
    return _Solved.apply(net, family, y, context, *found, *net.weights())


class _Solved(torch.autograd.Function):
    """Puts a graph behind a solution; its gradient by solving back once.

    With ``y_i = g(x_i; theta_i(x_<i))`` and ``L = log dg/dx``, let a be the adjoint of x, and c
    that of ``-sum L``. The implicit function theorem gives y's adjoint ``v = a / g'`` and the
    parameters' ``-c dL/dtheta - v dg/dtheta``, which send on to a of the features before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        net: SolvableNet,
        family: Family,
        y: Tensor,
        context: Tensor | None,
        x: Tensor,
        log_det: Tensor,
        theta: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.net, ctx.family = net, family
        # The parameters are saved to be watched: backward reads the net's own, which must not have
        # been written to since, and a saved tensor raises where it was.
        ctx.save_for_backward(x, theta, context, *parameters)
        # Tensors of their own: those known stay as they are, and views cannot be changed in place.
        return x.clone(memory_format=torch.contiguous_format), log_det.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, context, *_ = ctx.saved_tensors
        net, descending = ctx.net, is_descending(ctx.net)
        local = _local_adjoints(ctx.family, x, theta, grad_x, grad_log_det, descending)
        v = torch.empty_like(local.of_x)

        def step(i: int, sent: Tensor, adjoint: Tensor) -> None:
            torch.mul(local.of_x[i].add_(sent), local.inverse_slope[i], out=v[i])
            torch.addcmul(local.of_theta[i], local.slope_by_theta[i], v[i], value=-1, out=adjoint)

        def block_step(first: int, last: int, sent: Tensor) -> Tensor:
            of_x, inverse_slope, of_theta, slope_by_theta = (t[first:last] for t in local)
            torch.mul(of_x + sent, inverse_slope, out=v[first:last])
            return torch.addcmul(of_theta, slope_by_theta, v[first:last, None], value=-1)

        with _full_precision(x):
            gradients, grad_context = net.solve_back(step, x, context, block_step)
        grad_y = (v.flip(0) if descending else v).mT
        return None, None, grad_y, grad_context, None, None, None, *gradients


class _Local(NamedTuple):
    """What each feature's own map contributes to solving back.

    Features come first, in the net's order, rows last.

    Attributes:
        of_x: the adjoint ``a = grad_x - c dL/dx``.
        inverse_slope: ``1 / g'``.
        of_theta: the adjoint ``-c dL/dtheta``.
        slope_by_theta: ``dg/dtheta``.
    """

    of_x: Tensor
    inverse_slope: Tensor
    of_theta: Tensor
    slope_by_theta: Tensor


def _local_adjoints(
    family: Family,
    x: Tensor,
    theta: Tensor,
    grad_x: Tensor,
    grad_log_det: Tensor,
    descending: bool,
) -> _Local:
    with torch.enable_grad():
        x, theta = x.detach().requires_grad_(), theta.detach().requires_grad_()
        y, log_derivative = family.forward(x, theta)
        (slope_by_theta,) = torch.autograd.grad(y.sum(), theta, retain_graph=True)
        of_x, of_theta = grad_x, torch.zeros_like(theta)
        if log_derivative.requires_grad:
            scored = (log_derivative * -grad_log_det[:, None]).sum()
            by_x, of_theta = torch.autograd.grad(
                scored, (x, theta), allow_unused=True, materialize_grads=True
            )
            of_x = of_x + by_x
    inverse_slope = log_derivative.detach().neg().exp()
    by_feature = (
        of_x.mT,
        inverse_slope.mT,
        of_theta.permute(1, 2, 0),
        slope_by_theta.permute(1, 2, 0),
    )
    # Clones: solving adds to the first, which may be the gradient that came in.
    found = [t.clone(memory_format=torch.contiguous_format) for t in by_feature]
    return _Local(*(t.flip(0) if descending else t for t in found))


def _full_precision(like: Tensor) -> torch.autocast:
    """Without autocast: its rounding would add up from feature to feature."""
    return torch.autocast(like.device.type, enabled=False)
