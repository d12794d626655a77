"""What is behind ``pf.quantized``: integers with noise as points of a flow's space, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows._checks import check_shape, checked_int
from pyroflows.data.checks import checked_flow
from pyroflows.discrete.levels import check_levels, levels
from pyroflows.discrete.noise import fixed_noise, noise, noise_flow, within_the_unit_interval
from pyroflows.distributions.flow import Flow


class Dequantizing(nn.Module):
    """Fills the gaps between levels with noise, and rounds down; arguments as ``quantized``'s."""

    def __init__(
        self, flow: Flow, bins: int, dequantizer: str | Flow, logit: float | None, samples: int
    ) -> None:
        super().__init__()
        if logit is not None and not 0 < logit < 0.5:
            raise ValueError(f"logit: expected a lambda in (0, 0.5), or None, got {logit}")
        self.flow = checked_flow("flow", flow)
        self.bins = checked_int("bins", bins, 2)
        self.logit = logit
        self.samples = checked_int("samples", samples)
        self.event_shape, self.context_shape = flow.event_shape, flow.context_shape
        self.dequantizer = noise_flow(dequantizer, self.event_shape)
        self._noise = dequantizer if isinstance(dequantizer, str) else None
        self._squash = False
        if self.dequantizer is not None:
            self._squash = not within_the_unit_interval(self.dequantizer.support)
            self.dequantizer.to(flow.device, flow.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the flow's floating-point tensors."""
        return self.flow.dtype

    @property
    def device(self) -> torch.device:
        """Where the flow's tensors are."""
        return self.flow.device

    @property
    def support(self) -> constraints.Constraint:
        """Events of integers from 0 to ``bins - 1``."""
        return levels(self.bins, len(self.event_shape))

    def dequantize(self, x: Tensor, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
        r"""A noisy image in the flow's space, and what turns its density into one of integers.

        Args:
            x: ``(*batch, *shape)`` integers.
            seed: of the noise; by default it is new at each call.

        Returns:
            ``y`` or its logit, ``(*batch, *shape)``, and the log-weight :math:`\log|dy/du| -
            \log q(u \mid x)`, of shape ``batch``: add the log-density to estimate the bound.

        Raises:
            ValueError: data of another shape, or that are not 0, 1, ..., bins - 1; or more levels
                than the flow's dtype takes.
        """
        self.check("x", x)
        with fixed_noise(seed, x.device):
            y, weight = self.noisy(x, 1)
        return y[0], weight[0]

    def quantize(self, y: Tensor) -> Tensor:
        """From the flow's space, ``(*batch, *shape)``, to the integers there."""
        if self.logit is not None:
            y = (torch.sigmoid(y) - self.logit) / (1 - 2 * self.logit)
        return (y * self.bins).floor().clamp(0, self.bins - 1).long()

    def noisy(self, x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """What ``dequantize`` gives, for several draws of the noise at once, unchecked."""
        dtype = self.flow.dtype
        if self.bins * torch.finfo(dtype).eps > 1 / 8:
            raise ValueError(
                f"bins: {dtype} has no numbers between {self.bins} levels for noise; turn the flow "
                f"into {'torch.float32' if dtype.itemsize < 4 else 'torch.float64'}, or take fewer"
            )
        event_dim = len(self.event_shape)
        u, rest, log_q = noise(
            self.dequantizer, self._squash, x.to(dtype), self.bins, event_dim, draws
        )
        wide = torch.promote_types(dtype, torch.float32)
        x, u, rest, log_q = (t.to(wide) for t in (x, u, rest, log_q))
        # 1 - y from its own parts: near the last level the difference would lose its digits.
        y, far = (x + u) / self.bins, (self.bins - 1 - x + rest) / self.bins
        weight = -self.event_shape.numel() * math.log(self.bins) - log_q
        if self.logit is None:
            return y.to(dtype), weight
        room = 1 - 2 * self.logit
        low, high = (self.logit + room * y).log(), (self.logit + room * far).log()
        return (low - high).to(dtype), weight + (math.log(room) - low - high).flatten(
            -event_dim
        ).sum(-1)

    def check(self, name: str, value: Tensor) -> None:
        """See that these are integers ``(*batch, *shape)`` from 0 to ``bins - 1``.

        Raises:
            ValueError: they are not.
        """
        check_shape(name, value, self.event_shape)
        check_levels(name, value, self.bins)
