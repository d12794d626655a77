"""The start of a guide of so many numbers, tied to each other, that each is on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroflows.programs.log_density import ERRORS, LogDensity
from pyroflows.transforms.rows import Arrow, RowGaussian

_LBFGS = 200  # iterations
_PROBES = 32
_WIDEST = 10.0  # standard deviation of a number that nothing holds at the mode


def apart_start(log_p: LogDensity, start: Tensor) -> Arrow:
    r"""Each number a row of its own at the mode, whatever it depends on: a mean-field Gaussian.

    Of all Gaussians with independent numbers the nearest to one of precision H has the variances
    :math:`1 / H_{ii}`; the diagonal is estimated by products of H with random signs (Bekas,
    Kokiopoulou & Saad 2007, doi:10.1016/j.apnum.2007.01.003). Memory is linear.

    Args:
        log_p: the log-density of the model.
        start: a vector where it is finite, ``(D,)``.
    """
    loc = _mode(log_p, start)
    diagonal = torch.zeros_like(loc)
    with torch.enable_grad():
        point = loc.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_p(point), point, create_graph=True)
        for _ in range(_PROBES):
            signs = torch.randn_like(loc).sign()
            (second,) = torch.autograd.grad(
                gradient, point, signs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            diagonal -= signs * second / _PROBES
    usable = diagonal.isfinite() & (diagonal > 0)
    scale = torch.where(usable, diagonal, 1.0).rsqrt().clamp(max=_WIDEST)
    none = loc.new_zeros(len(loc), 1, 0)
    row = RowGaussian(loc[:, None], none, scale[:, None, None], none)
    return Arrow(torch.arange(len(loc)), loc[:0], loc.new_zeros(0, 0), [row])


def _mode(log_p: LogDensity, start: Tensor) -> Tensor:
    """Where L-BFGS ends, or the start if it ends nowhere."""
    point = start.clone().requires_grad_()
    search = torch.optim.LBFGS([point], max_iter=_LBFGS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = -log_p(point)
        value.backward()
        return value

    try:
        with torch.enable_grad():
            search.step(loss)
    except ERRORS:
        return start
    found = point.detach()
    return found if found.isfinite().all() else start
