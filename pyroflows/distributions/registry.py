"""Flows in torch's registries: a KL divergence, and a constraint whose bijection is a flow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import kl_divergence, register_kl

from pyroflows.distributions.flow import Flow
from pyroflows.distributions.flow_distribution import FlowDistribution
from pyroflows.transforms import Conditioned, FlowTransform


def _source(transform: FlowTransform) -> tuple[FlowTransform, Tensor | None]:
    if isinstance(transform, Conditioned):
        return transform.transform, transform.context
    return transform, None


@register_kl(FlowDistribution, FlowDistribution)
def _kl_flow_flow(p: FlowDistribution, q: FlowDistribution) -> Tensor:
    """A bijection leaves the divergence of the bases unchanged (only then is it closed-form)."""
    (f, c), (g, d) = _source(p.transforms[0]), _source(q.transforms[0])
    same_context = c is d or (c is not None and d is not None and torch.equal(c, d))
    if f is not g or not same_context:
        raise NotImplementedError(
            "KL between different flows has no closed form; estimate it: "
            "x, log_p = p.rsample_and_log_prob((10_000,)); (log_p - q.log_prob(x)).mean()"
        )
    return kl_divergence(p.base_dist, q.base_dist)


class FlowConstraint(constraints.Constraint):
    """The flow's support, parametrised through the flow: ``biject_to`` of it is the frozen flow.

    Give it to a distribution's ``support`` or to ``pyro.param``: samplers and autoguides then move
    in the flow's base space.

    Args:
        flow: an unconditional flow; later training does not move a bijection already made.

    Raises:
        ValueError: the flow has a context.

    Example:
        >>> import torch, pyroflows as pf
        >>> constraint = pf.FlowConstraint(pf.realnvp(2, layers=1, hidden=(8,)))
        >>> torch.distributions.biject_to(constraint)(torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, flow: Flow) -> None:
        if flow.context_shape:
            raise ValueError("flow: expected one without context")
        self.flow = flow
        self.event_dim = len(flow.event_shape)

    def check(self, value: Tensor) -> Tensor:
        """Whether each event is in the flow's support."""
        return self.flow.support.check(value)


@torch.distributions.biject_to.register(FlowConstraint)
@torch.distributions.transform_to.register(FlowConstraint)
def _through_flow(constraint: FlowConstraint) -> FlowTransform:
    return constraint.flow.detached().transform
