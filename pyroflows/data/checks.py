"""What data, contexts and flows have to be: checked once, with errors that say what to do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyroflows._checks import shape_text
from pyroflows.data.rows import Rows
from pyroflows.distributions.flow import Flow

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def checked_rows(
    flow: Flow, x: Any, context: Any = None, *, name: str = "x", context_name: str = "context"
) -> Rows:
    """``x`` as ``(rows, *flow.event_shape)`` and its context, or an error.

    In the flow's dtype; integers, where its support is discrete, stay as they are.

    Args:
        flow: decides the shape, the dtype and the support; also a model of integers.
        x: a tensor, or what numpy can make an array of.
        context: ``(rows, *flow.context_shape)`` for a conditional flow.
        name: what to call ``x`` in errors.
        context_name: what to call ``context`` in errors.

    Raises:
        ValueError: integers (or no integers, where the support is discrete), no rows, another
            shape, rows that are NaN, infinite or too large for the flow's dtype, rows outside the
            flow's support or on its border, a context that is missing, unwanted, or does not fit.
    """
    shape = tuple(flow.event_shape)
    discrete = flow.support.is_discrete
    x = _integers(flow, x, name) if discrete else _floats(flow, x, name)
    if tuple(x.shape[1:]) != shape or x.dim() != len(shape) + 1:
        raise ValueError(
            f"{name}: expected shape {shape_text('rows', *shape)} for this flow, "
            f"got {tuple(x.shape)}"
        )
    if len(x) == 0:
        raise ValueError(f"{name}: expected at least one row, got an empty {tuple(x.shape)}")
    _refuse(
        name, "NaN or infinite", ~torch.isfinite(x).flatten(1).all(dim=1), "drop or impute them"
    )
    _refuse(
        name,
        f"outside the flow's support {_described(flow.support)}{_range(x) if discrete else ''}",
        ~flow.support.check(x).reshape(len(x), -1).all(dim=1),
        "move them inside, or build the flow with another "
        f"{'number of levels' if discrete else 'support='}",
    )
    if not discrete:
        _refuse(
            name,
            f"on the border of the flow's support {_described(flow.support)}, which no density "
            "reaches",
            _on_the_border(flow.support, x),
            "move them inside, by clamp() or by noise, leave them out, or build the flow with a "
            "wider support=",
        )
    return Rows(x, checked_context(flow, context, len(x), context_name))


def as_pair(value: Any) -> tuple[Any, Any]:
    """``(x, context)`` from rows alone, or from a pair whose context may be left out."""
    is_pair = isinstance(value, (tuple, list)) and len(value) in (1, 2)
    # A pair of tensors, or a tuple of two arrays; a list of two lists is two rows.
    kinds = (Tensor,) if isinstance(value, list) else object
    if is_pair and isinstance(value[0], kinds) and hasattr(value[0], "shape"):
        return (*value, None)[:2]
    return value, None


def checked_context(
    flow: Flow, context: Any, rows: int | None = None, name: str = "context"
) -> Tensor | None:
    """The context as ``(rows, *flow.context_shape)`` in the flow's dtype, or an error.

    Args:
        flow: decides the shape and the dtype.
        context: a tensor, or what numpy can make an array of; None for an unconditional flow.
        rows: how many there have to be; by default any number.
        name: what to call it in errors.

    Raises:
        ValueError: it is missing, unwanted, of another shape, of integers, or not finite.
    """
    wanted = tuple(flow.context_shape)
    if not wanted:
        if context is not None:
            raise ValueError(
                f"{name}: this flow takes no context, got one; build the flow with context=..."
            )
        return None
    if context is None:
        raise ValueError(
            f"{name}: this flow needs one of shape {shape_text('rows', *wanted)}, got None"
        )
    one_hot = getattr(flow, "one_hot", None)
    if one_hot is not None:
        context = one_hot(as_tensor(context, name))  # of labels, where the model has classes
    context = _floats(flow, context, name)
    shape = tuple(context.shape)
    if shape[1:] != wanted or not shape[0] or shape[0] != (rows or shape[0]):
        what = shape_text(rows or "rows", *wanted)
        raise ValueError(f"{name}: expected shape {what}, got {shape}")
    bad = ~torch.isfinite(context).flatten(1).all(dim=1)
    _refuse(name, "NaN or infinite", bad, "drop or impute them")
    return context


def as_tensor(value: Any, name: str) -> Tensor:
    """Real numbers as a dense tensor, from a tensor or what numpy can make an array of.

    Args:
        value: the numbers.
        name: what to call them in errors.

    Raises:
        ValueError: rows of several lengths, masked values, or no numbers.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_complex() or value.is_meta:
            raise ValueError(
                f"{name}: expected a dense tensor of real numbers, got one of {value.dtype}, "
                f"{value.layout}, on {value.device}"
            )
        return value
    import numpy as np

    try:
        array = np.asarray(value)
    except Exception as error:  # whatever the conversion of a user's object may raise
        raise ValueError(f"{name}: expected rows of one length ({error})") from None
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected real numbers, got an array of {array.dtype}")
    if np.ma.is_masked(value):
        raise ValueError(f"{name}: expected whole rows, got masked values; drop or impute them")
    kind = np.dtype("f8") if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    array = np.ascontiguousarray(array, dtype=kind)
    # torch has no tensors that are only to be read.
    return torch.as_tensor(array if array.flags.writeable else array.copy())


def _integers(flow: Flow, value: Any, name: str) -> Tensor:
    """A tensor of integers, as small as it came; booleans count as 0 and 1."""
    value = as_tensor(value, name)
    if value.is_floating_point():
        raise ValueError(
            f"{name}: expected integers, as this model's support is {_described(flow.support)}, "
            f"got {value.dtype}{_range(value)}; give the levels, such as a picture's bytes: values "
            "in [0, 1] have to be multiplied by the highest level, rounded, and turned to long()"
        )
    value = value.detach()
    if value.dtype == torch.bool:
        return value.to(torch.uint8)
    # torch has no order among wide unsigned numbers.
    return value if value.dtype in _INTEGERS else value.long()


def _described(support: constraints.Constraint) -> str:
    """A constraint in words, without what says which dimensions are an event's."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return str(support)


def _on_the_border(support: constraints.Constraint, x: Tensor) -> Tensor:
    """Which rows ``(rows, *event)`` lie within a rounding step of the support's border.

    The map from the support to R^n sends them to infinity, or clamps them to where they are spikes.
    """
    border = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if _described(support) == str(constraints.real):
        return border
    for end in (-math.inf, math.inf):
        beyond = x.nextafter(x.new_tensor(end))
        border |= ~support.check(beyond).reshape(len(x), -1).all(dim=1)
    return border


def _range(value: Tensor) -> str:
    return f", with values from {value.min():g} to {value.max():g}" if value.numel() else ""


def _floats(flow: Flow, value: Any, name: str) -> Tensor:
    """A tensor of the flow's floating dtype."""
    value = as_tensor(value, name)
    if not value.is_floating_point():
        raise ValueError(
            f"{name}: expected floating-point values, got {value.dtype}; use {name}.float(), and "
            "for counts or pixels use pf.quantized(flow, bins=...), which adds noise"
        )
    made = value.detach().to(flow.dtype)
    beyond = torch.atleast_1d(made.isinf() & value.isfinite())
    if beyond.any():
        _refuse(
            name,
            f"beyond what {flow.dtype} holds",
            beyond.reshape(len(beyond), -1).any(dim=1),
            "drop or impute them, rescale the data, or make the flow one of wider numbers: "
            "flow.double()",
        )
    return made


def _refuse(name: str, what: str, bad: Tensor, remedy: str) -> None:
    if bad.any():
        where = bad.nonzero()[:, 0].tolist()
        shown = ", ".join(map(str, where[:10])) + (", ..." if len(where) > 10 else "")
        raise ValueError(
            f"{name}: {len(where)} of {len(bad)} rows are {what} (rows {shown}); {remedy}"
        )


def check_is_flow(**values: Any) -> None:
    """See that these are flows, or models of integers, not what is easily mistaken for one.

    Args:
        **values: by the argument's name.

    Raises:
        ValueError: one is a distribution, a builder, or something else.
    """
    for name, value in values.items():
        if isinstance(value, nn.Module) and hasattr(value, "event_shape"):
            continue
        advice = "builders such as pf.nsf make one"
        if isinstance(value, Distribution):
            advice = "which is what a flow gives when it is called; pass the flow itself"
        elif callable(value) and not isinstance(value, nn.Module):
            advice = "which has to be called to make one, as in pf.nsf(features)"
        raise ValueError(f"{name}: expected a flow, got {_named(value)}, {advice}")


def checked_flow(name: str, value: Any, expected: str = "a Flow") -> Flow:
    """The value, if it is a ``Flow`` with a density: no model of integers, and no distribution.

    Args:
        name: what to call it in errors.
        value: of the argument.
        expected: what may stand there, for the error.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Flow):
        raise ValueError(f"{name}: expected {expected}, got {_named(value)}")
    return value


def _named(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return type(value).__name__ if name is None else f"{type(value).__name__} {name}"
