r"""Latent codes, to steer a flow with: from data to the base space and back, and in between.

A flow is a bijection, so a code :math:`z = f^{-1}(x)` keeps all of its picture, and whatever is
done to codes can be looked at. Works for any flow, and for ``pf.quantized`` ones, whose integers
get noise from a fixed seed on their way in and are rounded down on their way out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    if isinstance(flow, Quantized):
        x = flow.dequantize(x, seed=0)[0]
    return _distribution(flow, context).transforms[0].inverse_and_log_det(x)[0]


def decode(flow: AnyFlow, z: Tensor, context: Tensor | None = None) -> Tensor:
    """The data of codes.

    Args:
        flow: any; costs one pass where its ``fast`` is ``"sample"`` or ``"both"``.
        z: ``(*batch, *code)``, of the shape that ``encode`` gives.
        context: ``(*batch, *flow.context_shape)`` for a conditional flow: another one than the code
            was made with changes what the context says and keeps the rest.

    Raises:
        ValueError: codes of another shape; a context that is missing, unwanted, or does not fit.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow = pf.glow((1, 4, 4), levels=2, steps=1, channels=4)
        >>> x = torch.randn(3, 1, 4, 4)
        >>> decode(flow, encode(flow, x)).allclose(x, atol=1e-4)
        True
    """
    check_shape("z", z, _codes(flow)[0])
    y = _distribution(flow, context).transforms[0].forward_and_log_det(z)[0]
    return flow.quantize(y) if isinstance(flow, Quantized) else y


def translate(
    flow_a: AnyFlow,
    flow_b: AnyFlow,
    x: Tensor,
    context_a: Tensor | None = None,
    context_b: Tensor | None = None,
) -> Tensor:
    """From one set of pictures to another: the data that the second flow has for the same codes.

    Two flows, each trained on its own set, share only their base; one conditional flow, given twice
    with two contexts, shares its weights too. ``translate(b, a, translate(a, b, x))`` is ``x`` up
    to rounding; of integers, up to what the rounding of the result to levels loses.

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
    a, b = _codes(flow_a), _codes(flow_b)
    if a != b:
        raise ValueError(
            "flow_a, flow_b: expected flows from one base, got codes of shape "
            f"{tuple(a[0])} from {a[1]} and {tuple(b[0])} from {b[1]}"
        )
    other = _differing(_continuous(flow_a).base, _continuous(flow_b).base)
    if other:
        raise ValueError(
            f"flow_a, flow_b: expected flows from one base, got {a[1]} with another {other!r}"
        )
    return decode(flow_b, encode(flow_a, x, context_a), context_b)


def interpolate(
    a: Tensor, b: Tensor, steps: int = 8, kind: str = "linear", *, event_dim: int | None = None
) -> Tensor:
    r"""Codes on the way from one to another, both ends included.

    Half-way between two draws of a Gaussian a straight line is shorter than either, by
    :math:`\sqrt 2`: in many dimensions its picture is too plain. The great circle,
    :math:`(\sin((1 - t) \omega)\, a + \sin(t \omega)\, b) / \sin \omega` for codes at an angle
    :math:`\omega`, keeps the length (Shoemake 1985; White 2016, arXiv:1609.04468). Between codes on
    one line through the origin it is that line.

    Args:
        a: a code, or with ``event_dim`` a batch of codes.
        b: the other, of the same shape.
        steps: how many, at least two.
        kind: ``"linear"`` or ``"spherical"``.
        event_dim: how many of the last dimensions make up one code; by default all.

    Returns:
        Codes of shape ``(steps, *a.shape)``.

    Raises:
        ValueError: shapes that differ, an unknown kind, or less than two steps.

    Example:
        >>> import torch
        >>> interpolate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 3, "spherical")[1]
        tensor([0.7071, 0.7071])
    """
    if a.shape != b.shape:
        raise ValueError(f"a, b: expected one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if kind not in ("linear", "spherical"):
        raise ValueError(f"kind: expected 'linear' or 'spherical', got {kind!r}")
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, for both ends are included, got {steps}")
    event_dim = a.dim() if event_dim is None else event_dim
    if not 0 < event_dim <= max(a.dim(), 1):
        raise ValueError(f"event_dim: expected 1 to {a.dim()} for these codes, got {event_dim}")
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)
    t = t.reshape(steps, *(1 for _ in a.shape))
    if kind == "linear":
        return (1 - t) * a + t * b
    omega = _angle(a, b, event_dim)
    sine = omega.sin()
    flat = sine < 1e-3  # there the circle is a line, or is not determined
    sine, omega = (torch.where(flat, torch.ones_like(v), v) for v in (sine, omega))
    weight_a = torch.where(flat, 1 - t, ((1 - t) * omega).sin() / sine)
    weight_b = torch.where(flat, t, (t * omega).sin() / sine)
    return weight_a * a + weight_b * b


def mix(
    z1: Tensor, z2: Tensor, z3: Tensor, z4: Tensor, alpha: float | Tensor, beta: float | Tensor
) -> Tensor:
    r"""Four codes mixed by two angles in radians.

    .. math::

        z = \cos\alpha\, (z_1 \cos\beta + z_2 \sin\beta)
          + \sin\alpha\, (z_3 \cos\beta + z_4 \sin\beta)

    Of four independent draws of a standard normal it is again one, at any angles (Dinh et al. 2017,
    arXiv:1605.08803, appendix E).

    Args:
        z1: the code at angles 0 and 0.
        z2: the code at 0 and pi/2.
        z3: the code at pi/2 and 0.
        z4: the code at pi/2 and pi/2.
        alpha: between the pairs; a number, or a tensor of angles.
        beta: within the pairs; a number, or a tensor that broadcasts against ``alpha``.

    Returns:
        Codes of shape ``(*angles, *z1.shape)``: a sheet for angles ``(n, 1)`` and ``(m,)``.

    Raises:
        ValueError: codes of different shapes.

    Example:
        >>> import torch
        >>> angles = torch.linspace(0, torch.pi / 2, 5)
        >>> mix(*torch.randn(4, 64), angles[:, None], angles).shape
        torch.Size([5, 5, 64])
    """
    shapes = {tuple(z.shape) for z in (z1, z2, z3, z4)}
    if len(shapes) > 1:
        raise ValueError(f"z1, z2, z3, z4: expected one shape, got {sorted(shapes)}")
    alpha, beta = (torch.as_tensor(v, dtype=z1.dtype, device=z1.device) for v in (alpha, beta))
    alpha, beta = (v.reshape(*v.shape, *(1 for _ in z1.shape)) for v in (alpha, beta))
    first, second = beta.cos(), beta.sin()
    return alpha.cos() * (z1 * first + z2 * second) + alpha.sin() * (z3 * first + z4 * second)


def attribute(z_with: Tensor, z_without: Tensor) -> Tensor:
    """The direction of an attribute: the mean code with it minus the mean code without.

    Add a multiple of it to a code to see more of the attribute (Kingma & Dhariwal 2018,
    arXiv:1807.03039, section 6).

    Args:
        z_with: ``(rows, *event)`` codes of data that have it.
        z_without: ``(other rows, *event)`` codes of data that do not.

    Returns:
        A code, of shape ``event``.

    Raises:
        ValueError: no rows, or codes of different shapes.

    Example:
        >>> import torch
        >>> attribute(torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([3., 0.])
    """
    for name, z in (("z_with", z_with), ("z_without", z_without)):
        if z.dim() < 1 or len(z) == 0:
            raise ValueError(f"{name}: expected at least one row, got shape {tuple(z.shape)}")
    if z_with.shape[1:] != z_without.shape[1:]:
        raise ValueError(
            "z_with, z_without: expected rows of one shape, got "
            f"{tuple(z_with.shape[1:])} and {tuple(z_without.shape[1:])}"
        )
    return z_with.mean(dim=0) - z_without.mean(dim=0)


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
    base = _distribution(flow, context).base_dist
    z = base.sample(Size([shape] if isinstance(shape, int) else shape))
    if temperature != 1:
        try:
            mean = base.mean
        except (AttributeError, NotImplementedError):
            raise ValueError(
                f"temperature: expected 1, as the base {type(base).__name__} does not tell its "
                f"mean, got {temperature}"
            ) from None
        if not mean.isfinite().all():
            raise ValueError(
                f"temperature: expected 1, as the base {type(base).__name__} has no finite mean, "
                f"got {temperature}"
            )
        z = mean + temperature * (z - mean)
    return decode(flow, z, context)


def _continuous(flow: AnyFlow) -> Flow:
    return flow.flow if isinstance(flow, Quantized) else flow


def _distribution(flow: AnyFlow, context: Tensor | None) -> FlowDistribution:
    return _continuous(flow)(context, validate_args=False)


def _codes(flow: AnyFlow) -> tuple[Size, str]:
    """Their shape and the kind of their distribution."""
    flow = _continuous(flow)
    kind = getattr(flow.base, "kind", type(flow.base)).__name__
    return flow.transform.inverse_shape(flow.event_shape), kind


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


def _angle(a: Tensor, b: Tensor, event_dim: int) -> Tensor:
    """Between codes, in radians, their event dimensions kept as ones; exact also near 0 and pi."""
    dims = tuple(range(-event_dim, 0))

    def length(v: Tensor) -> Tensor:
        return torch.linalg.vector_norm(v, dim=dims, keepdim=True)  # its gradient at zero is zero

    tiny = torch.finfo(a.dtype).tiny
    a, b = a / length(a).clamp_min(tiny), b / length(b).clamp_min(tiny)
    return 2 * torch.atan2(length(a - b), length(a + b))
