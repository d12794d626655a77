"""What each direction costs, in calls of the networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch

from pyroflows.distributions.flow import Flow
from pyroflows.nets.sequential import is_solvable
from pyroflows.testing.cases import (
    MakeFlow,
    conditioners,
    draws_of,
    points,
    prepared,
    require,
    seeded,
)


@contextmanager
def _counted(net: Any) -> Iterator[list[int]]:
    """How often a network is called, and how often it is solved through."""
    counts = [0, 0]

    def called(*_: object) -> None:
        counts[0] += 1

    def solved(*args: Any, **kwargs: Any) -> Any:
        counts[1] += 1
        return solve(*args, **kwargs)

    solve: Any = getattr(net, "solve", None)
    handle = net.register_forward_hook(called)
    if solve is not None:
        net.solve = solved
    try:
        yield counts
    finally:
        handle.remove()
        if solve is not None:
            del net.solve


class _Calls:
    """The calls of a flow's networks since they were last checked."""

    def __init__(self, flow: Flow, stack: ExitStack) -> None:
        self.fast = flow.fast
        self.nets = conditioners(flow.transform)
        self.counts = {name: stack.enter_context(_counted(net)) for name, net in self.nets.items()}

    def forget(self) -> None:
        """Count from zero."""
        for found in self.counts.values():
            found[:] = [0, 0]

    def expect(self, calls: int, what: str) -> None:
        """Each network was called so often, and never solved."""
        for name, found in self.counts.items():
            require(
                found == [calls, 0],
                f"{what} called {name} {found[0]} times and solved {found[1]} times; "
                f"fast={self.fast!r} promises {calls} and 0",
            )
        self.forget()

    def expect_slow(self, calls: int, what: str) -> None:
        """Each network that can be solved was called at most so often, and solved at most once."""
        for name, found in self.counts.items():
            require(
                not is_solvable(self.nets[name]) or (found[0] <= calls and found[1] <= 1),
                f"{what} called {name} {found[0]} times and solved {found[1]} times; "
                f"at most {calls} and 1 are needed",
            )
        self.forget()


def check_cost(make: MakeFlow, dtype: torch.dtype = torch.float64, fast: str | None = None) -> None:
    """``flow.fast`` is kept: one call a network in the fast direction, none to score an own draw.

    Under ``no_grad`` that holds of a draw whose score would have to be solved for; another is
    scored by a call, which is cheaper than what it takes to remember it.

    Counted on the modules that layers hold as ``net``. A network that is ``SolvableNet`` is never
    called feature by feature: the slow direction solves once, and calls once more for its gradient.

    Args:
        make: makes the flow.
        dtype: of its tensors.
        fast: what ``flow.fast`` should be, if you want that checked too.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_cost(lambda: pf.iaf(2, layers=1, hidden=(8,)), fast="sample")
    """
    flow = prepared(make, dtype)
    require(fast in (None, flow.fast), f"fast: expected {fast!r}, got {flow.fast!r}")
    x, context = points(flow, (5,), dtype)
    shape, draw_context = draws_of(flow, 5, dtype)
    scores_fast, draws_fast = flow.fast in ("log_prob", "both"), flow.fast in ("sample", "both")
    with seeded(), ExitStack() as stack:
        calls = _Calls(flow, stack)
        scoring = calls.expect if scores_fast else calls.expect_slow
        drawing = calls.expect if draws_fast else calls.expect_slow
        flow.log_prob(x, context)
        # Outside no_grad a solution is followed by two passes that carry its gradient.
        scoring(1 if scores_fast else 2, "log_prob")
        with torch.no_grad():
            flow.log_prob(x, context)
            scoring(1, "log_prob under no_grad")
            flow.sample(shape, draw_context)
            drawing(1, "sample")
        if flow(draw_context).has_rsample:
            _check_own_draws(calls, flow, dtype)
            if draws_fast:
                _check_plate(calls, flow, dtype)


def _check_own_draws(calls: _Calls, flow: Flow, dtype: torch.dtype) -> None:
    shape, context = draws_of(flow, 5, dtype)
    for grad in (True, False):
        d = flow(context)
        with torch.set_grad_enabled(grad):
            own = d.rsample(shape)
            calls.forget()
            expected = 1 if not grad and flow.fast in ("log_prob", "both") else 0
            d.log_prob(own)
            calls.expect(expected, "log_prob of an own draw")
            d.log_prob(own)
            calls.expect(expected, "log_prob of an own draw, the second time")


def _check_plate(calls: _Calls, flow: Flow, dtype: torch.dtype) -> None:
    _, context = draws_of(flow, 4, dtype)

    def model() -> None:
        d = flow(context)
        with pyro.plate("rows", 4):
            pyro.sample("x", d if context is not None else d.expand((4,)))

    pyro.poutine.trace(model).get_trace().compute_log_prob()
    calls.expect(1, "pyro.sample and the trace's log_prob_sum")
