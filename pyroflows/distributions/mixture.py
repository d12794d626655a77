"""A mixture of flows: one for each mode, where a density falls apart into several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyroflows._checks import as_size
from pyroflows._pyro.store import Synced
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.flow_distribution import FlowDistribution


class MixtureFlow(Synced):
    r"""A module whose call is a distribution, :math:`\sum_k s_k q_k(x)` over flows :math:`q_k`.

    The shares are a buffer: training moves the flows. Scoring costs a pass of every flow in the
    direction from data to base, sampling one pass a row.

    Attributes:
        flows: the flows, of one event shape, without context.
        log_weights: log-shares in nats up to a constant, ``(flows,)``: of a posterior each flow's
            estimate of the log evidence around it.

    Args:
        flows: see above.
        log_weights: see above.

    Raises:
        ValueError: there are no flows, their shapes differ, or one takes a context.

    Example:
        >>> import torch, pyroflows as pf
        >>> from pyroflows.distributions.mixture import MixtureFlow
        >>> flow = MixtureFlow([pf.iaf(2, layers=1, hidden=(8,)) for _ in range(3)], torch.zeros(3))
        >>> flow.sample((5,)).shape, flow.log_prob(torch.zeros(4, 2)).shape
        (torch.Size([5, 2]), torch.Size([4]))
    """

    log_weights: Tensor

    def __init__(self, flows: Sequence[Flow], log_weights: Tensor) -> None:
        super().__init__()
        shapes = {tuple(flow.event_shape) for flow in flows}
        if len(shapes) != 1 or any(flow.context_shape for flow in flows):
            raise ValueError(
                "flows: expected at least one, of one shape and without context, got shapes "
                f"{sorted(shapes)}"
            )
        self.event_shape = flows[0].event_shape
        self.flows = nn.ModuleList(flows)
        self.register_buffer("log_weights", log_weights.detach().clone())

    @property
    def config(self) -> dict[str, Any] | None:
        """How a builder made each flow."""
        return self.components[0].config

    @property
    def components(self) -> list[Flow]:
        """The flows, as a list."""
        return cast("list[Flow]", list(self.flows))

    @property
    def log_shares(self) -> Tensor:
        """Of each flow in nats, ``(flows,)``; their exponentials sum to one."""
        return self.log_weights.log_softmax(0)

    @torch.no_grad()
    def follow(self, log_weights: Tensor, rate: float = 0.01) -> None:
        """Move the log-weights towards others: a running mean.

        Args:
            log_weights: estimates, ``(flows,)``; nothing is done where one is not finite.
            rate: how far, of the whole way.
        """
        if log_weights.isfinite().all():
            self.log_weights.lerp_(log_weights.to(self.log_weights), rate)

    def forward(self, *, validate_args: bool | None = None) -> MixtureDistribution:
        """The distribution at the present parameters."""
        each = [flow(validate_args=False) for flow in self.components]
        return MixtureDistribution(each, self.log_shares, validate_args=validate_args)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of ``(*batch, *shape)`` in nats."""
        return self().log_prob(x)

    def sample(self, shape: int | Sequence[int] = ()) -> Tensor:
        """Draws ``(*shape, *event)`` without a graph."""
        return self().sample(as_size(shape))

    def rsample(self, shape: int | Sequence[int] = ()) -> Tensor:
        """Draws ``(*shape, *event)``, differentiable by the flows' parameters."""
        return self().rsample(as_size(shape))


class MixtureDistribution(dist.TorchDistribution):
    """What calling a ``MixtureFlow`` returns.

    Among n draws each flow has its share of n, up to one draw; their order is random. So a single
    draw has the mixture's distribution, and many have less noise than independent ones.

    Args:
        components: the flows' distributions, without batch shape.
        log_shares: in nats, normalised, ``(components,)``.
        batch_shape: of the mixture.
        validate_args: as everywhere in torch.

    Example:
        >>> import torch, pyroflows as pf
        >>> each = [pf.iaf(1, layers=1, hidden=(8,))() for _ in range(2)]
        >>> q = MixtureDistribution(each, torch.tensor([0.25, 0.75]).log())
        >>> q.expand([4]).sample((3,)).shape
        torch.Size([3, 4, 1])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True  # by the flows' parameters; the shares are given

    def __init__(
        self,
        components: Sequence[FlowDistribution],
        log_shares: Tensor,
        batch_shape: Sequence[int] = (),
        validate_args: bool | None = None,
    ) -> None:
        self.components, self.log_shares = components, log_shares
        event_shape = components[0].event_shape
        super().__init__(Size(batch_shape), event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> MixtureDistribution:
        """The same mixture with a larger batch."""
        return MixtureDistribution(self.components, self.log_shares, batch_shape, False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """What a data point may be."""
        return self.components[0].support

    def rsample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Draws ``(*sample, *batch, *event)``, differentiable by the flows' parameters."""
        shape = as_size(sample_shape) + self.batch_shape
        index = self._components_of(shape.numel())
        counts = index.bincount(minlength=len(self.components)).tolist()
        drawn = zip(self.components, counts, strict=True)
        rows = torch.cat([each.rsample((count,)) for each, count in drawn if count])
        return rows[torch.randperm(len(rows), device=rows.device)].reshape(shape + self.event_shape)

    @torch.no_grad()
    def sample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Draws ``(*sample, *batch, *event)`` without a graph."""
        return self.rsample(sample_shape)

    def _components_of(self, n: int) -> Tensor:
        """From which component each of n draws comes, in order: equally spaced quantiles."""
        shares = self.log_shares.exp().cumsum(0)
        levels = (torch.arange(n).to(shares) + torch.rand(()).to(shares)) / max(n, 1)
        return torch.searchsorted(shares, levels).clamp(max=len(self.components) - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, of shape ``(*sample, *batch)``."""
        if self._validate_args:
            self._validate_sample(value)
        return self._summed([each.log_prob(value) for each in self.components])

    def path_log_prob(self, value: Tensor) -> Tensor:
        """The same as a function of the value alone, the parameters held fixed."""
        return self._summed([each.path_log_prob(value) for each in self.components])

    def _summed(self, log_probs: list[Tensor]) -> Tensor:
        total = (torch.stack(log_probs, -1) + self.log_shares).logsumexp(-1)
        return total.expand(torch.broadcast_shapes(total.shape, self.batch_shape))
