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

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyroflows._checks import check_shape, checked_int, common_batch, shape_text
from pyroflows.data.checks import checked_flow
from pyroflows.data.rows import Rows
from pyroflows.discrete.levels import bits_per_dim, check_levels, levels
from pyroflows.discrete.noise import fixed_noise, noise, noise_flow, within_the_unit_interval
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.flow_distribution import FlowDistribution


def quantized(
    flow: Flow,
    bins: int = 256,
    *,
    dequantizer: str | Flow = "uniform",
    logit: float | None = None,
    samples: int = 1,
) -> Quantized:
    r"""A flow over integers 0 to ``bins - 1``: a module whose call is a Pyro distribution.

    Its ``log_prob`` is a lower bound estimated with noise (see the file's head), drawn from torch's
    global generator at each call. ``q(seed=0).log_prob(x)`` draws the noise from a seed and leaves
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


class Quantized(nn.Module):
    """What ``quantized`` returns; its arguments are described there."""

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

    @property
    def support(self) -> constraints.Constraint:
        """Events of integers from 0 to ``bins - 1``."""
        return levels(self.bins, len(self.event_shape))

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

    def extra_repr(self) -> str:
        """All but the flows."""
        return f"bins={self.bins}, logit={self.logit}, samples={self.samples}"


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
            self._owner.check("value", value)
        batch = value.shape[: value.dim() - len(self.event_shape)]
        batch = common_batch("value", batch, self.batch_shape)
        value = value.expand(batch + self.event_shape)
        draws = self._owner.samples
        with fixed_noise(self._seed, value.device):
            y, weight = self._owner.noisy(value, draws)
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
