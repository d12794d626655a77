"""Arguments that have to be numbers, or of a shape: else a ``ValueError`` that names them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Size, Tensor


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, in 64 bits if it is whole, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return False
    return not isinstance(value, Integral) or abs(int(value)) < 2**63


def to_builtin(value: Any) -> Any:
    """A number as Python's own, such as a checkpoint can hold; anything else as it is.

    Example:
        >>> import numpy as np
        >>> to_builtin(np.int64(3)), to_builtin(np.float32(0.5)), to_builtin(True), to_builtin(None)
        (3, 0.5, True, None)
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_whole(least: int, **values: Any) -> None:
    """See that these are integers from ``least`` on, below ``2**63``.

    Args:
        least: the smallest that will do.
        **values: by the argument's name.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        checked_int(name, value, least)


def checked_int(name: str, value: int, least: int = 1, why: str = "") -> int:
    """``value`` as Python's own integer, if it is one of at least ``least``, below ``2**63``.

    Args:
        name: the argument's, for the error.
        value: of the argument.
        least: the smallest that will do.
        why: what asks for so many, for the error.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}{why}, got {value!r}")
    if not is_number(value):
        raise ValueError(f"{name}: expected an integer of 64 bits, got {value!r}")
    return int(value)


def checked_ints(name: str, values: Sequence[int], fewest: int = 1) -> tuple[int, ...]:
    """``values`` as a tuple, if they are positive integers.

    Args:
        name: the argument's, for the error.
        values: of the argument.
        fewest: how many there have to be.

    Raises:
        ValueError: they are not, or too few, or no sequence.

    Example:
        >>> checked_ints("hidden", [8, 8])
        (8, 8)
    """
    sequence = isinstance(values, Sequence) and not isinstance(values, str)
    numbers = list(values) if sequence else []
    fits = all(isinstance(v, Integral) and is_number(v) and v > 0 for v in numbers)
    if not sequence or not fits or len(numbers) < fewest:
        raise ValueError(f"{name}: expected a tuple of positive integers, got {values!r}")
    return tuple(int(v) for v in numbers)


def context_shape(context: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one context, given as that or as a width; ``()`` where there is none.

    Example:
        >>> context_shape(3), context_shape((1, 8, 8)), context_shape(0)
        ((3,), (1, 8, 8), ())
    """
    if isinstance(context, (int, Integral)):
        return (int(context),) if context else ()
    return tuple(context)


def shape_text(*sizes: int | str) -> str:
    """A shape as errors write it.

    Example:
        >>> shape_text("*batch", 3, 8)
        '(*batch, 3, 8)'
    """
    return f"({', '.join(map(str, sizes))})"


def check_shape(name: str, value: Tensor, event: Sequence[int]) -> Size:
    """The batch shape of a tensor, if it is ``(*batch, *event)``.

    Args:
        name: the argument's, for the error.
        value: of the argument.
        event: the dimensions on the right.

    Raises:
        ValueError: it is not.

    Example:
        >>> check_shape("x", torch.zeros(5, 4, 3), (3,))
        torch.Size([5, 4])
    """
    cut = value.dim() - len(event)
    if cut < 0 or tuple(value.shape[cut:]) != tuple(event):
        wanted = shape_text("*batch", *event)
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(value.shape)}")
    return value.shape[:cut]


def common_batch(name: str, batch: Size, others: Size) -> Size:
    """The batch shape of a value and a distribution together.

    Args:
        name: the argument's, for the error.
        batch: of the value.
        others: of the distribution.

    Raises:
        ValueError: they do not broadcast.
    """
    try:
        return torch.broadcast_shapes(batch, others)
    except RuntimeError:
        raise ValueError(
            f"{name}: a batch of shape {tuple(batch)} does not go with the distribution's "
            f"{tuple(others)}"
        ) from None


def as_size(shape: int | Sequence[int]) -> Size:
    """A number of draws, or a shape of draws, as a shape.

    Example:
        >>> as_size(3), as_size((2, 3))
        (torch.Size([3]), torch.Size([2, 3]))
    """
    return Size([shape] if isinstance(shape, int) else shape)


def check_positive(**values: Any) -> None:
    """See that these are finite numbers above zero.

    Args:
        **values: by the argument's name.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        if not is_number(value) or value <= 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")


def check_bound(bound: Any) -> None:
    """See that this bounds something: a number above zero that single precision holds with ease.

    Raises:
        ValueError: it is not. Larger ones give infinity times zero.
    """
    check_positive(bound=bound)
    if bound > 1e30:
        raise ValueError(f"bound: expected a number up to 1e30, got {bound!r}")


def check_not_negative(**values: Any) -> None:
    """See that these are finite numbers from zero on.

    Args:
        **values: by the argument's name.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        if not is_number(value) or value < 0:
            raise ValueError(f"{name}: expected a number from 0 on, got {value!r}")


def check_share(**values: Any) -> None:
    """See that these are numbers in [0, 1).

    Args:
        **values: by the argument's name.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        if not is_number(value) or not 0 <= value < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
