"""Numbers at the edges of floating point: no NaN, and no harm to other rows or to a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.distributions.flow import Flow
from pyroflows.testing.cases import (
    USUAL,
    MakeFlow,
    points,
    prepared,
    require,
    require_close,
    require_finite,
    seeded,
    tolerance,
    trained,
)

_ROWS = 4  # usual ones, beside which the wild ones stand


def sizes_of(dtype: torch.dtype, steps: int = 6) -> list[float]:
    """Zero, the smallest numbers, and a ladder of so many steps up to the largest and infinity.

    Example:
        >>> import torch
        >>> [f"{size:.0e}" for size in sizes_of(torch.float32, 3)]
        ['0e+00', '1e-45', '1e-38', '7e+12', '5e+25', '3e+38', 'inf']
    """
    info = torch.finfo(dtype)
    ladder = [info.max ** (step / steps) for step in range(1, steps + 1)]
    return [0.0, info.tiny * info.eps, info.tiny, *ladder, torch.inf]


def _wild(like: Tensor, sizes: Sequence[float]) -> Tensor:
    """``(n, *event)``: each size and its negative in every number, by turns, and in only one."""
    found = []
    for size in [sign * size for size in sizes for sign in (1, -1)]:
        whole = torch.full_like(like, size).flatten()
        turns, first, last = whole.clone(), like.flatten().clone(), like.flatten().clone()
        turns[1::2] *= -1
        first[0] = last[-1] = size
        found += [whole, turns, first, last]
    return torch.stack(found).reshape(-1, *like.shape)


def _wild_rows(flow: Flow, like: Tensor, sizes: Sequence[float]) -> Tensor:
    """Wild rows that the support holds, with what is at its very edge."""
    rows = _wild(like, sizes)
    free = torch.zeros(flow.transform.inverse_shape(flow.event_shape), dtype=like.dtype)
    finite = [size for size in sizes if size < torch.inf]
    edge = biject_to(flow.support)(_wild(free, finite))
    corners = torch.eye(like.numel(), dtype=like.dtype).reshape(-1, *like.shape)
    rows = torch.cat([rows, edge, corners])
    return rows[flow.support.check(rows)]


def _batches(
    flow: Flow, dtype: torch.dtype, sizes: Sequence[float] | None
) -> list[tuple[str, Tensor, Tensor | None]]:
    """Usual rows first, then wild rows, or usual rows under wild contexts."""
    sizes = sizes_of(dtype) if sizes is None else sizes
    x, context = points(flow, (_ROWS,), dtype)
    rows = _wild_rows(flow, x[0], sizes)
    if context is None:
        return [("rows", torch.cat([x, rows]), None)]
    contexts = _wild(context[0], sizes)
    return [
        ("rows", torch.cat([x, rows]), _longer(context, len(rows))),
        ("contexts", _longer(x, len(contexts)), torch.cat([context, contexts])),
    ]


def _longer(rows: Tensor, count: int) -> Tensor:
    """The rows, and so many copies of the first."""
    return torch.cat([rows, rows[:1].expand(count, *rows.shape[1:])])


def _tame(rows: Tensor) -> Tensor:
    """A batch of the same size, on which the same kernels run, of the usual rows alone."""
    return _longer(rows[:_ROWS], len(rows) - _ROWS)


def check_far_rows(
    make: MakeFlow,
    dtype: torch.dtype = torch.float64,
    *,
    gain: float = USUAL,
    sizes: Sequence[float] | None = None,
) -> None:
    """Any number has a log-density, finite or minus infinity, and leaves other rows as they are.

    Among them are the largest float, infinity, zero, the smallest and the edges of the support, as
    data and as contexts. Not a number is refused where arguments are validated, and otherwise makes
    its own row's log-density NaN, no other's.

    Args:
        make: makes the flow.
        dtype: of its tensors.
        gain: size of the random weights.
        sizes: of the wild numbers; by default a ladder up to infinity.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_far_rows(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    flow = prepared(make, dtype, gain)
    with torch.no_grad():
        for what, x, context in _batches(flow, dtype, sizes):
            alone = _tame(x), None if context is None else _tame(context)
            wanted = flow(alone[1], validate_args=False).log_prob(alone[0])[:_ROWS]
            found = flow(context, validate_args=False).log_prob(x)
            for index, value in enumerate(found.tolist()):
                at = x[index] if what == "rows" or context is None else context[index]
                require(value < torch.inf, f"log_prob is {value} for one of the {what}, {at}")
            usual = found[:_ROWS].nan_to_num(), wanted.nan_to_num()  # both may be minus infinity
            require_close(*usual, tolerance(dtype), f"log_prob beside wild {what}")
        _check_nan(flow, dtype)


def _check_nan(flow: Flow, dtype: torch.dtype) -> None:
    x, context = points(flow, (_ROWS,), dtype)
    alone = flow(context).log_prob(x)
    x.view(_ROWS, -1)[1, 0] = torch.nan
    try:
        flow(context, validate_args=True).log_prob(x)
    except ValueError:
        pass
    else:
        raise AssertionError("log_prob takes a row with a NaN where arguments are validated")
    try:
        found = flow(context, validate_args=False).log_prob(x)
    except ValueError:  # a base of one's own may validate what it scores
        return
    require(found[1].isnan(), f"log_prob of a row with a NaN is {found[1]}")
    others = [0, *range(2, _ROWS)]
    usual = found[others].nan_to_num(), alone[others].nan_to_num()
    require_close(*usual, tolerance(dtype), "log_prob beside a NaN")


def check_far_gradients(
    make: MakeFlow,
    dtype: torch.dtype = torch.float64,
    *,
    gain: float = USUAL,
    sizes: Sequence[float] | None = None,
) -> None:
    """Where a log-density is finite its gradient is, in data, context and every parameter.

    Also beside rows whose log-density is not finite and which a loss leaves out. Draws under wild
    contexts are no NaN, and so have their gradients.

    Args:
        make: makes the flow.
        dtype: of its tensors.
        gain: size of the random weights.
        sizes: of the wild numbers; by default a ladder up to infinity.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_far_gradients(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    flow = prepared(make, dtype, gain)
    for what, x, context in _batches(flow, dtype, sizes):
        inputs = {"data": x.requires_grad_()}
        if context is not None:
            inputs["context"] = context.requires_grad_()
        d = flow(context, validate_args=False)
        _require_gradient(d.log_prob(x), inputs | trained(flow), f"wild {what}")
        if what == "contexts" and d.has_rsample:
            del inputs["data"]
            with seeded():
                draws, log_prob = d.rsample_and_log_prob()
            for value, of in ((draws.flatten(1), "draws"), (log_prob, "their log-density")):
                require(not value.isnan().any(), f"wild contexts: {of} are NaN")
                _require_gradient(value, inputs | trained(flow), f"{of} under wild contexts")


def _require_gradient(value: Tensor, inputs: dict[str, Tensor], what: str) -> None:
    """What is finite of ``value`` has a finite gradient in each of the inputs."""
    kept = value[value.isfinite()].sum()
    if not kept.requires_grad:
        return
    found = torch.autograd.grad(kept, [*inputs.values()], retain_graph=True, allow_unused=True)
    for name, gradient in zip(inputs, found, strict=True):
        if gradient is not None:
            require_finite(gradient, f"gradient in {name!r} with {what}")
