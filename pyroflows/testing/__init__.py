"""The contract as public functions: what every transform and every flow keeps, yours included.

``check_transform`` and ``check_flow`` run all that applies and raise ``AssertionError`` with the
first thing that is wrong. Each law is also a function of its own, and ``LAWS`` names them for
parametrised tests.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from pyroflows.distributions.flow import Flow
from pyroflows.testing.cases import USUAL, MakeFlow, as_shape, prepared, randomize
from pyroflows.testing.cost import check_cost
from pyroflows.testing.density import (
    check_density_integrates_to_one,
    check_every_feature_moves,
    check_every_parameter_trains,
)
from pyroflows.testing.draws import check_draws_are_scored, check_memory_of_draws
from pyroflows.testing.edges import check_far_gradients, check_far_rows
from pyroflows.testing.maps import (
    check_context_rows,
    check_gradients,
    check_log_det,
    check_round_trip,
    check_structure,
)
from pyroflows.testing.rounding import check_rounding
from pyroflows.testing.scale import check_large_weights, check_many_rows
from pyroflows.testing.state import check_no_global_state, check_repr, check_state
from pyroflows.testing.use import check_nuts, check_pyro
from pyroflows.transforms.base import FlowTransform

__all__ = [
    "check_transform",
    "check_flow",
    "LAWS",
    "FLOAT64_LAWS",
    "FLOAT32_LAWS",
    "SLOW_LAWS",
    "randomize",
    "check_round_trip",
    "check_log_det",
    "check_gradients",
    "check_structure",
    "check_context_rows",
    "check_every_parameter_trains",
    "check_every_feature_moves",
    "check_density_integrates_to_one",
    "check_memory_of_draws",
    "check_draws_are_scored",
    "check_cost",
    "check_state",
    "check_pyro",
    "check_nuts",
    "check_large_weights",
    "check_rounding",
    "check_far_rows",
    "check_far_gradients",
    "check_no_global_state",
    "check_repr",
    "check_many_rows",
]


def _of_transform(check: Callable[..., None], takes_dtype: bool) -> Callable[..., None]:
    """A law of transforms as a law of flows: their transform is checked."""

    @functools.wraps(check)
    def law(make: MakeFlow, dtype: torch.dtype = torch.float64) -> None:
        flow = prepared(make, dtype)
        shape = flow.transform.inverse_shape(flow.event_shape)
        more = {"dtype": dtype} if takes_dtype else {}
        check(flow.transform, shape, flow.context_shape, **more)

    return law


LAWS: dict[str, Callable[[MakeFlow, torch.dtype], None]] = {
    "round_trip": _of_transform(check_round_trip, True),
    "log_det": _of_transform(check_log_det, False),
    "gradients": _of_transform(check_gradients, False),
    "structure": _of_transform(check_structure, False),
    "context_rows": _of_transform(check_context_rows, True),
    "every_parameter_trains": check_every_parameter_trains,
    "every_feature_moves": check_every_feature_moves,
    "density_integrates_to_one": check_density_integrates_to_one,
    "memory_of_draws": check_memory_of_draws,
    "draws_are_scored": check_draws_are_scored,
    "cost": check_cost,
    "state": check_state,
    "pyro": check_pyro,
    "nuts": check_nuts,
    "large_weights": check_large_weights,
    "rounding": check_rounding,
    "far_rows": check_far_rows,
    "far_gradients": check_far_gradients,
    "no_global_state": check_no_global_state,
    "repr": check_repr,
    "many_rows": check_many_rows,
}
"""Every law by name; each takes a function that makes the flow, and a dtype."""

FLOAT64_LAWS = frozenset(LAWS) - {"large_weights", "rounding"}
"""Laws that hold in float64, the most exact form of each."""

FLOAT32_LAWS = frozenset(
    {
        "round_trip",
        "context_rows",
        "every_parameter_trains",
        "memory_of_draws",
        "draws_are_scored",
        "cost",
        "state",
        "pyro",
        "large_weights",
        "rounding",
        "far_rows",
        "far_gradients",
        "many_rows",
    }
)
"""Laws that say something in float32 too."""

SLOW_LAWS = frozenset({"nuts"})
"""Laws that take seconds rather than fractions of one."""


def check_transform(
    transform: FlowTransform,
    features: int | Sequence[int] | None = None,
    context: int | Sequence[int] = 0,
    *,
    gain: float = USUAL,
    seed: int = 0,
) -> None:
    """Hold a transform to the contract: round trip, log-determinant, gradients, structure, batches.

    Works on a copy in float64, with noise added to its parameters.

    Args:
        transform: yours.
        features: number of input features, or the input's event shape; by default three, or the
            least number up to 64 that the transform takes.
        context: number of context features, or the context's shape; 0 for none.
        gain: size of the noise, in units of 1 / sqrt(fan-in).
        seed: of the noise.

    Raises:
        AssertionError: the first law it breaks, and how.
        ValueError: without ``features``, no number of them was found to fit.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_transform(pf.transforms.LULinear(4))
    """
    wanted = as_shape(context)
    transform = copy.deepcopy(transform).to(torch.float64).eval()
    shape = as_shape(_fitting(transform, wanted) if features is None else features)
    randomize(transform, gain, seed)
    check_round_trip(transform, shape, wanted)
    check_log_det(transform, shape, wanted)
    check_gradients(transform, shape, wanted)
    check_structure(transform, shape, wanted)
    check_context_rows(transform, shape, wanted)


def _fitting(transform: FlowTransform, context: torch.Size) -> int:
    """A number of features that the transform takes."""
    c = torch.zeros(2, *context, dtype=torch.float64) if context else None
    for features in (3, *range(1, 65)):
        try:
            transform.forward_and_log_det(torch.zeros(2, features, dtype=torch.float64), c)
        except (RuntimeError, IndexError, ValueError):
            continue
        return features
    raise ValueError("features: found no number from 1 to 64 that the transform takes; give it")


def check_flow(
    make_flow: Callable[[], Flow] | Flow,
    *,
    fast: str | None = None,
    laws: Sequence[str] | None = None,
) -> None:
    """Hold a flow to the contract.

    Args:
        make_flow: makes a new flow of the same architecture at each call, or a flow, which is
            copied each time.
        fast: the direction it promises to be fast in; None takes its word.
        laws: names from ``LAWS``; None for all but the slow ones.

    Raises:
        AssertionError: the first law it breaks, by name, and how.
        ValueError: a law that does not exist, or what makes no flow.

    Example:
        >>> import pyroflows as pf
        >>> pf.testing.check_flow(lambda: pf.iaf(2, layers=1, hidden=(8,)), fast="sample")
    """
    if isinstance(make_flow, Distribution) or not callable(make_flow):
        raise ValueError(
            "make_flow: expected a flow or a function that makes one, got "
            f"{type(make_flow).__name__}"
        )
    make: MakeFlow = make_flow
    if isinstance(make_flow, nn.Module):
        flow: Any = make_flow
        make = functools.partial(copy.deepcopy, flow)
    names = [n for n in LAWS if n not in SLOW_LAWS] if laws is None else list(laws)
    unknown = sorted(set(names) - set(LAWS))
    if unknown:
        raise ValueError(f"laws: expected names from {sorted(LAWS)}, got {unknown}")
    if fast is not None:
        check_cost(make, torch.float64, fast)
    for name in names:
        for dtype, which in ((torch.float64, FLOAT64_LAWS), (torch.float32, FLOAT32_LAWS)):
            if name not in which:
                continue
            try:
                LAWS[name](make, dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}: {error}") from error
