"""Priors that Stan writes and Pyro lacks: flat ones, and densities cut down to a support.

Neither is normalised: a posterior does not change by a constant. Both give a point of their support
as a "sample", for guides to start from: ``ImproperUniform`` gives none, so no autoguide runs on it.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

ordered = constraints.ordered_vector
positive = constraints.positive
positive_vector = constraints.independent(constraints.positive, 1)
positive_ordered = constraints.positive_ordered_vector


def flat(like: Tensor, size: int) -> TorchDistribution:
    """The density 1 on R^size, in the dtype of ``like``."""
    return dist.Normal(like.new_zeros(size), 1.0).to_event(1).mask(False)


def flat_positive(like: Tensor) -> TorchDistribution:
    """The density 1 on the positive numbers, in the dtype of ``like``."""
    return dist.LogNormal(like.new_zeros(()), 1.0).mask(False)


class Restricted(TorchDistribution):
    """The density of ``base`` on a smaller support, not normalised again, as in Stan.

    Args:
        base: a distribution over real numbers or real vectors.
        support: where the density is kept: ``positive``, ``positive_vector``, ``ordered`` or
            ``positive_ordered``.

    Example:
        >>> prior = Restricted(dist.Normal(torch.tensor([0.0, 3.0]), 1.0).to_event(1), ordered)
        >>> prior.expand((4,)).log_prob(torch.tensor([0.0, 3.0])).shape
        torch.Size([4])
    """

    arg_constraints = {}

    def __init__(self, base: TorchDistribution, support: Constraint) -> None:
        self.base = base
        self._support = support
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Constraint:
        """Where the density is not zero."""
        return self._support

    def expand(
        self, batch_shape: torch.Size, _instance: TorchDistribution | None = None
    ) -> Restricted:
        """The same with a larger batch."""
        return Restricted(self.base.expand(batch_shape), self._support)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of ``base``, ``(*batch,)``."""
        return self.base.log_prob(value)

    def sample(self, sample_shape: torch.Size | tuple[()] = ()) -> Tensor:
        """Points of the support near where ``base`` lies, not draws of this distribution."""
        value = self.base.sample(sample_shape)
        if self._support is not ordered:
            value = value.abs()
        if self._support in (ordered, positive_ordered):
            value = value.sort(dim=-1).values
        return value
