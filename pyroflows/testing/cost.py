"""What each direction costs, in calls of the networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch

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

    nets = conditioners(flow.transform)

    def expect(counts: dict[str, list[int]], calls: int, what: str) -> None:
        for name, found in counts.items():
            require(
                found == [calls, 0],
                f"{what} called {name} {found[0]} times and solved {found[1]} times; "
                f"fast={flow.fast!r} promises {calls} and 0",
            )
            found[:] = [0, 0]

    def expect_slow(counts: dict[str, list[int]], calls: int, what: str) -> None:
        for name, found in counts.items():
            require(
                not is_solvable(nets[name]) or (found[0] <= calls and found[1] <= 1),
                f"{what} called {name} {found[0]} times and solved {found[1]} times; "
                f"at most {calls} and 1 are needed",
            )
            found[:] = [0, 0]

    with seeded(), ExitStack() as stack:
        counts = {name: stack.enter_context(_counted(net)) for name, net in nets.items()}
        scoring = expect if flow.fast in ("log_prob", "both") else expect_slow
        drawing = expect if flow.fast in ("sample", "both") else expect_slow
        flow.log_prob(x, context)
        # Outside no_grad a solution is followed by two passes that carry its gradient.
        scoring(counts, 1 if scoring is expect else 2, "log_prob")
        with torch.no_grad():
            flow.log_prob(x, context)
            scoring(counts, 1, "log_prob under no_grad")
            flow.sample(shape, draw_context)
            drawing(counts, 1, "sample")
        for grad in (True, False):
            d = flow(draw_context)
            if not d.has_rsample:
                continue
            with torch.set_grad_enabled(grad):
                own = d.rsample(shape)
                for found in counts.values():
                    found[:] = [0, 0]
                calls = 0 if grad or scoring is expect_slow else 1
                d.log_prob(own)
                expect(counts, calls, "log_prob of an own draw")
                d.log_prob(own)
                expect(counts, calls, "log_prob of an own draw, the second time")
        if drawing is expect and flow(draw_context).has_rsample:
            _, context = draws_of(flow, 4, dtype)

            def model() -> None:
                d = flow(context)
                with pyro.plate("rows", 4):
                    pyro.sample("x", d if context is not None else d.expand((4,)))

            pyro.poutine.trace(model).get_trace().compute_log_prob()
            expect(counts, 1, "pyro.sample and the trace's log_prob_sum")
