"""Einsum of log-densities, a backend of ``opt_einsum``, with derivatives of any order under vmap.

Pyro's own goes through an ``autograd.Function`` that torch.func cannot batch.
"""

from __future__ import annotations

import functools
import operator

import torch
from pyro.ops.einsum.util import Tensordot
from torch import Tensor


def transpose(a: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The tensor with its dimensions in another order."""
    return a.permute(axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """The logarithm of the einsum of the operands' exponentials."""
    inputs, output = equation.split("->")
    summed = "".join(sorted(set(inputs) - set(output) - {","}))
    symbols = output + summed
    aligned = [
        _aligned(a, dims, symbols) for a, dims in zip(operands, inputs.split(","), strict=True)
    ]
    total = functools.reduce(operator.add, aligned)
    if not summed:
        return total.clone()  # an object of its own, since names are written on it
    over = tuple(range(len(output), len(symbols)))
    # Where all terms are zero neither the logarithm nor its derivatives may become NaN.
    shift = total.detach().amax(over, keepdim=True).clamp(min=torch.finfo(total.dtype).min)
    mass = (total - shift).exp().sum(over)
    is_zero = mass == 0
    log = torch.where(is_zero, torch.ones_like(mass), mass).log() + shift.squeeze(over)
    return torch.where(is_zero, -torch.inf, log)


def _aligned(operand: Tensor, dims: str, symbols: str) -> Tensor:
    """The operand with a dimension for each symbol, of size one where it has none."""
    order = [dims.index(symbol) for symbol in symbols if symbol in dims]
    shape = iter(operand.permute(order).shape)
    return operand.permute(order).reshape([next(shape) if s in dims else 1 for s in symbols])


tensordot = Tensordot(einsum)
