"""What calling a ``Quantized`` returns: a Pyro distribution over integers.

It knows of shapes and checks; noise and rounding are its owner's, densities and draws the flow's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from pyroflows._checks import common_batch
from pyroflows.discrete.dequantization import Dequantizing
from pyroflows.discrete.noise import fixed_noise
from pyroflows.distributions.flow_distribution import FlowDistribution
from pyroflows.transforms.limits import lowest, refused


class QuantizedDistribution(TorchDistribution):
    """What calling a ``Quantized`` returns: a Pyro distribution over integers.

    Args:
        owner: whose parameters and noise it uses.
        inner: the flow's distribution.
        seed: of the noise in ``log_prob``; None for new noise at each call.
        validate_args: as everywhere in torch.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        owner: Dequantizing,
        inner: FlowDistribution,
        seed: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.owner = owner
        self.inner = inner
        self.seed = seed
        super().__init__(inner.batch_shape, inner.event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        """Events of integers from 0 to ``bins - 1``."""
        return self.owner.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> QuantizedDistribution:
        """The same with a larger batch."""
        inner = self.inner.expand(Size(batch_shape))
        new = QuantizedDistribution(self.owner, inner, self.seed, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Lower bound on the log-probability of whole numbers, ``(*sample, *batch)``, in nats.

        Raises:
            ValueError: where arguments are validated: values that are not 0, 1, ..., bins - 1.
        """
        if self._validate_args:
            self.owner.check("value", value)
        batch = value.shape[: value.dim() - len(self.event_shape)]
        batch = common_batch("value", batch, self.batch_shape)
        value = value.expand(batch + self.event_shape)
        draws = self.owner.samples
        with fixed_noise(self.seed, value.device):
            y, weight = self.owner.noisy(value, draws)
        scores = self.inner.log_prob(y) + weight
        # Not of minus infinity alone, where the sum's gradient would be NaN.
        total = torch.logsumexp(scores.clamp(min=lowest(scores.dtype)), dim=0)
        return refused(total - math.log(draws))

    @torch.no_grad()
    def sample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Integers ``(*sample, *batch, *event)``."""
        return self.owner.quantize(self.inner.sample(sample_shape))

    def __repr__(self) -> str:
        return (
            f"QuantizedDistribution(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, bins={self.owner.bins})"
        )
