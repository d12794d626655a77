"""The distribution over integers that calling a ``Quantized`` returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyroflows.dequantize import fixed_noise
from pyroflows.distribution import FlowDistribution

if TYPE_CHECKING:
    from pyroflows.quantize import Quantized


class QuantizedDistribution(dist.TorchDistribution):
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
        owner: Quantized,
        inner: FlowDistribution,
        seed: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._owner = owner
        self._inner = inner
        self._seed = seed
        super().__init__(inner.batch_shape, inner.event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        """Events of integers from 0 to ``bins - 1``."""
        return self._owner.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> QuantizedDistribution:
        """The same with a larger batch."""
        inner = self._inner.expand(Size(batch_shape))
        new = QuantizedDistribution(self._owner, inner, self._seed, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Lower bound on the log-probability of whole numbers, ``(*sample, *batch)``, in nats.

        Raises:
            ValueError: where arguments are validated: values that are not 0, 1, ..., bins - 1.
        """
        if self._validate_args:
            self._owner._check("value", value)
        batch = value.shape[: value.dim() - len(self.event_shape)]
        batch = torch.broadcast_shapes(batch, self.batch_shape)
        value = value.expand(batch + self.event_shape)
        draws = self._owner.samples
        with fixed_noise(self._seed, value.device):
            y, weight = self._owner._noisy(value, draws)
        return torch.logsumexp(self._inner.log_prob(y) + weight, dim=0) - math.log(draws)

    @torch.no_grad()
    def sample(self, sample_shape: int | Sequence[int] = ()) -> Tensor:
        """Integers ``(*sample, *batch, *event)``."""
        return self._owner.quantize(self._inner.sample(sample_shape))

    def __repr__(self) -> str:
        return (
            f"QuantizedDistribution(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, bins={self._owner.bins})"
        )
