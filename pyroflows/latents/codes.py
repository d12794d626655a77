"""To the codes of data and back: through any flow, and through quantised ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Size, Tensor, nn

from pyroflows._checks import check_shape
from pyroflows.discrete.quantization import Quantized
from pyroflows.distributions.flow import Flow
from pyroflows.distributions.flow_distribution import FlowDistribution

AnyFlow = Flow | Quantized


def encode(flow: AnyFlow, x: Tensor, context: Tensor | None = None) -> Tensor:
    """The codes of data.

    Args:
        flow: any; costs one pass where its ``fast`` is ``"log_prob"`` or ``"both"``.
        x: ``(*batch, *flow.event_shape)``.
        context: ``(*batch, *flow.context_shape)`` for a conditional flow.

    Raises:
        ValueError: data of another shape, or no levels of a quantised flow; a context that is
            missing, unwanted, or does not fit.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow, x = pf.realnvp(2), torch.randn(5, 2)
        >>> z = pf.latents.encode(flow, x)
        >>> torch.allclose(pf.latents.decode(flow, z), x, atol=1e-5)
        True
    """
    check_shape("x", x, flow.event_shape)
    view = _view(flow)
    return view.at(context).transforms[0].inverse_and_log_det(view.to_reals(x))[0]


def decode(flow: AnyFlow, z: Tensor, context: Tensor | None = None) -> Tensor:
    """The data of codes.

    Args:
        flow: any; costs one pass where its ``fast`` is ``"sample"`` or ``"both"``.
        z: ``(*batch, *code)``, of the shape that ``encode`` gives.
        context: ``(*batch, *flow.context_shape)`` for a conditional flow: another one than the code
            was made with changes what the context describes and leaves the rest.

    Raises:
        ValueError: codes of another shape; a context that is missing, unwanted, or does not fit.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow = pf.glow((1, 4, 4), levels=2, steps=1, channels=4)
        >>> x = torch.randn(3, 1, 4, 4)
        >>> pf.latents.decode(flow, pf.latents.encode(flow, x)).allclose(x, atol=1e-4)
        True
    """
    view = _view(flow)
    check_shape("z", z, view.codes()[0])
    return view.to_data(view.at(context).transforms[0].forward_and_log_det(z)[0])


def translate(
    flow_a: AnyFlow,
    flow_b: AnyFlow,
    x: Tensor,
    context_a: Tensor | None = None,
    context_b: Tensor | None = None,
) -> Tensor:
    """From one set of pictures to another: the data that the second flow has for the same codes.

    Two flows, each trained on one set, share only their base; one conditional flow with two
    contexts shares its weights too. ``translate(b, a, translate(a, b, x))`` is ``x`` up to
    rounding; of integers, up to what the rounding of the result to levels loses.

    Args:
        flow_a: the flow of ``x``.
        flow_b: the flow of the result; it may be the same.
        x: ``(*batch, *flow_a.event_shape)``.
        context_a: what ``x`` is, where ``flow_a`` is conditional.
        context_b: what to make of it, where ``flow_b`` is conditional.

    Raises:
        ValueError: flows whose codes have different shapes or base distributions, or what
            ``encode`` raises.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow, x = pf.realnvp(2, context=3), torch.randn(5, 2)
        >>> first, second = torch.eye(3)[0], torch.eye(3)[1]
        >>> pf.latents.translate(flow, flow, x, first, second).shape
        torch.Size([5, 2])
    """
    a, b = _view(flow_a).codes(), _view(flow_b).codes()
    if a != b:
        raise ValueError(
            "flow_a, flow_b: expected flows from one base, got codes of shape "
            f"{tuple(a[0])} from {a[1]} and {tuple(b[0])} from {b[1]}"
        )
    other = _differing(_view(flow_a).flow.base, _view(flow_b).flow.base)
    if other:
        raise ValueError(
            f"flow_a, flow_b: expected flows from one base, got {a[1]} with another {other!r}"
        )
    return decode(flow_b, encode(flow_a, x, context_a), context_b)


@torch.no_grad()
def sample(
    flow: AnyFlow,
    shape: int | Sequence[int] = (),
    temperature: float = 1.0,
    context: Tensor | None = None,
) -> Tensor:
    """Draws from codes at a fraction of their usual distance from the base's mean.

    Below one, samples are more typical and less varied, at zero all alike (Parmar et al. 2018,
    arXiv:1802.05751; Kingma & Dhariwal 2018). They are no draws of the flow's density.

    Args:
        flow: any whose base has a mean.
        shape: how many.
        temperature: the fraction, 1 for the flow's own draws.
        context: ``(*batch, *flow.context_shape)`` for a conditional flow.

    Returns:
        Draws ``(*shape, *context batch, *event)``, without a graph.

    Raises:
        ValueError: a negative temperature, or a base without a finite mean.

    Example:
        >>> import torch, pyroflows as pf
        >>> pf.latents.sample(pf.realnvp(2), 4, temperature=0.7).shape
        torch.Size([4, 2])
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
    base = _view(flow).at(context).base_dist
    z = base.sample(Size([shape] if isinstance(shape, int) else shape))
    if temperature != 1:
        try:
            mean = base.mean
        except (AttributeError, NotImplementedError):
            raise ValueError(
                f"temperature: expected 1, as the base {type(base).__name__} has no known "
                f"mean, got {temperature}"
            ) from None
        if not mean.isfinite().all():
            raise ValueError(
                f"temperature: expected 1, as the base {type(base).__name__} has no finite mean, "
                f"got {temperature}"
            )
        z = mean + temperature * (z - mean)
    return decode(flow, z, context)


def _identity(value: Tensor) -> Tensor:
    return value


class _View(NamedTuple):
    """What codes need of a flow, the same for those of integers and of real numbers."""

    flow: Flow
    to_reals: Callable[[Tensor], Tensor]
    to_data: Callable[[Tensor], Tensor]

    def at(self, context: Tensor | None) -> FlowDistribution:
        """The flow's distribution."""
        return self.flow(context, validate_args=False)

    def codes(self) -> tuple[Size, str]:
        """Their shape and the kind of their distribution."""
        base = self.flow.base
        kind = getattr(base, "kind", type(base)).__name__
        return self.flow.transform.inverse_shape(self.flow.event_shape), kind


def _view(flow: AnyFlow) -> _View:
    if isinstance(flow, Quantized):
        return _View(flow.flow, lambda x: flow.dequantize(x, seed=0)[0], flow.quantize)
    return _View(flow, _identity, _identity)


def _differing(a: nn.Module, b: nn.Module) -> str | None:
    """A parameter or buffer in which two bases are not the same."""
    ours, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (a, b))
    for name in {**ours, **theirs}:
        a_value, b_value = ours.get(name), theirs.get(name)
        if a_value is None or b_value is None:
            return name
        if not torch.equal(*(t.detach().cpu().double() for t in (a_value, b_value))):
            return name
    return None
