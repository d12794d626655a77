"""A block of a causal network: a gated dilated convolution, as one linear map of its taps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.nets.mlp import Dropping


class CausalBlock(Dropping):
    """``h_t`` to what is added to it: mix of tanh(a) sigmoid(b), both from ``h_t, h_{t-d}, ...``.

    Costs ``(2 kernel + 1) channels^2`` multiplications a step.

    Args:
        channels: width C of the residual stream.
        kernel: number of taps.
        dilation: distance d between taps.
        context: width of the context, 0 for none.
    """

    def __init__(self, channels: int, kernel: int, dilation: int, context: int) -> None:
        super().__init__()
        self.channels, self.kernel, self.dilation = channels, kernel, dilation
        self.gate = nn.Linear(kernel * channels, 2 * channels)
        self.from_context = nn.Linear(context, 2 * channels, bias=False) if context else None
        self.mix = nn.Linear(channels, channels, bias=False)

    def forward(self, h: Tensor, context: Tensor | None, record: list[Tensor] | None) -> Tensor:
        """``(*batch, steps, channels)`` to as many; where ``record`` is kept, without dropout."""
        u = self.gate(torch.cat([self._delayed(h, k) for k in range(self.kernel)], dim=-1))
        if self.from_context is not None:
            u = u + self.from_context(context)[..., None, :]
        if record is not None:
            record.append(u)
        a, b = u.chunk(2, dim=-1)
        gated = a.tanh() * b.sigmoid()
        return self.mix(gated if record is not None else self.drop(gated))

    def _delayed(self, h: Tensor, taps: int) -> Tensor:
        """``h`` some taps ago, zero before the start."""
        delay = min(taps * self.dilation, h.shape[-2])
        return F.pad(h[..., : h.shape[-2] - delay, :], (0, 0, delay, 0)) if delay else h

    def bias(self, context: Tensor | None) -> Tensor:
        """What is the same at every step, ``(2 channels, rows)`` or ``(2 channels, 1)``.

        Raises:
            TypeError: the context is missing.
        """
        bias = self.gate.bias[:, None]
        if self.from_context is None:
            return bias
        if context is None:
            raise TypeError("context: this network needs one, got None")
        return torch.addmm(bias, self.from_context.weight, context.mT)

    def taps(self) -> tuple[Tensor, ...]:
        """The weight ``(2 channels, channels)`` of each tap, from the latest to the earliest."""
        return self.gate.weight.split(self.channels, dim=1)

    def remembered(self, steps: int) -> int:
        """How many steps of its input (or of its adjoint) the block has to keep."""
        return min((self.kernel - 1) * self.dilation + 1, steps)


def gate_slopes(u: Tensor) -> Tensor:
    """Derivatives of tanh(a) sigmoid(b) by a and by b, ``(steps, 2, channels, rows)``."""
    a, b = u.permute(1, 2, 0).chunk(2, dim=1)
    a, b = a.tanh(), b.sigmoid()
    return torch.stack([(1 - a * a) * b, a * b * (1 - b)], dim=1)
