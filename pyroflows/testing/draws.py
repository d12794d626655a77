"""Scores of a flow's own draws: remembering them may save time, and must never change them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn

from pyroflows.distributions.flow import Flow
from pyroflows.distributions.flow_distribution import FlowDistribution
from pyroflows.testing.cases import (
    MakeFlow,
    contexts,
    draws_of,
    prepared,
    randn,
    require,
    require_close,
    require_shape,
    seeded,
    tolerance,
    trained,
)


def _step_with(optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[Flow], None]:
    def step(flow: Flow) -> None:
        parameters = list(trained(flow).values())
        if not parameters:
            return
        for index, parameter in enumerate(parameters):
            parameter.grad = randn(parameter.shape, parameter.dtype, 50 + index)
        optimizer(parameters).step()
        for parameter in parameters:
            parameter.grad = None

    return step


@torch.no_grad()
def _change_in_place(flow: Flow) -> None:
    for parameter in flow.parameters():
        parameter.add_(0.1)


@torch.no_grad()
def _load(flow: Flow) -> None:
    changed = {
        k: v + 0.1 if v.is_floating_point() else v.clone() for k, v in flow.state_dict().items()
    }
    flow.load_state_dict(changed)


def _replace(flow: Flow) -> None:
    for module in flow.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() + 0.1))


CHANGES: dict[str, Callable[[Flow], None]] = {
    "a step of Adam": _step_with(lambda p: torch.optim.Adam(p, lr=0.1)),
    "a step of fused AdamW": _step_with(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "a step of Pyro's ClippedAdam": _step_with(lambda p: ClippedAdam(p, lr=0.1)),
    "load_state_dict": _load,
    "a change of the parameters in place": _change_in_place,
    "a replacement of the parameters": _replace,
}


def _require_memory_tells_the_truth(
    flow: Flow, d: FlowDistribution, x: Tensor, what: str, *, gradients: bool = True
) -> Tensor:
    """``log_prob(x)`` equals ``log_prob(x.clone())`` in value and in parameter gradient."""
    remembered, computed = d.log_prob(x), d.log_prob(x.clone())
    allowed = tolerance(x.dtype)
    require_close(remembered, computed, allowed, f"log_prob(x) against log_prob(x.clone()), {what}")
    require(
        remembered.requires_grad == computed.requires_grad,
        f"log_prob(x) and log_prob(x.clone()) do not both carry a graph, {what}",
    )
    if gradients and computed.requires_grad:
        parameters = trained(flow)
        pairs = [
            torch.autograd.grad(
                value.sum(),
                [*parameters.values()],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for value in (remembered, computed)
        ]
        for name, one, other in zip(parameters, *pairs, strict=True):
            # Gradients are sums that may cancel, so they are compared to the largest entry.
            scale = 1 + float(other.detach().abs().max())
            require_close(one / scale, other / scale, 10 * allowed, f"gradient of {name!r}, {what}")
    return computed.detach()


def check_memory_of_draws(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """``log_prob(x)`` equals ``log_prob(x.clone())``, in value and in parameter gradient.

    After ``sample`` and ``rsample``; twice in a row; with other calls in between; under and outside
    ``no_grad``; on an expanded copy; after every kind of change of the parameters; after a change
    of the draw in place. And nothing is kept alive: a draw and its graph die with their last name.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_memory_of_draws(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    with seeded():
        for how in ("sample", "rsample"):
            flow = prepared(make, dtype)
            shape, context = draws_of(flow, 5, dtype)
            if how == "rsample" and not flow(context).has_rsample:
                continue
            _check_unchanged(flow, flow(context), how, shape)
            for label, change in CHANGES.items() if trained(flow) else ():
                for grad in (True, False):
                    flow = prepared(make, dtype)
                    d = flow(context)
                    with torch.set_grad_enabled(grad):
                        x = getattr(d, how)(shape)
                        before = _require_memory_tells_the_truth(
                            flow, d, x, f"after {how}()", gradients=False
                        )
                    change(flow)
                    with torch.set_grad_enabled(grad):
                        what = f"after {how}() and {label}, grad mode {grad}"
                        # The draw's own graph is of no use once its parameters have changed.
                        after = _require_memory_tells_the_truth(
                            flow, d, x, what, gradients=how == "sample"
                        )
                    require(not torch.equal(before, after), f"{label} left the density as it was")
        flow = prepared(make, dtype)
        shape, context = draws_of(flow, 5, dtype)
        _check_nothing_is_kept_alive(flow(context), shape)


def _check_unchanged(flow: Flow, d: FlowDistribution, how: str, shape: torch.Size) -> None:
    """All that may happen between drawing and scoring while the parameters stand still."""
    for drawn_with, scored_with in ((True, True), (False, False), (True, False), (False, True)):
        with torch.set_grad_enabled(drawn_with):
            x = getattr(d, how)(shape)
            second = getattr(d, how)(shape)
        with torch.set_grad_enabled(scored_with):
            what = f"after {how}(), drawn with grad mode {drawn_with}, scored with {scored_with}"
            _require_memory_tells_the_truth(flow, d, x, what)
            _require_memory_tells_the_truth(flow, d, x, f"{what}, the second time")
            d.log_prob(second)
            d.sample(shape)
            _require_memory_tells_the_truth(flow, d, x, f"{what}, other calls in between")
            _require_memory_tells_the_truth(flow, d, second, f"{what}, the other draw")
            wide = d.expand((2, *d.batch_shape))
            if not d.batch_shape:
                wide = d.expand((5,))
            _require_memory_tells_the_truth(flow, wide, x, f"{what}, on an expanded copy")
            with torch.no_grad():
                before = d.log_prob(x.clone())
                x.copy_(x.flip(0).clone())
            _require_memory_tells_the_truth(flow, d, x, f"{what} and a change of the draw in place")
            with torch.no_grad():
                require(not torch.equal(before, d.log_prob(x)), "the change of the draw is unseen")
    one = getattr(d, how)(())
    wide = d.expand((3, *d.batch_shape))
    _require_memory_tells_the_truth(flow, wide, one, f"one draw of {how}(), on an expanded copy")


class _Token:
    """Something a graph can hold, whose death can be seen."""


def _check_nothing_is_kept_alive(d: FlowDistribution, shape: torch.Size) -> None:
    if not d.has_rsample:
        return
    x = d.rsample(shape)
    log_q = d.log_prob(x)
    token = _Token()
    node: Any = log_q.grad_fn  # whose metadata torch's stubs take for a method
    if node is not None:
        node.metadata["token"] = token
    draw, graph = weakref.ref(x), weakref.ref(token)
    del token, log_q, node
    require(draw() is x, "the draw vanished")
    del x
    require(draw() is None, "a draw is kept alive")
    require(graph() is None, "the graph of a draw's log-density is kept alive")


def check_draws_are_scored(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
    """``rsample_and_log_prob`` agrees with ``log_prob``, and with ``rsample`` under one seed.

    Args:
        make: makes the flow.
        dtype: of its tensors.

    Raises:
        AssertionError: the law is broken; the message says what was seen.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_draws_are_scored(lambda: pf.realnvp(2, layers=1, hidden=(8,)))
    """
    flow = prepared(make, dtype)
    for shape, batch in (((), ()), ((5,), ()), ((2, 3), (4,)), ((0,), ())):
        context = contexts(flow.context_shape, batch, dtype)
        rows = (*shape, *(batch if flow.context_shape else ()))
        d = flow(context)
        draw = "rsample" if d.has_rsample else "sample"
        with seeded():
            x, log_q = (
                d.rsample_and_log_prob(shape)
                if d.has_rsample
                else (lambda x: (x, d.log_prob(x)))(d.sample(shape))
            )
        with seeded():
            again = getattr(flow, draw)(shape, context)
        require_shape(x, (*rows, *flow.event_shape), f"draws of shape {shape}, context {batch}")
        require_shape(log_q, rows, f"their log-densities, shape {shape}, context {batch}")
        require_close(again, x, 0.0, f"{draw} against rsample_and_log_prob, same seed")
        require(not x.numel() or flow.support.check(x).all(), "a draw lies outside the support")
        scored = flow.log_prob(x.detach(), context)
        allowed = 10 * tolerance(dtype)
        require_close(log_q, scored, allowed, "rsample_and_log_prob against log_prob")
        scored = flow.detached().log_prob(x, context)
        require_close(log_q, scored, allowed, "rsample_and_log_prob against detached().log_prob")
