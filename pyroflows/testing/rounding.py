"""What single precision loses: no more than it has to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.distributions.flow import Flow
from pyroflows.testing.cases import (
    USUAL,
    MakeFlow,
    contexts,
    is_unbounded,
    prepared,
    randn,
    require,
    seeded,
)

Step = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

_ROWS, _TRIALS = 100, 6
_ENOUGH = 1e-2  # what a round trip may lose in any case, relative to one plus the size
_TIMES = 30  # what rounding between layers alone costs
_FEW = 3  # rows in a hundred that may lose more: those next to a kink, which six trials miss


def _rounded(step: Step, eps: float) -> Step:
    """The step, with what it hands on off by as much as storing it with fewer digits costs."""

    def off(x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = step(x, context)
        return y * (1 + eps * (2 * torch.rand_like(y) - 1)), log_det

    return off


def _with_rounding(flow: Flow, eps: float) -> Flow:
    """A copy in which every layer rounds what it hands on."""
    flow = copy.deepcopy(flow)
    for layer in flow.transform.layers():
        if all(inner is layer for inner in layer.layers()):
            for name in ("forward_and_log_det", "inverse_and_log_det"):
                setattr(layer, name, _rounded(getattr(layer, name), eps))
    return flow


def _trip(flow: Flow, value: Tensor, context: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
    """Where a value goes, and how far off it comes back: relative to one plus its size, a row."""
    steps = flow.transform.forward_and_log_det, flow.transform.inverse_and_log_det
    first, second = reversed(steps) if back else steps
    there = first(value, context)[0]
    error = (second(there, context)[0] - value).abs() / (1 + value.abs())
    return there, error.flatten(1).amax(dim=1).double().nan_to_num(torch.inf)


@torch.no_grad()
def check_rounding(make: MakeFlow, dtype: torch.dtype = torch.float32) -> None:
    """Round trips in single precision lose what rounding numbers between layers loses, no more.

    Under random weights five times the usual (twice, for a bounded support), where double precision
    brings a row back to 1e-6, single precision brings it back to 1e-2, from the base and from the
    data; or a row that says less than its digits hold, which loses so much also where all is
    computed in double precision and every layer rounds what it hands on. Such weights stretch one
    part of space by a million and press another together, and there no arithmetic brings back what
    the rounding of ``x`` has lost: ``Flow.rounding`` says where that is.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_rounding(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    gain = 5 * USUAL if is_unbounded(make().support) else 2 * USUAL
    flow = prepared(make, dtype, gain)
    exact = copy.deepcopy(flow).double()
    coarse = _with_rounding(exact, torch.finfo(dtype).eps)
    context = contexts(flow.context_shape, (_ROWS,), dtype)
    wide = None if context is None else context.double()
    z = randn((_ROWS, *flow.transform.inverse_shape(flow.event_shape)), dtype, seed=1)
    x = flow.transform.forward_and_log_det(z, context)[0]
    for what, value in (("base", z), ("data", x)):
        back = what == "data"
        there, error = _trip(exact, value.double(), wide, back)
        sizes = there.abs().flatten(1)
        # What single precision has no number for is not what is asked for.
        held = (sizes.amin(dim=1) > 1e-30) & (sizes.amax(dim=1) < 1e30) & (error < 1e-6)
        lost = _trip(flow, value, context, back)[1]
        with seeded():
            trials = [_trip(coarse, value.double(), wide, back)[1] for _ in range(_TRIALS)]
        allowed = (_TIMES * torch.stack(trials).amax(dim=0)).clamp(min=_ENOUGH)
        bad = held & (lost > allowed)
        worst = float((lost / allowed)[bad].max()) if bad.any() else 0.0
        require(
            bad.sum() <= _FEW,
            f"round trips from the {what}: {int(bad.sum())} of {_ROWS} rows lose more than {dtype} "
            f"has to, up to {worst:.3g} times what is allowed",
        )
