"""The integers that discrete models are over, 0 to bins - 1, and their score in bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributions import constraints

from pyroflows._checks import checked_int


def levels(bins: int, event_dim: int) -> constraints.Constraint:
    """Events of integers from 0 to ``bins - 1``."""
    return constraints.independent(constraints.integer_interval(0, bins - 1), event_dim)


def check_levels(name: str, x: Tensor, bins: int) -> None:
    """See that these are integers from 0 to ``bins - 1``, of whatever dtype.

    Raises:
        ValueError: some are not.
    """
    bad = ~constraints.integer_interval(0, bins - 1).check(x)
    if bad.any():
        whole = "" if bool((x == x.floor()).all()) else "not all of them whole, "
        raise ValueError(
            f"{name}: expected integers from 0 to {bins - 1}, got {x.dtype} values, {whole}from "
            f"{x.min():g} to {x.max():g}: {int(bad.sum())} of {x.numel()} do not fit, the first is "
            f"{x[bad][0].item():g}; quantise them, or build the model with another bins="
        )


def to_unit(x: Tensor, bins: int) -> Tensor:
    """Levels 0 to bins - 1 as -1 to 1."""
    return x * (2 / (bins - 1)) - 1


def to_level(u: Tensor, bins: int) -> Tensor:
    """The level nearest to a number in units where levels go from -1 to 1."""
    return ((u + 1) * ((bins - 1) / 2)).round().clamp(0, bins - 1)


def bits_per_dim(
    log_prob: Any, shape: int | Sequence[int], *, bins: int | None = None, log_det: Any = 0.0
) -> Any:
    r"""A log-probability as bits per dimension: :math:`\log_2 b - (\ell + J) / (D \ln 2)`.

    Lower is better; log2 of the number of levels is what knowing nothing costs.

    Args:
        log_prob: :math:`\ell` in nats, a number or a tensor: the log-probability of integers, as
            ``pf.quantized`` and ``pf.pixelcnn`` give it, or a log-density.
        shape: of one data point, or its number of dimensions :math:`D`.
        bins: None where ``log_prob`` is of the integers; where it is the density of
            ``(x + u) / bins``, the number of levels :math:`b`.
        log_det: where it is the density of a function of that, such as its logit, the log-det
            :math:`J` of the function, in nats.

    Raises:
        ValueError: no dimensions, or less than two levels.

    Example:
        MAF's log-density of MNIST in logit space (Papamakarios et al. 2017, arXiv:1705.07057):

        >>> import pyroflows as pf
        >>> round(pf.bits_per_dim(-1300.5, (1, 28, 28), bins=256, log_det=4620.1), 2)
        1.89
    """
    dims = shape if isinstance(shape, int) else math.prod(shape)
    if dims < 1:
        raise ValueError(f"shape: expected at least one dimension, got {shape}")
    known = 0.0 if bins is None else math.log2(checked_int("bins", bins, 2))
    return known - (log_prob + log_det) / (dims * math.log(2))
