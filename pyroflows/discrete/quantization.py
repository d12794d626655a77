r"""Integer data, such as pixels, under a flow: noise fills the gaps between levels.

A density fitted to integers would grow without bound on top of them. With noise :math:`u \sim
q(u \mid x)` on :math:`[0, 1)^D` a flow's density :math:`p` over :math:`y = (x + u) / \mathrm{bins}`
bounds the probability of the integers :math:`x` from below,

.. math::

    \log P(x) = \log \int_{[0, 1)^D} p\Big(\frac{x + u}{\mathrm{bins}}\Big) \mathrm{bins}^{-D}\, du
    \ge E_q \log \frac{1}{K} \sum_{k=1}^K
    \frac{p((x + u_k) / \mathrm{bins})}{\mathrm{bins}^D \, q(u_k \mid x)},

with :math:`K` draws of the noise (Theis et al. 2016, arXiv:1511.01844; variational noise: Ho et al.
2019, arXiv:1902.00275; several draws: Burda et al. 2016, arXiv:1509.00519).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows._checks import shape_text
from pyroflows.data.rows import Rows
from pyroflows.discrete.dequantization import Dequantizing
from pyroflows.discrete.levels import bits_per_dim
from pyroflows.discrete.quantized_distribution import QuantizedDistribution
from pyroflows.distributions.flow import Flow


def quantized(
    flow: Flow,
    bins: int = 256,
    *,
    dequantizer: str | Flow = "uniform",
    logit: float | None = None,
    samples: int = 1,
) -> Quantized:
    r"""A flow over integers 0 to ``bins - 1``: a module whose call is a Pyro distribution.

    Its ``log_prob`` is a lower bound estimated with noise, which comes from torch's global
    generator at each call. ``q(seed=0).log_prob(x)`` draws the noise from a seed and leaves
    the generator alone: a function of ``x`` and the parameters. ``pf.fit`` takes new noise each
    step and validates on the same noise each epoch. Draws are rounded down to integers; what the
    flow puts outside [0, 1) goes to the outer levels.

    Args:
        flow: over :math:`y = (x + u) / \mathrm{bins}`, or over its logit; shared, not copied. With
            a context, so has the result.
        bins: number of levels. The flow's dtype needs eight numbers between two of them:
            up to 2^20 in float32, 128 in float16, 16 in bfloat16 (mixed precision is not affected,
            as it keeps the parameters in float32).
        dequantizer: ``"uniform"`` noise, ``"variational"`` for noise that is learnt together with
            the flow: given the image, a coupling flow of convolutions for even height and width,
            else a ``pf.iaf``; or such a flow of your own: its draws have as many elements as an
            image, in the unit interval (else a sigmoid brings them there), its context is the
            image, scaled to [-1, 1].
        logit: None, or the flow sees :math:`\log v - \log(1 - v)` with :math:`v = \lambda +
            (1 - 2\lambda) y` for this :math:`\lambda`, in the way of RealNVP and MAF: 1e-6 for
            MNIST, 0.05 for CIFAR-10.
        samples: draws of the noise a score, together; more give a tighter bound.

    Raises:
        ValueError: an argument out of range, or flows that do not fit together.

    Example:
        >>> import torch, pyroflows as pf
        >>> q = pf.quantized(pf.nice(4), bins=16)
        >>> x = q.sample((3,))
        >>> x.dtype, pf.bits_per_dim(q.log_prob(x), q.event_shape).shape
        (torch.int64, torch.Size([3]))
    """
    return Quantized(flow, bins, dequantizer, logit, samples)


class Quantized(Dequantizing):
    """What ``quantized`` returns; its arguments are described there."""

    @property
    def config(self) -> dict[str, Any]:
        """What made it, for saving, as a builder's flow has it."""
        arguments = {
            "flow": self.flow,
            "bins": self.bins,
            "dequantizer": self._noise or self.dequantizer,
            "logit": self.logit,
            "samples": self.samples,
        }
        return {"builder": "quantized", "arguments": arguments}

    @property
    def fast(self) -> str:
        """The direction that costs one pass."""
        return self.flow.fast

    def forward(
        self,
        context: Tensor | None = None,
        *,
        seed: int | None = None,
        validate_args: bool | None = None,
    ) -> QuantizedDistribution:
        """The distribution at the present parameters, its noise new at each call or from a seed."""
        return QuantizedDistribution(
            self, self.flow(context, validate_args=False), seed, validate_args
        )

    def log_prob(
        self, x: Tensor, context: Tensor | None = None, *, seed: int | None = None
    ) -> Tensor:
        """Lower bound on the log-probability of ``(*batch, *shape)`` integers, in nats."""
        return self(context, seed=seed).log_prob(x)

    def sample(self, shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Integers ``(*shape, *context batch, *event)``."""
        return self(context).sample(shape)

    @torch.no_grad()
    def bits_per_dim(
        self, x: Tensor, context: Tensor | None = None, *, samples: int | None = None
    ) -> float:
        """Mean bits per dimension of integers, scored a few hundred at once.

        Args:
            x: ``(n, *shape)`` integers.
            context: ``(n, *context_shape)`` for a conditional flow.
            samples: draws of the noise a score, for a tighter bound than the model's own.

        Raises:
            ValueError: no rows, rows of another shape, or what ``log_prob`` raises.

        Example:
            >>> import torch, pyroflows as pf
            >>> q = pf.quantized(pf.nice(4), bins=16)
            >>> 4 < q.bits_per_dim(torch.zeros(3, 4)) < 8  # 4 is what knowing nothing costs
            True
        """
        event = tuple(self.event_shape)
        if x.dim() != 1 + len(event) or tuple(x.shape[1:]) != event or len(x) == 0:
            raise ValueError(
                f"x: expected rows of shape {shape_text('n', *event)}, at least one, got "
                f"{tuple(x.shape)}"
            )
        draws = self.samples if samples is None else samples
        noise = self.dequantizer or "uniform"
        tight = Quantized(self.flow, self.bins, noise, self.logit, draws)
        total = 0.0
        for rows in Rows(x, context).chunks(max(1, 500 // draws)):
            total += tight.log_prob(rows.x, rows.context).sum().item()
        return bits_per_dim(total / len(x), self.event_shape)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """The flow's data-dependent start, on dequantised ``x``; leaves the generator alone."""
        self.flow.initialize(self.dequantize(x, seed=0)[0], context)

    def extra_repr(self) -> str:
        """All but the flows."""
        return f"bins={self.bins}, logit={self.logit}, samples={self.samples}"
