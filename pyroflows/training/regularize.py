"""Default weight decay and dropout, from the number of rows per feature."""

from __future__ import annotations

import math

from pyroflows._checks import check_share
from pyroflows.distributions.flow import Flow
from pyroflows.nets.causal_block import CausalBlock
from pyroflows.nets.mlp import Dropping


def features(flow: Flow) -> int:
    """How many numbers of a row its nets have weights of their own for, in and out."""
    if len(flow.event_shape) == 3:
        return flow.event_shape[0]
    is_signal = any(isinstance(module, CausalBlock) for module in flow.modules())
    return 1 if is_signal else flow.event_shape.numel()


def default_average(steps: int) -> float:
    """A memory of four epochs of so many steps, within 100 to 2,000 steps."""
    return 1 - 1 / min(max(4 * steps, 100), 2000)


def default_weight_decay(rows_a_feature: float) -> float:
    """1 at 100 rows a feature and below, then falling as one over them."""
    return min(100 / rows_a_feature, 1.0)


def default_dropout(flow: Flow, rows_a_feature: float) -> float:
    """0.2 below 100 rows a feature, log-linearly to 0 at 10,000."""
    if not _scores_in_one_pass(flow) or rows_a_feature == math.inf:
        return 0.0
    return 0.2 * min(max(math.log(1e4 / rows_a_feature) / math.log(100), 0.0), 1.0)


def _scores_in_one_pass(flow: Flow) -> bool:
    return flow.fast in ("log_prob", "both")


def checked_dropout(flow: Flow, share: float) -> float:
    """A share that was asked for.

    Raises:
        ValueError: it is no share, or one above zero of a flow that is inverted to score.
    """
    check_share(dropout=share)
    if share and not _scores_in_one_pass(flow):
        raise ValueError(
            f"dropout: expected 0 for a flow with fast={flow.fast!r}, whose inverse is solved for "
            f"with the nets as they are, got {share}"
        )
    return share


def set_dropout(flow: Flow, share: float) -> None:
    """Our networks carry their dropout as a plain number, used while training."""
    for module in flow.modules():
        if isinstance(module, Dropping):
            module.dropout = share
