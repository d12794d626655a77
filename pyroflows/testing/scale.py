"""Large weights and many rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyroflows.testing.cases import (
    USUAL,
    MakeFlow,
    contexts,
    draws_of,
    is_unbounded,
    points,
    prepared,
    require,
    require_finite,
    require_shape,
    seeded,
    trained,
)


def check_large_weights(make: MakeFlow, dtype: torch.dtype = torch.float32) -> None:
    """Values and gradients are finite under random weights five times 1 / sqrt(fan-in).

    Once that size for a bounded support, where the exponential of a moderate number overflows.

    Args:
        make: makes the flow.
        dtype: of its tensors; float32 is the hard case.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_large_weights(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    gain = 10 * USUAL if is_unbounded(make().support) else 2 * USUAL
    flow = prepared(make, dtype, gain)
    x, context = points(prepared(make, dtype), (200,), dtype)
    shape, draw_context = draws_of(flow, 200, dtype)
    with seeded():
        losses = {"log_prob(x)": flow.log_prob(x, context)}
        if flow(draw_context).has_rsample:
            draw, losses["rsample_and_log_prob()"] = flow.rsample_and_log_prob(shape, draw_context)
            require_finite(draw, "draws")
        else:
            require_finite(flow.sample(shape, draw_context), "draws")
    parameters = trained(flow)
    for what, value in losses.items():
        require_finite(value, what)
        if not parameters:
            continue
        gradients = torch.autograd.grad(value.mean(), [*parameters.values()], allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                require_finite(gradient, f"gradient of {name!r} from {what}")


class _CountElements(TorchDispatchMode):
    """Adds up the sizes of all tensors made: what a computation writes to memory."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.total += tensor.numel()
        return result


@torch.no_grad()
def check_many_rows(
    make: MakeFlow, dtype: torch.dtype = torch.float64, rows: int = 100_000
) -> None:
    """No rows work, many rows work, and what is written to memory grows linearly with them.

    Args:
        make: makes the flow.
        dtype: of its tensors.
        rows: how many are scored; they are draws, each ten times where drawing is the slow way.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_many_rows(lambda: pf.realnvp(2, layers=1, hidden=(8,)), rows=1000)
    """
    flow = prepared(make, dtype)
    for number in (0, rows):
        context = contexts(flow.context_shape, (), dtype)
        repeats = 10 if flow.fast == "log_prob" else 1
        with seeded():
            x = flow.sample((number // repeats,), context)
            require_shape(x, (number // repeats, *flow.event_shape), f"{len(x)} draws")
            x = x.repeat(repeats, *[1] * len(flow.event_shape))
            value = flow.log_prob(x, context)
            require_shape(value, (number,), f"log_prob of {number} rows")
            require_finite(value, f"log_prob of {number} rows")
    for what in ("log_prob", "sample"):
        written = []
        for number in (500, 1000, 2000):
            x, context = points(flow, (number,), dtype)
            shape, draw_context = draws_of(flow, number, dtype)
            with seeded(), _CountElements() as count:
                if what == "log_prob":
                    flow.log_prob(x, context)
                else:
                    flow.sample(shape, draw_context)
            written.append(count.total)
        first, second = written[1] - written[0], written[2] - written[1]
        require(
            second <= 2.1 * first,
            f"{what} writes {written} numbers for 500, 1000 and 2000 rows: more than linear",
        )
