"""How far out the arithmetic of a dtype carries numbers through a flow, and how close to an edge.

A network multiplies what it reads by its weights, a log-density squares what comes out, and its
gradient multiplies that by what the network read. Where one of these overflows, infinities of both
signs meet and leave NaN, in the gradient of every parameter too. So a flow reads numbers within
limits that are far beyond any data: a number beyond is scored as if it stood there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = torch.finfo(torch.float16).max
_FARTHEST = {torch.float64: 2.0**100, torch.float16: _HALF}
_LOWEST = {torch.float64: -(2.0**512), torch.float16: -_HALF}


def farthest(dtype: torch.dtype) -> float:
    """How far out a number may be; several such and large weights have a product.

    Example:
        >>> import torch
        >>> f"{farthest(torch.float32):.1e} {farthest(torch.float64):.1e}"
        '4.3e+09 1.3e+30'
    """
    return _FARTHEST.get(dtype, 2.0**32)


def closest(dtype: torch.dtype) -> float:
    """How near zero a number may be whose reciprocal is multiplied by large ones.

    Example:
        >>> import torch
        >>> f"{closest(torch.float32):.1e} {closest(torch.float64):.1e}"
        '5.8e-33 3.1e-262'
    """
    return torch.finfo(dtype).tiny ** 0.85


def within_limits(x: Tensor) -> Tensor:
    """``x``, with numbers beyond ``farthest`` moved there; NaN stays, and so do integers.

    Example:
        >>> import torch
        >>> within_limits(torch.tensor([2.0, 3.4e38, -torch.inf]))
        tensor([ 2.0000e+00,  4.2950e+09, -4.2950e+09])
    """
    if not x.is_floating_point():
        return x
    limit = farthest(x.dtype)
    return x.clamp(-limit, limit)


def lowest(dtype: torch.dtype) -> float:
    """The log-density below which a gradient may not be a number.

    That of a square of z in a weight is the square times what the weight has multiplied.

    Example:
        >>> import torch
        >>> f"{lowest(torch.float32):.1e} {lowest(torch.float64):.1e}"
        '-1.8e+19 -1.3e+154'
    """
    return _LOWEST.get(dtype, -(2.0**64))


def refused(log_prob: Tensor) -> Tensor:
    """Log-densities, minus infinity from ``lowest`` on.

    Example:
        >>> import torch
        >>> refused(torch.tensor([-5.0, -1e20]))
        tensor([-5., -inf])
    """
    return torch.threshold(log_prob, lowest(log_prob.dtype), -torch.inf)


def off_zero(x: Tensor) -> Tensor:
    """``x``, with numbers nearer zero than ``closest`` moved there, a zero to the positive side.

    Example:
        >>> import torch
        >>> off_zero(torch.tensor([0.0, -1e-40, 0.5]))
        tensor([ 5.7503e-33, -5.7503e-33,  5.0000e-01])
    """
    limit = torch.full_like(x, closest(x.dtype))
    return torch.where(x.abs() < limit, torch.where(x < 0, -limit, limit), x)
